"""The engine without HTTP: `LLM.generate`, `LLM.stream` and `LLM.update_weights`. Needs neither FastAPI nor ZeroMQ."""

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from server import errors
from server.config import EngineConfig
from server.control import BeginUpdate, CommitUpdate, UpdateWeights, WeightSource
from server.engine import Engine
from server.errors import InvalidRequest, TandemError
from server.messages import (
    FINISH_STOP,
    Failed,
    Generate,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
    count_kept_drafts,
)
from server.tokenizer import Detokenizer, Tokenizer

__all__ = ["LLM", "Generate", "Output", "SamplingParams"]


@dataclass
class Output:
    """One prompt's result. A stop token is the last of `token_ids`; `text` is without it and cut at stop strings.

    `logprobs` has one entry per token when asked for, `prompt_logprobs` one per prompt token from the second on; a
    stream brings them with its first part. `num_steps`, `num_proposed` and `num_accepted` count verify steps, proposed
    and accepted drafts; `num_cached` prompt tokens were reused. A `finish_reason` of "abort" means that the timeout was
    over.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_steps: int = 0
    num_proposed: int = 0
    num_accepted: int = 0
    num_cached: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def accept_length(self) -> float:
        """Tokens per verify step, bonus included: (output tokens - 1) / verify steps; 1.0 before the first step."""
        return (len(self.token_ids) - 1) / self.num_steps if self.num_steps else 1.0


class LLM:
    """A checkpoint directory served in this process; the settings are the fields of `EngineConfig`.

    Raises ConfigError for a checkpoint or setting that cannot be served.
    """

    def __init__(self, **settings: Any):
        self.config = EngineConfig(**settings)
        self.engine = Engine(self.config)
        self._request_ids = itertools.count()
        self._jobs: dict[str, _Job] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, read when text is first needed."""
        return Tokenizer(self.config.model)

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008  (frozen)
        *,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
    ) -> list[Output]:
        """Complete all prompts (texts, or token ids) together; one SamplingParams for all, or one each.

        The other arguments are those of `Generate`, for each prompt. Raises InvalidRequest for what cannot be served,
        RequestTimeout for a prompt without a token in time, ModelFailure; nothing is left behind then.
        """
        if isinstance(prompts, str):
            raise InvalidRequest("prompts is a string, a list of prompts is needed")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        jobs = self._submit(prompts, each, priority, timeout, cache_salt)
        for _ in self._run(jobs):
            pass
        return [job.output for job in jobs]

    def stream(
        self,
        prompt: str | list[int],
        params: SamplingParams = SamplingParams(),  # noqa: B008
        *,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
    ) -> Iterator[Output]:
        """One Output per step with what is new in it; the last one has the finish_reason. Leaving early aborts.

        Streams may be read in turns, and `generate` called meanwhile. Arguments and errors are those of `generate`.
        """
        yield from self._run(self._submit([prompt], [params], priority, timeout, cache_salt))

    def update_weights(self, weights: str | Path | Mapping[str, Tensor], version: str | None = None) -> None:
        """Serve with other weights of the same model from now on: a checkpoint directory's or safetensors file's, or
        tensors by checkpoint name, as `version` (None: counted on). Streams go on with them.

        Raises InvalidRequest for weights that do not fit, and Conflict; the old ones serve on then.
        """
        if isinstance(weights, Mapping):
            source = WeightSource("inline", data=(safetensors.torch.save(_without_shared_memory(weights)),))
        else:
            source = WeightSource("disk", path=str(weights))
        name = f"llm-{next(self._request_ids)}"
        self.engine.control(UpdateWeights(name, source, BeginUpdate(name), CommitUpdate(name, version)))
        while not (done := self.engine.take_done()):
            if self.engine.has_work():
                self._step()
            else:
                time.sleep(self.engine.patience)
        if done[0].error:
            raise getattr(errors, done[0].kind)(done[0].error)

    def _submit(
        self,
        prompts: Sequence[str | list[int]],
        params: Sequence[SamplingParams],
        priority: int,
        timeout: float | None,
        cache_salt: str,
    ) -> "list[_Job]":
        if timeout is not None and not timeout > 0:
            raise InvalidRequest(f"timeout is {timeout}, it must be above 0 seconds", "timeout")
        if len(prompts) != len(params):
            raise InvalidRequest(f"there are {len(prompts)} prompts and {len(params)} sampling parameters", "params")
        jobs: list[_Job] = []
        with ExitStack() as failing:
            failing.callback(self._end, jobs)
            for prompt, sampling in zip(prompts, params, strict=True):
                request_id = f"llm-{next(self._request_ids)}"
                token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
                jobs.append(_Job(request_id, Detokenizer(self.tokenizer, sampling)))
                self.engine.add(Generate(request_id, token_ids, sampling, priority, timeout, cache_salt))
            failing.pop_all()
        self._jobs |= {job.request_id: job for job in jobs}
        return jobs

    def _run(self, jobs: "list[_Job]") -> Iterator[Output]:
        """Step until all these jobs have ended, yielding what each step added to them. Raises what made one fail."""
        try:
            while any(job.deltas or not job.has_ended for job in jobs):
                for job in jobs:
                    yield from job.read()
                if not all(job.has_ended for job in jobs):
                    self._step()
        finally:
            self._end(jobs)

    def _step(self) -> None:
        """One engine step; what it says goes to its job, whoever reads it, and nowhere if that is over already."""
        for message in self.engine.step():
            job = self._jobs.get(message.request_id)
            if job is None:
                continue
            if isinstance(message, Failed):
                job.error = getattr(errors, message.error)(message.message, message.param)
            else:
                job.take(message)
            if job.has_ended or job.error is not None:
                self._end([job])  # the engine still runs it if a stop string ended it

    def _end(self, jobs: "Sequence[_Job]") -> None:
        for job in jobs:
            self.engine.abort(job.request_id)
            self._jobs.pop(job.request_id, None)


