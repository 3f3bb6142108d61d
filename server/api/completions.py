"""POST /v1/completions: its fields, its chunks and its texts."""

from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request, Response

from server.api.constraints import read_masks
from server.api.fields import Fields, decode_json
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


@dataclass(frozen=True, kw_only=True)
class CompletionJob(Job):
    """A job whose answer has `num_logprobs` alternatives per token, None: nothing of them. `echoes` are the texts of
    the prompts, to be told before their continuations; none without echo."""

    num_logprobs: int | None
    echoes: list[str] = field(default_factory=list)


async def answer_completion(request: Request, services: Services) -> Response:
    """Answer one completions request. Raises TandemError for what must be an HTTP error."""
    return await respond(
        request,
        services,
        lambda fields: read_completion_job(fields, services),
        lambda job: CompletionFormat(services.tokenizer, job),
    )


def read_completion_job(fields: Fields, services: Services) -> CompletionJob:
    """What a completions request asks for; max_tokens defaults to 16, and may be 0 where the prompt is to be told or
    scored. Raises InvalidRequest."""
    limits = services.limits
    echo, num_logprobs = fields.boolean("echo", False), read_num_logprobs(fields, "logprobs", limits)
    masks = read_masks(fields, services.tokenizer, limits.vocab_size)
    sampling = replace(read_sampling(fields, limits), **masks)
    n = fields.integer("n", 1, 1, MAX_CHOICES) or 1
    how, terms = read_stream(fields), read_terms(fields)
    best_of = _read_best_of(fields, n, how["stream"])
    default = min(_DEFAULT_MAX_TOKENS, limits.max_model_len)
    least = 0 if echo or sampling.prompt_logprobs is not None else 1
    max_tokens = read_max_tokens(fields, ("max_tokens", "max_completion_tokens"), default, limits, least)
    prompts = services.prompts.for_output(max_tokens).read_prompts(fields)
    if len(prompts) * best_of > MAX_PROMPTS:
        raise InvalidRequest(
            f"{len(prompts)} prompts with {'n' if best_of == n else 'best_of'} = {best_of} are over the limit of "
            f"{MAX_PROMPTS} choices",
            "n",
        )
    return CompletionJob(
        prompts=prompts,
        sampling=_with_logprobs(replace(sampling, max_tokens=max_tokens), num_logprobs, echo, best_of > n),
        n=best_of,
        terms=terms,
        num_kept=n if best_of > n else None,
        num_logprobs=num_logprobs,
        echoes=_read_echoes(fields, prompts, services.tokenizer) if echo else [],
        **how,
    )


class CompletionFormat:
    """Writes completion texts and their chunks."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_object_name = "text_completion"
    prompt_in_choice = True
    num_reasoning_tokens = 0

    def __init__(self, tokenizer: Tokenizer, job: CompletionJob):
        self._tokenizer = tokenizer
        self._job = job
        self._writers: dict[int, _Writer] = {}

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """One chunk, or none for a step without text, log-probabilities and end."""
        text, parts = self._write(delta)
        if not text and delta.finish_reason is None and not parts:
            return []
        chunk = {
            **self.empty_chunk(delta.index),
            "text": text,
            "logprobs": merge_completion_logprobs(parts) if parts else None,
            "finish_reason": delta.finish_reason,
        }
        return [chunk if delta.finish_reason is None else {**chunk, "stop_reason": delta.stop_reason}]

    def empty_chunk(self, index: int) -> dict[str, Any]:
        """A chunk that adds nothing to the text."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": None}

    def choice(self, choice: Choice, deltas: list[Delta]) -> dict[str, Any]:
        """A whole text."""
        written = [self._write(delta) for delta in deltas]
        parts = [part for _, some in written for part in some]
        return {
            "index": choice.index,
            "text": "".join(text for text, _ in written),
            "logprobs": None if self._job.num_logprobs is None else merge_completion_logprobs(parts),
            "finish_reason": deltas[-1].finish_reason,
            "stop_reason": deltas[-1].stop_reason,
        }

    def _write(self, delta: Delta) -> tuple[str, list[dict[str, Any]]]:
        writer = self._writers.get(delta.index)
        if writer is None:
            writer = self._writers[delta.index] = _Writer(self._tokenizer, self._job, delta.index // self._job.n)
        return writer.write(delta)


class _Writer:
    """One choice: the text of its prompt, if that is wanted, then its own."""

    def __init__(self, tokenizer: Tokenizer, job: CompletionJob, prompt_index: int):
        self._echo = job.echoes[prompt_index] if job.echoes else None
        self._prompt = job.prompts[prompt_index]
        self._logprobs: CompletionLogprobs | None = None
        if job.num_logprobs is not None:
            self._logprobs = CompletionLogprobs(
                tokenizer, job.sampling.skip_special_tokens, job.num_logprobs, self._echo or "", job.tokens_as_ids
            )

    def write(self, delta: Delta) -> tuple[str, list[dict[str, Any]]]:
        """What a delta adds: text, and log-probabilities in parts."""
        text, parts = delta.text, []
        if self._echo is not None:
            text, self._echo = self._echo + text, None
            parts += [self._logprobs.render_prompt(self._prompt, delta.prompt_logprobs)] if self._logprobs else []
        if self._logprobs is not None and delta.token_ids:
            parts.append(self._logprobs.render(delta))
        return text, parts


def _read_best_of(fields: Fields, n: int, stream: bool) -> int:
    """How many choices to make of each prompt, to tell the n likeliest of them."""
    best_of = fields.integer("best_of", n, n, MAX_CHOICES) or n
    if best_of > n and stream:
        raise InvalidRequest(
            f"best_of is {best_of} with n = {n}, and which is best is known at the end only; leave stream out",
            "best_of",
        )
    return best_of


def _with_logprobs(sampling: SamplingParams, num_logprobs: int | None, echo: bool, is_ranked: bool) -> SamplingParams:
    """Log-probabilities of the output, with echo of the prompt as well; ranking needs those of the tokens alone."""
    of_prompt = sampling.prompt_logprobs
    if echo and num_logprobs is not None:
        of_prompt = max(num_logprobs, of_prompt or 0)
    return replace(
        sampling, logprobs=0 if is_ranked and num_logprobs is None else num_logprobs, prompt_logprobs=of_prompt
    )


def _read_echoes(fields: Fields, prompts: list[list[int]], tokenizer: Tokenizer) -> list[str]:
    """The prompts as texts: what the client wrote, where that is text and stays whole."""
    raw = fields.raw("prompt")
    if not fields.has("truncate_prompt_tokens"):
        if raw[:1] == b'"':
            return [decode_json("prompt", raw, str, "a string")]
        if raw[1:].lstrip()[:1] == b'"':
            return decode_json("prompt", raw, list[str], "a list of strings")
    return [tokenizer.decode(prompt, skip_special_tokens=False) for prompt in prompts]
