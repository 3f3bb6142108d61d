"""Ending requests in flight by the names that their clients gave them: POST /abort_request and /abort_requests.

They end with finish reason abort and the tokens they have. A name is what a request said by `request_id`, `rid` or
the header X-Request-Id; the id of the answer does as well, but for /v1/responses, whose answers have ids of their own
and a route that cancels them.
"""

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI, Request, Response

from server.api.fields import Fields, known_fields, shown
from server.api.openapi import READ_ERRORS, Schema, nullable, operation
from server.api.requests import read_request_id, reply
from server.api.services import Services
from server.errors import InvalidRequest

_ABORT = known_fields("rid", "abort_all")
_ABORTS = known_fields("request_ids")
_MAX_IDS = 16384
# How the ids of answers begin; then comes the name.
_PREFIXES = ("", "chatcmpl-", "cmpl-", "msg_")
_ABORT_REQUEST: Schema = {
    "type": "object",
    "properties": {"rid": nullable("string", maxLength=256), "abort_all": nullable("boolean")},
}
_ABORT_REQUESTS: Schema = {
    "type": "object",
    "required": ["request_ids"],
    "properties": {"request_ids": {"type": "array", "items": {"type": "string"}, "maxItems": _MAX_IDS}},
}
_ABORTED: Schema = {
    "type": "object",
    "required": ["num_aborted"],
    "properties": {"num_aborted": {"type": "integer", "minimum": 0}},
}


def add_abort_routes(app: FastAPI, services: Services) -> None:
    """POST /abort_request and /abort_requests."""
    client = services.client

    def end(names: Collection[str] | None) -> dict[str, Any]:
        wanted = None if names is None else {prefix + name for prefix in _PREFIXES for name in names}
        found = client.find(lambda name: wanted is None or any(prefix + name in wanted for prefix in _PREFIXES))
        client.end(found)
        return {"num_aborted": len(found)}

    @app.post("/abort_request", **operation(request=_ABORT_REQUEST, answer=_ABORTED, errors=READ_ERRORS))
    async def abort_request(request: Request) -> Response:
        """End the requests of one name, or all of them."""
        return await reply(request, services, _read_name, end)

    @app.post("/abort_requests", **operation(request=_ABORT_REQUESTS, answer=_ABORTED, errors=READ_ERRORS))
    async def abort_requests(request: Request) -> Response:
        """End the requests of several names."""
        return await reply(request, services, _read_names, end)


def _read_name(body: bytes) -> list[str] | None:
    """The name; None for all requests."""
    fields = Fields(_ABORT, body)
    name = read_request_id(fields, "rid")
    if fields.boolean("abort_all", False):
        return None
    if not name:
        raise InvalidRequest("rid is missing, it must be the name of a request, unless abort_all is true", "rid")
    return [name]


def _read_names(body: bytes) -> list[str]:
    fields = Fields(_ABORTS, body)
    names = fields.items("request_ids", _MAX_IDS)
    for name in names:
        if not isinstance(name, str):
            raise InvalidRequest(f"request_ids has {shown(name)}, its entries must be strings", "request_ids")
    if not names:
        raise InvalidRequest("request_ids is [], it must be a list of at least one name", "request_ids")
    return names
