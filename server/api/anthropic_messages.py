"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens."""

from typing import Any

from fastapi import FastAPI, Request, Response

from server.api.anthropic_answer import MessageAnswer
from server.api.anthropic_request import MESSAGES_FIELDS, read_conversation
from server.api.chat import ChatJob
from server.api.conversations import read_form, read_job
from server.api.fields import Fields, known_fields
from server.api.foreign_schemas import ANTHROPIC_ERROR, ANTHROPIC_MESSAGE, ANTHROPIC_REQUEST, TOKEN_COUNT
from server.api.openapi import GENERATION_ERRORS, READ_ERRORS, operation
from server.api.requests import check_model, generate, reply
from server.api.sampling import read_stop
from server.api.services import Services
from server.errors import InvalidRequest

_OUTPUT = known_fields("format")


def add_anthropic_routes(app: FastAPI, services: Services) -> None:
    """POST /v1/messages and /v1/messages/count_tokens."""
    prompts = services.prompts.without_limit()

    @app.post(
        "/v1/messages",
        **operation(
            request=ANTHROPIC_REQUEST,
            answer=ANTHROPIC_MESSAGE,
            streams=True,
            errors=GENERATION_ERRORS,
            failure=ANTHROPIC_ERROR,
        ),
    )
    async def messages(request: Request) -> Response:
        """A message, whole or streamed."""
        return await generate(
            request,
            services,
            lambda body: read_messages_job(Fields(MESSAGES_FIELDS, body), services),
            lambda job, generation: MessageAnswer(services, job, generation),
            closing=b"",
        )

    @app.post(
        "/v1/messages/count_tokens",
        **operation(request=ANTHROPIC_REQUEST, answer=TOKEN_COUNT, errors=READ_ERRORS, failure=ANTHROPIC_ERROR),
    )
    async def count_tokens(request: Request) -> Response:
        """How many tokens the prompt of a message would have."""

        def count(body: bytes) -> dict[str, Any]:
            fields = Fields(MESSAGES_FIELDS, body)
            check_model(fields, services)
            return {"input_tokens": len(read_conversation(fields).encode(fields, prompts).token_ids)}

        return await reply(request, services, count)


def read_messages_job(fields: Fields, services: Services) -> ChatJob:
    """What a request asks for. Raises InvalidRequest."""
    check_model(fields, services)
    if not fields.has("max_tokens"):
        raise InvalidRequest("max_tokens is missing, it must be the most tokens that the answer may have", "max_tokens")
    stop = read_stop(fields, "stop_sequences")
    form = read_form(Fields(_OUTPUT, fields.raw("output_config") or b"{}", "output_config"))
    return read_job(fields, services, read_conversation, "max_tokens", ChatJob, form, stop=stop)
