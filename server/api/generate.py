"""POST /generate as trainers call it (SGLang's form): texts or token ids in, tokens with log-probabilities out.

Log-probabilities are of the model itself, before temperature and filters, unless `logprobs_mode` asks for those of the
law that tokens are drawn from. Every mistake is an InvalidRequest.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from server.api.constraints import MASK_FIELDS, read_masks
from server.api.fields import Fields, known_fields, shown_json
from server.api.foreign_schemas import GENERATE_ANSWER, GENERATE_REQUEST
from server.api.generation import Choice, Delta, Generation, Job
from server.api.logprobs import finite
from server.api.no_tokenizer import NoTokenizer, check_speaks
from server.api.openapi import GENERATION_ERRORS, operation
from server.api.prompts import MAX_PROMPTS, PROMPT_FIELDS, PromptReader
from server.api.requests import check_model, generate, read_request_id, refuse_unserved
from server.api.sampling import MAX_CHOICES, SAMPLING_FIELDS, read_logprobs_mode, read_num_logprobs, read_sampling
from server.api.services import Services
from server.api.terms import TERM_FIELDS, read_salt, read_terms
from server.api.transport import encode_event
from server.errors import InvalidRequest
from server.messages import FINISH_ABORT, FINISH_LENGTH, FINISH_STOP, SamplingParams, TokenLogprobs
from server.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 128
_UNSERVED = ("input_embeds", "image_data", "video_data", "audio_data", "token_ids_logprob", "return_hidden_states")
_UNSERVED_SAMPLING = ("stop_regex", "structural_tag", "beam_width")
_REQUEST = known_fields(
    *("model", "text", "input_ids", "sampling_params", "stream", "rid", "extra_key"),
    *("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs", "logprobs_mode"),
    *PROMPT_FIELDS,
    *TERM_FIELDS,
    *_UNSERVED,
)
_SAMPLING = known_fields(
    *("max_new_tokens", "min_new_tokens", "sampling_seed", "no_stop_trim", "logprobs_mode"),
    *SAMPLING_FIELDS,
    *MASK_FIELDS,
    *_UNSERVED_SAMPLING,
)

_FLAGS = ("stream", "return_text_in_logprobs")

# (log-probability, token id, text), the first and the last of which may be None.
Score = tuple[float | None, int, str | None]


@dataclass(frozen=True, kw_only=True)
class GenerateJob(Job):
    """A job whose answer is a list unless it `is_single`. It tells log-probabilities of the prompt from token `start`
    on, with the tokens' texts if it `shows_text`."""

    is_single: bool
    start: int
    shows_text: bool

    def needs_scores(self) -> bool:
        """An aborted request tells what it has."""
        return False


def add_generate_routes(app: FastAPI, services: Services) -> None:
    """POST /generate."""

    @app.post(
        "/generate",
        **operation(request=GENERATE_REQUEST, answer=GENERATE_ANSWER, streams=True, errors=GENERATION_ERRORS),
    )
    async def generate_tokens(request: Request) -> Response:
        """Tokens and text that go on with prompts, whole or streamed."""
        return await generate(
            request,
            services,
            lambda body: read_generate_job(Fields(_REQUEST, body), services),
            lambda job, generation: GenerateAnswer(services, job, generation),
        )


