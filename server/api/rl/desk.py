"""What all routes of trainers share: reading a request, having the engine carry out commands, and answering.

A field of a request may stand in its body or in its query. SGLang's routes answer {success, message} and say so of
failures, too; vLLM's fail like every other route.
"""

import re
import uuid
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response

from server import errors
from server.api.error_bodies import CLIENT_CLOSED, error_body
from server.api.fields import Fields, known_fields
from server.api.openapi import ERROR, READ_ERRORS, Schema, operation, query_parameter
from server.api.services import Services
from server.api.transport import MAX_BODY_BYTES, BodyReader, ClientGone
from server.control import Control, Done, Resume
from server.errors import Conflict, EngineDead, InvalidRequest, TandemError

# Trainers may send a weight in twice the bytes that the checkpoint has it in, and base64 makes four of three.
_MAX_INFLATION = 2 * 4 / 3
_JSON = "application/json"
# What a query says of a field that is no text.
_LITERAL = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?")
SUCCESS: Schema = {
    "type": "object",
    "required": ["success", "message"],
    "properties": {"success": {"const": True}, "message": {"type": "string"}},
}
_FAILURE: Schema = {**ERROR, "properties": {**ERROR["properties"], "success": {"const": False}}}

T = TypeVar("T")


class Form:
    """The fields of a request, `required` ones among them: their schemas, and which are read."""

    def __init__(self, required: tuple[str, ...] = (), /, **schemas: Schema):
        self._schemas = schemas
        self._known = known_fields(*schemas)
        self._required = list(required)

    def read(self, body: bytes, query: Iterable[tuple[str, str]]) -> Fields:
        """The fields of a body, which may be empty, and of a query. Raises InvalidRequest."""
        return _FormFields(self._known, body, {name: self._as_json(name, text) for name, text in _grouped(query)})

    def describe(self, has_body: bool, is_plain: bool, answer: Schema | None) -> dict[str, Any]:
        """Keywords for the decorator of a route that takes this form, with a body or without one, and fails as
        SGLang's do, or others."""
        schema = {"type": "object", "properties": self._schemas, "required": self._required}
        # Where a field is required, one place is enough to name.
        in_query = not (has_body and self._required)
        return operation(
            request=schema if has_body else None,
            needs_body=bool(self._required),
            parameters=[query_parameter(name, schema) for name, schema in self._schemas.items() if in_query],
            answer=answer,
            errors=(*READ_ERRORS, Conflict, EngineDead),
            failure=_FAILURE if is_plain else ERROR,
        )

    def _as_json(self, name: str, texts: list[str]) -> bytes:
        """What a JSON body would have for the field of a query."""
        kinds = self._schemas.get(name, {}).get("type", "string")
        if "array" in kinds:
            return msgspec.json.encode(texts)
        text = texts[-1].lower() if "boolean" in kinds else texts[-1]
        is_text = "string" in kinds or not _LITERAL.fullmatch(text)
        return msgspec.json.encode(text) if is_text else text.encode()


class _FormFields(Fields):
    """Fields of a body, with those of a query over them."""

    def __init__(self, known: type[msgspec.Struct], body: bytes, query: dict[str, bytes]):
        super().__init__(known, body or b"{}")
        for name, value in query.items():
            if name in known.__struct_fields__:
                setattr(self._fields, name, msgspec.Raw(value))


class Desk:
    """Takes what trainers ask for, has the engine do it, and answers."""

    def __init__(self, services: Services):
        self.services = services
        self.client = services.client
        max_bytes = int(_MAX_INFLATION * _checkpoint_bytes(services)) + MAX_BODY_BYTES
        self.num_resumes = 0  # commands to go on that were carried out
        # One body as large as the model at a time.
        self._large_bodies = BodyReader(services.config.client_timeout, max_bytes, max_bytes)

    async def answer(
        self,
        request: Request,
        form: Form,
        read: Callable[[Fields], T],
        act: Callable[[T], Awaitable[Any]],
        has_tensors: bool = False,
    ) -> Response:
        """What `act` makes of what `read`, in the thread pool, reads. It is not stopped when the client goes. Raises
        TandemError."""
        bodies, query = self._large_bodies if has_tensors else self.services.bodies, request.query_params.multi_items()
        try:
            async with bodies.hold(request.receive, request.headers.get("content-type", "")) as body:
                asked = await self.services.do_apart(lambda data: read(form.read(data, query)), body)
                return Response(msgspec.json.encode(await act(asked)), media_type=_JSON)
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED)

    async def answer_plainly(
        self,
        request: Request,
        form: Form,
        read: Callable[[Fields], T],
        act: Callable[[T], Awaitable[Any]],
        has_tensors: bool = False,
    ) -> Response:
        """The same, but what was refused is answered with {success, message} beside the error."""
        try:
            return await self.answer(request, form, read, act, has_tensors)
        except (InvalidRequest, Conflict) as error:
            body = {"success": False, "message": error.message, **error_body(error)}
            return Response(msgspec.json.encode(body), error.status, media_type=_JSON)

    async def carry_out(self, command: Control) -> dict[str, Any]:
        """What the engine's answer to a command holds. Raises TandemError where it refuses."""
        done = await self.client.control(command)
        if done.error:
            raise _refusal(done)
        self.num_resumes += isinstance(command, Resume)
        return done.values


def new_id() -> str:
    """The id of a command."""
    return uuid.uuid4().hex


def success(message: str, **values: Any) -> dict[str, Any]:
    """SGLang's answer."""
    return {"success": True, "message": message, **values}


def _refusal(done: Done) -> TandemError:
    """Whatever the engine does not do is the request's fault, unless it is a matter of when."""
    kind = getattr(errors, done.kind, InvalidRequest)
    return (kind if kind in (Conflict, EngineDead) else InvalidRequest)(done.error)


def _grouped(query: Iterable[tuple[str, str]]) -> Iterable[tuple[str, list[str]]]:
    """Names with all of their texts."""
    texts: dict[str, list[str]] = {}
    for name, text in query:
        texts.setdefault(name, []).append(text)
    return texts.items()


def _checkpoint_bytes(services: Services) -> int:
    """The size of the weights in the files that were loaded."""
    files = Path(services.engine_config.model).glob("*.safetensors")
    return sum(path.stat().st_size for path in files)
