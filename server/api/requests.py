"""From a request's body to the answer, for all endpoints that generate: read, generate, and send it whole or as events.

An endpoint is two things: a reader that makes a `Job` of the body, and an `Answer` that is written from what is
generated. OpenAI's two share their fields and, but for the `Format` of the choices, the answer.
"""

import sys
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import Request, Response

from server.api.constraints import MASK_FIELDS
from server.api.envelope import Envelope, Format
from server.api.error_bodies import CLIENT_CLOSED
from server.api.exchange import exchange_of
from server.api.fields import Fields, known_fields, require_boolean, shown
from server.api.generation import Generation, Job
from server.api.no_tokenizer import check_speaks
from server.api.prompts import PROMPT_FIELDS
from server.api.sampling import SAMPLING_FIELDS
from server.api.services import Services
from server.api.terms import TERM_FIELDS
from server.api.thinking import THINKING_FIELDS
from server.api.tools import TOOL_FIELDS
from server.api.transport import DONE, ClientGone, EventStream, run_until_disconnect
from server.errors import InvalidRequest, NotFound

# Known fields that change the answer and are not served: ignoring them would give a wrong answer silently.
_UNSERVED = ("suffix", "use_beam_search")
_HARMLESS: tuple[object, ...] = (False, "", [], {"type": "text"})
ANSWER_FIELDS = (
    *("model", "stream", "stream_options", "request_id", "echo", "best_of"),
    *("return_token_ids", "return_tokens_as_token_ids", "return_spec"),
)
_CHAT_FIELDS = (*TOOL_FIELDS, *THINKING_FIELDS)
_DRAWING_FIELDS = (*SAMPLING_FIELDS, *MASK_FIELDS)
_REQUEST = known_fields(*ANSWER_FIELDS, *PROMPT_FIELDS, *_CHAT_FIELDS, *_DRAWING_FIELDS, *TERM_FIELDS, *_UNSERVED)
_MAX_ID_CHARS = 256

J = TypeVar("J", bound=Job)


class Answer(Protocol):
    """What is made of a generation: one of the two is called, once."""

    async def whole(self) -> Response:
        """The answer in one piece."""

    def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, without what closes the stream."""


async def respond(
    request: Request, services: Services, read_job: Callable[[Fields], J], make_format: Callable[[J], Format]
) -> Response:
    """Answer one request of an endpoint of OpenAI's first two. Raises TandemError for what must be an HTTP error."""
    return await generate(
        request,
        services,
        lambda body: read_job(read_fields(body, services)),
        lambda job, generation: Envelope(services, make_format(job), generation, job, generation.name),
    )


async def generate(
    request: Request,
    services: Services,
    read_job: Callable[[bytes], J],
    make_answer: Callable[[J, Generation], Answer],
    closing: bytes = DONE,
    adds_more: bool = False,
) -> Response:
    """Answer one request of any endpoint, a stream closed with `closing`. `adds_more`: `read_job` may read more than
    the body. Raises TandemError for what must be an HTTP error."""
    try:
        async with services.bodies.hold(request.receive, request.headers.get("content-type", "")) as body:
            services.client.check_room(1)
            job = await services.read(read_job, body, adds_more)
        exchange = exchange_of(request.scope)
        name = job.request_id or exchange.id
        generation = Generation(job, services.tokenizer, services.client, services.metrics, name)
        exchange.generation = generation
        answer = make_answer(job, generation)
        if job.stream:
            return EventStream(answer.events(), services.config.keep_alive_interval, closing)
        return await run_until_disconnect(request.receive, answer.whole())
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED)


async def reply(
    request: Request, services: Services, read: Callable[[bytes], Any], act: Callable[[Any], Any] | None = None
) -> Response:
    """Answer a request that generates nothing with what `read` says to its body, or what `act`, which no thread
    disturbs, makes of that. Raises TandemError."""
    try:
        async with services.bodies.hold(request.receive, request.headers.get("content-type", "")) as body:
            if act is None:
                data = await services.read(lambda data: msgspec.json.encode(read(data)), body)
            else:
                data = msgspec.json.encode(act(await services.read(read, body)))
        return Response(data, media_type="application/json")
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED)


def read_stream(fields: Fields) -> dict[str, Any]:
    """The fields of `Job` that say how to send the answer, and what it tells besides: `return_token_ids`,
    `return_tokens_as_token_ids`, `return_spec` and `prompt_logprobs`, whose range is checked with the sampling fields.

    `continuous_usage_stats` brings the usage with every chunk, unless `include_usage` is false.
    """
    stream = fields.boolean("stream", False)
    options = fields.mapping("stream_options")
    num_prompt_logprobs = fields.integer("prompt_logprobs", None)
    if num_prompt_logprobs is not None and stream:
        raise InvalidRequest("prompt_logprobs is given with stream; leave one of them out", "prompt_logprobs")
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
        "continuous_usage": flags.get("continuous_usage_stats", False) and flags.get("include_usage", True),
        "return_token_ids": fields.boolean("return_token_ids", False),
        "return_spec": fields.boolean("return_spec", False),
        "tokens_as_ids": fields.boolean("return_tokens_as_token_ids", False),
        "num_prompt_logprobs": sys.maxsize if num_prompt_logprobs == -1 else num_prompt_logprobs,
        "request_id": read_request_id(fields, "request_id"),
    }


def read_request_id(fields: Fields, name: str) -> str:
    """The client's own name for the request, from the field `name`; nothing if it has none."""
    request_id = fields.text(name, "")
    if len(request_id) > _MAX_ID_CHARS:
        raise InvalidRequest(f"{name} has {len(request_id)} characters, the limit is {_MAX_ID_CHARS}", name)
    return request_id


def read_fields(body: bytes, services: Services) -> Fields:
    """The fields of a request for the served model. Raises NotFound for another model, InvalidRequest."""
    fields = Fields(_REQUEST, body)
    check_speaks(services.tokenizer)
    check_model(fields, services)
    refuse_unserved(fields, _UNSERVED)
    return fields


def check_model(fields: Fields, services: Services) -> None:
    """Raise NotFound if the request names another model."""
    model = fields.text("model", "")
    if model not in ("", *services.model_names):
        raise NotFound(f"The model {shown(model)} does not exist; this server has {services.model_name!r}", "model")


def refuse_unserved(fields: Fields, names: Iterable[str]) -> None:
    """Raise InvalidRequest if one of the fields `names` asks for anything."""
    for name in names:
        if fields.has(name) and fields.value(name) not in _HARMLESS:
            raise InvalidRequest(f"{fields.name(name)} is not served; leave it out", fields.name(name))
