"""Who may ask: requests must bring one of the server's keys, for some routes the administrator's. Knows nothing of
what they ask for."""

import secrets
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.error_bodies import error_response
from server.errors import Unauthorized

# For probes of load balancers, which have no keys, and for the page, which asks its user for one.
_OPEN_PATHS = ("/health", "/ready", "/ping", "/")
_OPEN_FOLDER = "/playground/"


class KeyGuard:
    """Answers 401 to what brings no key of `keys`, if there are any, as `Authorization: Bearer KEY` or as
    `x-api-key: KEY`. `admin_paths` are open to the `admin_key` alone, if there is one, and so is everything else."""

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], admin_key: str | None = None, admin_paths: Collection[str] = ()
    ):
        self._app = app
        self._admin_keys = [] if admin_key is None else [admin_key.encode()]
        self._keys = [*(key.encode() for key in keys), *self._admin_keys] if keys else []
        self._admin_paths = frozenset(admin_paths if self._admin_keys else ())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may pass."""
        # The routes are found with the proxy's part of the path and without it.
        is_admin = scope["type"] == "http" and not self._admin_paths.isdisjoint((scope["path"], _path(scope)))
        keys = self._admin_keys if is_admin else self._keys
        if scope["type"] != "http" or not keys or _is_open(scope) or _admits(keys, Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        flag = "--admin-api-key" if is_admin else "--api-key"
        refusal = Unauthorized(f"the request has no valid key; send Authorization: Bearer KEY ({flag} of the server)")
        await error_response(refusal, scope)(scope, receive, send)


def _admits(keys: Sequence[bytes], headers: Headers) -> bool:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    brought = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
    # All are compared, and each in constant time: how long it takes says nothing about the keys.
    matches = [secrets.compare_digest(one.encode("latin-1"), key) for one in brought for key in keys]
    return any(matches)


def _is_open(scope: Scope) -> bool:
    path = _path(scope)
    return path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER)


def _path(scope: Scope) -> str:
    return scope["path"].removeprefix(scope.get("root_path", ""))
