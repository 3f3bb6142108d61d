"""POST /inference/v1/generate, vLLM's form for trainers: token ids in, token ids out, settings in an object of their
own."""

from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request, Response

from server.api.constraints import MASK_FIELDS, read_masks
from server.api.envelope import Envelope
from server.api.fields import Fields, known_fields, shown_json
from server.api.foreign_schemas import TOKENS_ANSWER, TOKENS_REQUEST
from server.api.generation import Choice, Delta, Job
from server.api.logprobs import chat_logprobs
from server.api.no_tokenizer import NoTokenizer, check_speaks
from server.api.openapi import GENERATION_ERRORS, operation
from server.api.prompts import PROMPT_FIELDS
from server.api.requests import ANSWER_FIELDS, check_model, generate, read_stream
from server.api.sampling import (
    MAX_CHOICES,
    SAMPLING_FIELDS,
    read_logprobs_mode,
    read_max_tokens,
    read_num_logprobs,
    read_sampling,
)
from server.api.services import Services
from server.api.terms import TERM_FIELDS, read_terms
from server.errors import InvalidRequest
from server.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16
_REQUEST = known_fields(
    *("token_ids", "sampling_params", "prompt_logprobs", "logprobs_mode"),
    *ANSWER_FIELDS,
    *PROMPT_FIELDS,
    *TERM_FIELDS,
)
_SAMPLING = known_fields("logprobs_mode", *SAMPLING_FIELDS, *MASK_FIELDS)


def add_token_routes(app: FastAPI, services: Services) -> None:
    """POST /inference/v1/generate."""

    @app.post(
        "/inference/v1/generate",
        **operation(request=TOKENS_REQUEST, answer=TOKENS_ANSWER, streams=True, errors=GENERATION_ERRORS),
    )
    async def generate_ids(request: Request) -> Response:
        """Tokens that go on with a prompt's, whole or streamed."""
        return await generate(
            request,
            services,
            lambda body: read_tokens_job(Fields(_REQUEST, body), services),
            lambda job, generation: Envelope(
                services, TokensFormat(services.tokenizer, job), generation, job, generation.name
            ),
        )


def read_tokens_job(fields: Fields, services: Services) -> Job:
    """What a request asks for. Raises InvalidRequest."""
    check_model(fields, services)
    params, limits = Fields(_SAMPLING, fields.raw("sampling_params") or b"{}", "sampling_params"), services.limits
    default = min(_DEFAULT_MAX_TOKENS, limits.max_model_len)
    mode = read_logprobs_mode(fields, read_logprobs_mode(params, limits.defaults.logprobs_mode))
    sampling = replace(
        read_sampling(params, limits),
        logprobs_mode=mode,
        max_tokens=read_max_tokens(params, ("max_tokens",), default, limits),
        logprobs=read_num_logprobs(params, "logprobs", limits),
        **read_masks(params, services.tokenizer, limits.vocab_size),
    )
    if sampling.stop:
        check_speaks(services.tokenizer)
    how = {**read_stream(fields), "return_token_ids": True, "return_versions": True}
    how["num_prompt_logprobs"] = sampling.prompt_logprobs
    n, terms, raw = params.integer("n", 1, 1, MAX_CHOICES) or 1, read_terms(fields), fields.raw("token_ids")
    if raw[:1] != b"[" or raw[1:].lstrip()[:1] in b'["':
        raise InvalidRequest(f"token_ids is {shown_json(raw)}, it must be a list of token ids", "token_ids")
    prompts = services.prompts.for_output(sampling.max_tokens).read_prompts(fields, "token_ids")
    return Job(prompts=prompts, sampling=sampling, n=n, terms=terms, **how)


class TokensFormat:
    """Writes choices whose tokens, which stand beside them, are all that is told."""

    id_prefix = ""
    object_name = "generate"
    chunk_object_name = "generate.chunk"
    prompt_in_choice = False
    num_reasoning_tokens = 0

    def __init__(self, tokenizer: Tokenizer, job: Job):
        self._tokenizer, self._num_top = tokenizer, job.sampling.logprobs
        self._names_ids = job.tokens_as_ids or isinstance(tokenizer, NoTokenizer)

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """One chunk."""
        return [{**self.empty_chunk(delta.index), **self._describe([delta])}]

    def empty_chunk(self, index: int) -> dict[str, Any]:
        """A chunk without tokens."""
        return {"index": index, "logprobs": None, "finish_reason": None}

    def choice(self, choice: Choice, deltas: list[Delta]) -> dict[str, Any]:
        """A whole choice."""
        return {"index": choice.index, **self._describe(deltas)}

    def _describe(self, deltas: list[Delta]) -> dict[str, Any]:
        scores = None
        if self._num_top is not None:
            scores = {"content": [entry for delta in deltas for entry in self._score(delta, self._num_top)]}
        last = deltas[-1]
        return {"logprobs": scores, "finish_reason": last.finish_reason, "stop_reason": last.stop_reason}

    def _score(self, delta: Delta, num_top: int) -> list[dict[str, Any]]:
        """The chat form of log-probabilities, with the id of each token."""
        entries = chat_logprobs(self._tokenizer, delta, num_top, self._names_ids)["content"]
        return [{"token_id": token_id, **entry} for token_id, entry in zip(delta.token_ids, entries, strict=True)]
