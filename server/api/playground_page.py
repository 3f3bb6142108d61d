"""The playground at `/`: a fixed table of files, read once at start. Knows nothing of what is in them."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response

_FOLDER = Path(__file__).resolve().parent / "playground"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PAGE = "index.html"
# The page loads what is beside it and nothing else, runs no inline script, and is framed by nobody.
_CONTENT_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"


def add_playground_routes(app: FastAPI) -> None:
    """GET and HEAD `/` and `/playground/NAME` for every file of the page; any other name has no route."""
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in _MEDIA_TYPES:
            route = "/" if path.name == _PAGE else f"/playground/{path.name}"
            app.add_route(route, _answer_with(path), include_in_schema=False)


def _answer_with(path: Path) -> Callable[[Request], Awaitable[Response]]:
    content = path.read_bytes()
    headers = {
        "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        "cache-control": "no-cache",  # ask every time; the tag makes the answer empty
        "content-security-policy": _CONTENT_POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }

    async def answer(request: Request) -> Response:
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=_MEDIA_TYPES[path.suffix])

    return answer
