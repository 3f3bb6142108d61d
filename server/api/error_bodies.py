"""Errors as OpenAI writes them, for every route and every way to fail. The one place that turns errors into HTTP."""

from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from server.errors import InvalidRequest, NotFound, TandemError


def error_body(error: TandemError) -> dict[str, Any]:
    """The JSON body: {"error": {message, type, param, code}}; code is the HTTP status."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.status}}


def error_response(error: TandemError) -> Response:
    """The whole HTTP answer."""
    return Response(msgspec.json.encode(error_body(error)), error.status, media_type="application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Answer Tandem's errors, unknown routes, wrong methods and our own mistakes with OpenAI error bodies."""
    app.add_exception_handler(TandemError, _answer_tandem_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_mistake)


async def _answer_tandem_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, TandemError)
    return error_response(error)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    route = f"{request.method} {request.url.path[:200]}"
    if error.status_code == NotFound.status:
        return error_response(NotFound(f"there is no route {route}; the routes are listed at /docs"))
    refusal = InvalidRequest(f"{route}: {error.detail}")
    refusal.status = error.status_code
    response = error_response(refusal)
    response.headers.update(error.headers or {})
    return response


async def _answer_mistake(_request: Request, _error: Exception) -> Response:
    return error_response(TandemError("the server made a mistake; its log has the details"))
