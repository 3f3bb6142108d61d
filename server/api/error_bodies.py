"""Errors as OpenAI writes them, on Anthropic's routes as Anthropic does, for every route and every way to fail.

The one place that turns errors into HTTP.
"""

from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import Scope

from server.errors import InvalidRequest, NotFound, QueueFull, RequestTimeout, TandemError, Unauthorized

# How a request may come with a name, and how the answer gives it: OpenAI's header, and Anthropic's.
REQUEST_ID_HEADER = "x-request-id"
ANSWER_ID_HEADERS = (REQUEST_ID_HEADER, "request-id")
# nginx's status where nobody waits for the answer any more; it is seen in logs and metrics only.
CLIENT_CLOSED = 499
_ANTHROPIC_ROUTES = ("/v1/messages", "/v1/messages/count_tokens")
# Anthropic's names of errors, by the HTTP status.
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# What the answer says beside its body. A client that is late with its body may still be sending it.
_HEADERS = {
    Unauthorized.status: {"www-authenticate": "Bearer"},
    RequestTimeout.status: {"connection": "close"},
    QueueFull.status: {"retry-after": "1"},
}


def error_body(error: TandemError) -> dict[str, Any]:
    """The JSON body: {"error": {message, type, param, code}}; code is the HTTP status."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.status}}


def anthropic_error_body(error: TandemError) -> dict[str, Any]:
    """The JSON body: {"type": "error", "error": {type, message}}."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_response(error: TandemError, scope: Scope) -> Response:
    """The whole HTTP answer to a request."""
    body = anthropic_error_body(error) if _is_anthropic(scope) else error_body(error)
    headers = _HEADERS.get(error.status)
    return Response(msgspec.json.encode(body), error.status, headers, media_type="application/json")


def error_event(error: TandemError, scope: Scope) -> bytes:
    """The server-sent event that tells the client of a stream."""
    if _is_anthropic(scope):
        return b"event: error\ndata: " + msgspec.json.encode(anthropic_error_body(error)) + b"\n\n"
    return b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n"


def _is_anthropic(scope: Scope) -> bool:
    return scope.get("path", "").endswith(_ANTHROPIC_ROUTES)


def install_error_handlers(app: FastAPI) -> None:
    """Answer Tandem's errors, unknown routes, wrong methods and our own mistakes with OpenAI error bodies."""
    app.add_exception_handler(TandemError, _answer_tandem_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_mistake)


async def _answer_tandem_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TandemError)
    return error_response(error, request.scope)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    route = f"{request.method} {request.url.path[:200]}"
    if error.status_code == NotFound.status:
        return error_response(NotFound(f"there is no route {route}; the routes are listed at /docs"), request.scope)
    refusal = InvalidRequest(f"{route}: {error.detail}")
    refusal.status = error.status_code
    response = error_response(refusal, request.scope)
    response.headers.update(error.headers or {})
    if "allow" in response.headers:
        response.headers["allow"] = ", ".join(sorted(_find_methods(request)))
    return response


def _find_methods(request: Request) -> set[str]:
    """What may be asked of the path, by any of its routes: the framework names those of the first."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is Match.PARTIAL]
    return {method for route in routes if isinstance(route, Route) for method in route.methods or ()}


async def _answer_mistake(request: Request, _error: Exception) -> Response:
    request_id = request.state.exchange.id
    mistake = TandemError(f"the server made a mistake; its log has the details (request {request_id})")
    response = error_response(mistake, request.scope)
    response.headers.update(dict.fromkeys(ANSWER_ID_HEADERS, request_id))
    return response
