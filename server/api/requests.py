"""From a request's body to the answer, for both endpoints: read, generate, and send it whole or as events.

An endpoint is two things: a reader that makes a `Job` of the fields, and a `Format` that writes the choices.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from fastapi import Request, Response

from server.api.fields import Fields, known_fields, require_boolean, shown
from server.api.generation import Choice, Delta, Generation, Job
from server.api.prompts import PROMPT_FIELDS
from server.api.sampling import SAMPLING_FIELDS
from server.api.services import Services
from server.api.terms import TERM_FIELDS
from server.api.transport import ClientGone, EventStream, encode_event, read_body, run_until_disconnect
from server.errors import InvalidRequest, NotFound

# Known fields that change the answer and are not served: ignoring them would give a wrong answer silently.
_UNSERVED = ("tools", "response_format", "structured_outputs", "echo", "suffix", "prompt_logprobs")
_HARMLESS: tuple[object, ...] = (False, "", [], {"type": "text"})
_REQUEST = known_fields("model", "stream", "stream_options", *PROMPT_FIELDS, *SAMPLING_FIELDS, *TERM_FIELDS, *_UNSERVED)
_CLIENT_CLOSED = 499


class Format(Protocol):
    """How an endpoint writes its choices."""

    id_prefix: str
    object_name: str
    chunk_object_name: str

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The `choices` entries that stream one delta; none when there is nothing to say."""

    def choice(self, choice: Choice, deltas: list[Delta]) -> dict[str, Any]:
        """The `choices` entry of a whole choice."""


async def respond(
    request: Request, services: Services, read_job: Callable[[Fields], Job], make_format: Callable[[Job], Format]
) -> Response:
    """Answer one request of an endpoint. Raises TandemError for what must be an HTTP error."""
    try:
        body = await read_body(request.receive, request.headers.get("content-type", ""))
        services.client.check_room(1)
        job = await services.read(lambda data: read_job(read_fields(data, services)), body)
        generation = Generation(job, services.tokenizer, services.client, services.metrics)
        envelope = _Envelope(services.model_name, make_format(job), generation, job)
        if job.stream:
            return EventStream(envelope.events())
        return await run_until_disconnect(request.receive, envelope.whole())
    except ClientGone:
        return Response(status_code=_CLIENT_CLOSED)


def read_stream(fields: Fields) -> dict[str, bool]:
    """The fields of `Job` that say how to send the answer."""
    stream = fields.boolean("stream", False)
    options = fields.mapping("stream_options")
    if fields.has("stream_options") and not stream:
        raise InvalidRequest("stream_options is given without stream; set stream to true", "stream_options")
    flags = {
        name: require_boolean(f"stream_options.{name}", options[name])
        for name in ("include_usage", "continuous_usage_stats")
        if options.get(name) is not None
    }
    return {
        "stream": stream,
        "include_usage": flags.get("include_usage", False),
        "continuous_usage": flags.get("continuous_usage_stats", False),
    }


def read_fields(body: bytes, services: Services) -> Fields:
    """The fields of a request for the served model. Raises NotFound for another model, InvalidRequest."""
    fields = Fields(_REQUEST, body)
    model = fields.text("model", "")
    if model not in ("", services.model_name):
        raise NotFound(f"The model {shown(model)} does not exist; this server has {services.model_name!r}", "model")
    for name in _UNSERVED:
        if fields.has(name) and fields.value(name) not in _HARMLESS:
            raise InvalidRequest(f"{name} is not served; leave it out", name)
    return fields


class _Envelope:
    """What surrounds the choices: id, object, created, model, usage."""

    def __init__(self, model_name: str, form: Format, generation: Generation, job: Job):
        self._form = form
        self._generation = generation
        self._job = job
        self._head = {
            "id": form.id_prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model_name,
        }

    async def whole(self) -> Response:
        """The answer in one piece."""
        parts: list[list[Delta]] = [[] for _ in self._generation.choices]
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                parts[delta.index].append(delta)
        payload = {
            **self._head,
            "object": self._form.object_name,
            "choices": [self._form.choice(choice, parts[choice.index]) for choice in self._generation.choices],
            "usage": self._generation.usage(),
        }
        return Response(msgspec.json.encode(payload), media_type="application/json")

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, without the closing [DONE]."""
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                for chunk in self._form.chunks(delta):
                    yield self._encode([chunk], self._generation.usage() if self._job.continuous_usage else None)
        if self._job.include_usage or self._job.continuous_usage:
            yield self._encode([], self._generation.usage())

    def _encode(self, choices: list[dict[str, Any]], usage: dict[str, object] | None) -> bytes:
        payload = {**self._head, "object": self._form.chunk_object_name, "choices": choices}
        if self._job.include_usage or usage is not None:
            payload["usage"] = usage
        return encode_event(payload)