def read_generate_job(fields: Fields, services: Services) -> GenerateJob:
    """What a request asks for. Raises InvalidRequest."""
    check_model(fields, services)
    refuse_unserved(fields, _UNSERVED)
    params = Fields(_SAMPLING, fields.raw("sampling_params") or b"{}", "sampling_params")
    refuse_unserved(params, _UNSERVED_SAMPLING)
    n, terms = params.integer("n", 1, 1, MAX_CHOICES) or 1, read_terms(fields)
    sampling = _read_sampling(params, services)
    num_top = read_num_logprobs(fields, "top_logprobs_num", services.limits) or 0
    start = fields.integer("logprob_start_len", -1, -1, services.limits.max_model_len) or 0
    mode = read_logprobs_mode(fields, read_logprobs_mode(params, sampling.logprobs_mode))
    sampling = replace(sampling, logprobs_mode=mode)
    if sampling.stop:
        check_speaks(services.tokenizer)
    if fields.boolean("return_logprob", False):
        sampling = replace(sampling, logprobs=num_top, prompt_logprobs=None if start < 0 else num_top)
    key, stream, shows_text = read_salt(fields, "extra_key"), *(fields.boolean(name, False) for name in _FLAGS)
    prompts, is_single = _read_prompts(fields, services.prompts.for_output(sampling.max_tokens))
    shortest = min(map(len, prompts))
    if len(prompts) * n > MAX_PROMPTS:
        raise InvalidRequest(f"{len(prompts)} prompts with n = {n} are over the limit of {MAX_PROMPTS}", "n")
    if start > shortest:
        raise InvalidRequest(
            f"logprob_start_len is {start}, the limit is the length of the prompt, {shortest}", "logprob_start_len"
        )
    return GenerateJob(
        prompts=prompts,
        sampling=sampling,
        n=n,
        # Prefixes are shared under the same salt and the same key.
        terms=replace(terms, cache_salt=f"{terms.cache_salt}\0{key}") if key else terms,
        stream=stream,
        prompt_names=_read_names(fields, len(prompts), is_single),
        is_single=is_single and n == 1,
        start=start,
        shows_text=shows_text,
    )


def _read_sampling(params: Fields, services: Services) -> SamplingParams:
    """The common fields, some of which have other names here."""
    limits, sampling = services.limits, read_sampling(params, services.limits)
    default = min(_DEFAULT_MAX_TOKENS, limits.max_model_len)
    max_tokens = params.integer("max_new_tokens", default, 0, limits.max_model_len) or 0
    return replace(
        sampling,
        max_tokens=max_tokens,
        min_tokens=params.integer("min_new_tokens", sampling.min_tokens, 0, max_tokens) or 0,
        seed=params.integer("sampling_seed", sampling.seed),
        include_stop_str_in_output=params.boolean("no_stop_trim", sampling.include_stop_str_in_output),
        **read_masks(params, services.tokenizer, limits.vocab_size),
    )


def _read_prompts(fields: Fields, reader: PromptReader) -> tuple[list[list[int]], bool]:
    """(the prompts, whether there is one and not a list of them)."""
    if fields.has("text") == fields.has("input_ids"):
        raise InvalidRequest("text and input_ids are both given or both missing; give one of them", "text")
    name = "text" if fields.has("text") else "input_ids"
    raw = fields.raw(name)
    is_list, first = raw[:1] == b"[", raw[1:].lstrip()[:1]
    is_text = raw[:1] == b'"' or (is_list and first == b'"')
    if is_text != (name == "text") or not (is_text or is_list):
        kind = "text" if name == "text" else "list of token ids"
        raise InvalidRequest(f"{name} is {shown_json(raw)}, it must be a {kind} or a list of such", name)
    return reader.read_prompts(fields, name), not is_list or first not in b'["'


def _read_names(fields: Fields, count: int, is_single: bool) -> list[str]:
    """The names of the prompts: those that `rid` lists, or made of the one that it is; none without it."""
    if fields.raw("rid")[:1] != b"[":
        name = read_request_id(fields, "rid")
        return [] if not name else [name] if is_single else [f"{name}_{i}" for i in range(count)]
    names = fields.items("rid", MAX_PROMPTS)
    if len(names) != count or not all(isinstance(name, str) and name for name in names):
        raise InvalidRequest(f"rid has {len(names)} entries, it must be a name, or {count} of them", "rid")
    return names


