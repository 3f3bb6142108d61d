"""POST /v1/chat/completions: its fields, its chunks and its messages."""

from dataclasses import replace
from typing import Any

from fastapi import Request, Response

from server.api.fields import Fields
from server.api.generation import Choice, Delta, Job
from server.api.logprobs import chat_logprobs
from server.api.requests import read_stream, respond
from server.api.sampling import MAX_CHOICES, Limits, read_max_tokens, read_num_logprobs, read_sampling
from server.api.services import Services
from server.api.terms import read_terms
from server.errors import InvalidRequest
from server.tokenizer import Tokenizer

_MAX_TOKENS_NAMES = ("max_completion_tokens", "max_tokens")


async def answer_chat(request: Request, services: Services) -> Response:
    """Answer one chat request. Raises TandemError for what must be an HTTP error."""
    return await respond(
        request,
        services,
        lambda fields: read_chat_job(fields, services),
        lambda job: ChatFormat(services.tokenizer, job.sampling.logprobs),
    )


def read_chat_job(fields: Fields, services: Services) -> Job:
    """What a chat request asks for; max_tokens defaults to the rest of the context. Raises InvalidRequest."""
    sampling = replace(
        read_sampling(fields, services.limits),
        max_tokens=read_max_tokens(fields, _MAX_TOKENS_NAMES, None, services.limits),
        logprobs=_read_logprobs(fields, services.limits),
    )
    n = fields.integer("n", 1, 1, MAX_CHOICES) or 1
    how, terms = read_stream(fields), read_terms(fields)
    return Job(prompts=[services.prompts.read_messages(fields)], sampling=sampling, n=n, terms=terms, **how)


class ChatFormat:
    """Writes chat messages and their chunks. `num_top` alternatives per token, None for no log-probabilities."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, num_top: int | None):
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._begun: set[int] = set()

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """A role chunk first, then content; the last one carries the finish reason and may carry text."""
        chunks = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            chunks.append(_chunk(delta.index, {"role": "assistant", "content": ""}))
        logprobs = self._logprobs(delta)
        if delta.text or delta.finish_reason is not None or logprobs is not None:
            chunk = _chunk(delta.index, {"content": delta.text} if delta.text else {})
            chunk.update(logprobs=logprobs, finish_reason=delta.finish_reason)
            if delta.finish_reason is not None:
                chunk["stop_reason"] = delta.stop_reason
            chunks.append(chunk)
        return chunks

    def choice(self, choice: Choice, deltas: list[Delta]) -> dict[str, Any]:
        """A whole message."""
        entries = [entry for delta in deltas if (part := self._logprobs(delta)) for entry in part["content"]]
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(delta.text for delta in deltas)},
            "logprobs": None if self._num_top is None else {"content": entries},
            "finish_reason": deltas[-1].finish_reason,
            "stop_reason": deltas[-1].stop_reason,
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self._num_top is None or not delta.token_ids:
            return None
        return chat_logprobs(self._tokenizer, delta, self._num_top)


def _chunk(index: int, message: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": message, "logprobs": None, "finish_reason": None}


def _read_logprobs(fields: Fields, limits: Limits) -> int | None:
    wanted = fields.boolean("logprobs", False)
    num_top = read_num_logprobs(fields, "top_logprobs", limits) or 0
    if num_top and not wanted:
        raise InvalidRequest("top_logprobs is given without logprobs; set logprobs to true", "top_logprobs")
    return num_top if wanted else None
