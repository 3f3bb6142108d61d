"""POST /v1/completions: its fields, its chunks and its texts."""

from dataclasses import replace
from typing import Any

from fastapi import Request, Response

from server.api.fields import Fields
from server.api.generation import Choice, Delta, Job
from server.api.logprobs import CompletionLogprobs, merge_completion_logprobs
from server.api.prompts import MAX_PROMPTS
from server.api.requests import read_stream, respond
from server.api.sampling import MAX_CHOICES, read_max_tokens, read_num_logprobs, read_sampling
from server.api.services import Services
from server.api.terms import read_terms
from server.errors import InvalidRequest
from server.messages import SamplingParams
from server.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16


async def answer_completion(request: Request, services: Services) -> Response:
    """Answer one completions request. Raises TandemError for what must be an HTTP error."""
    return await respond(
        request,
        services,
        lambda fields: read_completion_job(fields, services),
        lambda job: CompletionFormat(services.tokenizer, job.sampling),
    )


def read_completion_job(fields: Fields, services: Services) -> Job:
    """What a completions request asks for; max_tokens defaults to 16. Raises InvalidRequest."""
    limits = services.limits
    default = min(_DEFAULT_MAX_TOKENS, limits.max_model_len)
    sampling = replace(
        read_sampling(fields, limits),
        max_tokens=read_max_tokens(fields, ("max_tokens", "max_completion_tokens"), default, limits),
        logprobs=read_num_logprobs(fields, "logprobs", limits),
    )
    n = fields.integer("n", 1, 1, MAX_CHOICES) or 1
    how, terms = read_stream(fields), read_terms(fields)
    prompts = services.prompts.read_prompts(fields)
    if len(prompts) * n > MAX_PROMPTS:
        raise InvalidRequest(f"{len(prompts)} prompts with n = {n} are over the limit of {MAX_PROMPTS} choices", "n")
    return Job(prompts=prompts, sampling=sampling, n=n, terms=terms, **how)


class CompletionFormat:
    """Writes completion texts and their chunks."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams):
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._writers: dict[int, CompletionLogprobs] = {}

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """One chunk, or none for a step without text, log-probabilities and end."""
        logprobs = self._logprobs(delta)
        if not delta.text and delta.finish_reason is None and logprobs is None:
            return []
        chunk = {"index": delta.index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        return [chunk if delta.finish_reason is None else {**chunk, "stop_reason": delta.stop_reason}]

    def choice(self, choice: Choice, deltas: list[Delta]) -> dict[str, Any]:
        """A whole text."""
        parts = [part for delta in deltas if (part := self._logprobs(delta)) is not None]
        return {
            "index": choice.index,
            "text": "".join(delta.text for delta in deltas),
            "logprobs": None if self._sampling.logprobs is None else merge_completion_logprobs(parts),
            "finish_reason": deltas[-1].finish_reason,
            "stop_reason": deltas[-1].stop_reason,
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self._sampling.logprobs is None or not delta.token_ids:
            return None
        writer = self._writers.get(delta.index)
        if writer is None:
            writer = self._writers[delta.index] = CompletionLogprobs(
                self._tokenizer, self._sampling.skip_special_tokens
            )
        return writer.render(delta)