class _Output:
    """One choice as it is told, so far."""

    def __init__(self, name: str, choice: Choice, prompt: list[int], job: GenerateJob, tokenizer: Tokenizer):
        self._name, self._choice, self._prompt, self._job, self._tokenizer = name, choice, prompt, job, tokenizer
        self._has_text = not isinstance(tokenizer, NoTokenizer)
        self._started_at = time.perf_counter()
        self._text: list[str] = []
        self._ids: list[int] = []
        self._input: tuple[list[Score], list[Any]] = [], []  # scores of the tokens, and of their alternatives
        self._output: tuple[list[Score], list[Any]] = [], []
        self._end: dict[str, Any] | None = None

    def take(self, delta: Delta) -> None:
        """Add a delta."""
        is_scored = len(delta.prompt_logprobs) == len(self._prompt) - 1
        if not self._text and self._job.sampling.prompt_logprobs is not None and is_scored:
            of_first: Score = (None, self._prompt[0], self._text_of(self._prompt[0]))
            scores, top = self._score(self._prompt[1:], delta.prompt_logprobs)
            self._input = [of_first, *scores][self._job.start :], [None, *top][self._job.start :]
        if self._job.sampling.logprobs is not None:
            scores, top = self._score(delta.token_ids, delta.logprobs)
            self._output[0].extend(scores)
            self._output[1].extend(top)
        self._text.append(delta.text)
        self._ids += delta.token_ids
        if delta.finish_reason == FINISH_STOP:
            matched = self._ids[-1] if delta.stop_reason is None else delta.stop_reason
            self._end = {"type": FINISH_STOP, "matched": matched}
        elif delta.finish_reason == FINISH_LENGTH:
            self._end = {"type": FINISH_LENGTH, "length": len(self._ids)}
        elif delta.finish_reason is not None:
            self._end = {"type": FINISH_ABORT, "message": "the request was aborted, or its time was over"}

    def write(self) -> dict[str, Any]:
        """All of it; alternatives at the end only, since a stream repeats everything with every step."""
        choice, num_top = self._choice, self._job.sampling.logprobs
        meta: dict[str, Any] = {
            "id": self._name,
            "finish_reason": self._end,
            "prompt_tokens": len(self._prompt),
            "completion_tokens": len(self._ids),
            "cached_tokens": min(choice.num_cached, len(self._prompt)),
            "weight_version": choice.weight_version,
            "weight_versions": choice.version_spans(),
            "e2e_latency": time.perf_counter() - self._started_at,
            "spec_verify_ct": choice.num_steps,
            "spec_accept_token_num": choice.num_accepted,
            "spec_draft_token_num": choice.num_proposed,
            "spec_accept_rate": choice.num_accepted / max(1, choice.num_proposed),
            "spec_accept_length": (len(self._ids) - 1) / choice.num_steps if choice.num_steps else 1.0,
        }
        if num_top is not None:
            meta |= {"input_token_logprobs": self._input[0], "output_token_logprobs": self._output[0]}
        if num_top and self._end is not None:
            meta |= {"input_top_logprobs": self._input[1], "output_top_logprobs": self._output[1]}
        return {"text": "".join(self._text) if self._has_text else None, "output_ids": self._ids, "meta_info": meta}

    def _score(self, token_ids: list[int], entries: list[TokenLogprobs]) -> tuple[list[Score], list[Any]]:
        scores: list[Score] = []
        top: list[Any] = []
        for token_id, entry in zip(token_ids, entries, strict=True):
            best = list(zip(entry.top_logprobs, entry.top_ids, strict=True))[: self._job.sampling.logprobs]
            scores.append((finite(entry.logprob), token_id, self._text_of(token_id)))
            top.append([(finite(logprob), i, self._text_of(i)) for logprob, i in best])
        return scores, top

    def _text_of(self, token_id: int) -> str | None:
        is_told = self._job.shows_text and self._has_text
        return self._tokenizer.decode([token_id], skip_special_tokens=False) if is_told else None


class GenerateAnswer:
    """The outputs of one request."""

    def __init__(self, services: Services, job: GenerateJob, generation: Generation):
        self._services, self._job, self._generation = services, job, generation
        names = job.prompt_names or [generation.name] * len(job.prompts)
        self._outputs = [
            _Output(names[i // job.n], choice, job.prompts[i // job.n], job, services.tokenizer)
            for i, choice in enumerate(generation.choices)
        ]

    async def whole(self) -> Response:
        """An output, or a list of them."""
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                self._outputs[delta.index].take(delta)
        if self._job.takes_long_to_write(sum(choice.num_tokens for choice in self._generation.choices)):
            body = await self._services.do_apart(self._encode, self._outputs)
        else:
            body = self._encode(self._outputs)
        return Response(body, media_type="application/json")

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Each output with all that it has so far, again and again; of several each says its index."""
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                output = self._outputs[delta.index]
                output.take(delta)
                place = {} if self._job.is_single else {"index": delta.index}
                yield encode_event({**output.write(), **place})

    def _encode(self, outputs: Sequence[_Output]) -> bytes:
        written = [output.write() for output in outputs]
        return msgspec.json.encode(written[0] if self._job.is_single else written)
