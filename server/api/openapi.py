"""What /openapi.json says of a route beyond its path: the body it takes, and every answer it may give.

Descriptions only: requests are read by the endpoints' own readers. Knows no endpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Response

from server.errors import (
    Conflict,
    EngineDead,
    InvalidRequest,
    ModelFailure,
    NotFound,
    QueueFull,
    RequestTimeout,
    TandemError,
    Unauthorized,
)

Schema = Mapping[str, Any]

_JSON = "application/json"
_EVENTS = "text/event-stream"
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}
# How a request with a body may fail, and one that generates.
READ_ERRORS = (InvalidRequest, NotFound, RequestTimeout, QueueFull)
GENERATION_ERRORS = (*READ_ERRORS, Conflict, ModelFailure, EngineDead)


def operation(
    *,
    request: Schema | None = None,
    answer: Schema | None = None,
    content_type: str | None = _JSON,
    streams: bool = False,
    errors: Sequence[type[TandemError]] = (),
    parameters: Sequence[Schema] = (),
    failure: Schema = ERROR,
    needs_body: bool = True,
) -> dict[str, Any]:
    """Keywords for a route's decorator: the `request` and the `answer` as JSON schemas (a request may come without a
    body unless it `needs_body`, an answer without a schema may be anything, one without a content type is empty),
    whether the answer may be a stream of events, the errors besides a missing key, and the `failure` that all of them
    are."""
    content: dict[str, Any] = {} if content_type is None else {content_type: {"schema": answer or {}}}
    if streams:
        content[_EVENTS] = {"schema": {"type": "string"}}
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "The answer.", "content": content}}
    refusals: tuple[type[TandemError], ...] = (Unauthorized, *errors)
    for error in refusals:
        description = " ".join((error.__doc__ or "").split())
        responses[error.status] = {"description": description, "content": {_JSON: {"schema": failure}}}
    extra: dict[str, Any] = {"parameters": list(parameters)} if parameters else {}
    if request is not None:
        extra["requestBody"] = {"required": needs_body, "content": {_JSON: {"schema": request}}}
    plain = {} if content_type == _JSON else {"response_class": Response}
    return {"responses": responses, "openapi_extra": extra, **plain}


def nullable(kind: str, **rules: Any) -> Schema:
    """A field of the JSON type `kind`, or null, which is the same as leaving it out."""
    return {"type": [kind, "null"], **rules}


def query_parameter(name: str, schema: Schema) -> Schema:
    """A field in the route's query, which may be left out."""
    return {"name": name, "in": "query", "required": False, "schema": schema}


def path_parameter(name: str) -> Schema:
    """A text in the route's path."""
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