def _without_shared_memory(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, as safetensors wants them, copies of those that are tied to one before."""
    storages: set[int] = set()
    apart = {}
    for name, tensor in weights.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.contiguous().clone() if storage in storages else tensor.contiguous()
        storages.add(storage)
    return apart


@dataclass
class _Job:
    """One prompt on its way: the whole output so far, the parts that nobody has read yet, and why it failed, if so."""

    request_id: str
    detokenizer: Detokenizer
    output: Output = field(default_factory=Output)
    deltas: deque[Output] = field(default_factory=deque)
    error: TandemError | None = None

    @property
    def has_ended(self) -> bool:
        """All its output is here; false for one that failed."""
        return self.output.finish_reason is not None

    def read(self) -> Iterator[Output]:
        """What nobody has read yet; then raises the error of a job that failed."""
        while self.deltas:
            yield self.deltas.popleft()
        if self.error is not None:
            raise self.error

    def take(self, message: TokenOutput) -> None:
        """Add a step's tokens, cut at the first stop string."""
        num_before = self.detokenizer.num_used
        text = self.detokenizer.push(message.token_ids, ends_with_stop_token=message.finish_reason == FINISH_STOP)
        finish_reason = message.finish_reason
        if finish_reason is not None:
            text += self.detokenizer.finish()
        if self.detokenizer.stop_match is not None:
            finish_reason = FINISH_STOP
        num_new = self.detokenizer.num_used - num_before
        num_proposed, num_accepted = self._count_drafts(message, num_new)
        delta = Output(
            token_ids=message.token_ids[:num_new],
            text=text,
            finish_reason=finish_reason,
            logprobs=message.logprobs[:num_new],
            num_steps=message.num_steps,
            num_proposed=num_proposed,
            num_accepted=num_accepted,
            num_cached=message.num_cached,
            prompt_logprobs=message.prompt_logprobs,
        )
        self.deltas.append(delta)
        self._add(delta)

    def _count_drafts(self, message: TokenOutput, num_new: int) -> tuple[int, int]:
        """(proposed, accepted) so far, without what a stop string cut off."""
        proposed, accepted = message.num_proposed, message.num_accepted
        if self.detokenizer.stop_match is None:
            return proposed, accepted
        before = self.output
        return (
            count_kept_drafts(before.num_proposed, proposed, num_new),
            count_kept_drafts(before.num_accepted, accepted, num_new),
        )

    def _add(self, delta: Output) -> None:
        output = self.output
        output.token_ids += delta.token_ids
        output.text += delta.text
        output.logprobs += delta.logprobs
        output.prompt_logprobs += delta.prompt_logprobs
        output.finish_reason = delta.finish_reason
        output.num_steps, output.num_proposed = delta.num_steps, delta.num_proposed
        output.num_accepted, output.num_cached = delta.num_accepted, delta.num_cached
