"""Who may ask: requests must bring one of the server's keys. Knows nothing of what they ask for."""

import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.error_bodies import error_response
from server.errors import Unauthorized

# For probes of load balancers, which have no keys, and for the page, which asks its user for one.
_OPEN_PATHS = ("/health", "/ready", "/ping", "/")
_OPEN_FOLDER = "/playground/"


class KeyGuard:
    """Answers 401 to what brings no key of `keys`, as `Authorization: Bearer KEY` or as `x-api-key: KEY`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may pass."""
        if scope["type"] != "http" or _is_open(scope) or self._admits(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        refusal = Unauthorized("the request has no valid key; send Authorization: Bearer KEY (--api-key of the server)")
        await error_response(refusal, scope)(scope, receive, send)

    def _admits(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        brought = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
        # All are compared, and each in constant time: how long it takes says nothing about the keys.
        matches = [secrets.compare_digest(one.encode("latin-1"), key) for one in brought for key in self._keys]
        return any(matches)


def _is_open(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER)
