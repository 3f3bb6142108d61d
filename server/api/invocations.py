"""POST /invocations, as SageMaker calls a model: a chat request or a completions request, whichever the body is."""

from fastapi import Request, Response

from server.api.chat import ChatJob, read_chat_job
from server.api.chat_format import ChatFormat
from server.api.completions import CompletionFormat, CompletionJob, read_completion_job
from server.api.envelope import Format
from server.api.fields import Fields
from server.api.requests import respond
from server.api.services import Services


async def answer_invocation(request: Request, services: Services) -> Response:
    """Answer one request, a chat if it has messages. Raises TandemError for what must be an HTTP error."""

    def read(fields: Fields) -> ChatJob | CompletionJob:
        return read_chat_job(fields, services) if fields.has("messages") else read_completion_job(fields, services)

    def make_format(job: ChatJob | CompletionJob) -> Format:
        if isinstance(job, ChatJob):
            return ChatFormat(services.tokenizer, job, job.rules)
        return CompletionFormat(services.tokenizer, job)

    return await respond(request, services, read, make_format)
