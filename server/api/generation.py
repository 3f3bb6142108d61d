"""The life of one HTTP request's choices: tokens in, text deltas out, usage and metrics on the way.

A choice is one continuation of one prompt; prompt p and continuation i of n have index p * n + i. Both endpoints use
it. Knows neither JSON shapes nor HTTP.
"""

import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from server.api.engine_client import EngineClient
from server.api.metrics import Metrics, RequestClock
from server.api.sampling import choice_sampling
from server.api.terms import Terms
from server.errors import Conflict
from server.messages import (
    FINISH_ABORT,
    FINISH_STOP,
    Generate,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
    count_kept_drafts,
)
from server.tokenizer import Detokenizer, Tokenizer

# Log-probabilities, with the likeliest beside each, that are written in some milliseconds.
MANY_SCORES = 256


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a request asks for: `n` choices for each prompt, on which terms, and how to send them.

    Of the choices of a prompt the `num_kept` with the highest log-probability per token are told, None: all. With
    `return_token_ids` the answer has the ids of prompts and outputs, with `return_spec` where each token came from.
    With `return_versions` each choice tells which of its tokens were made by which weights.
    `tokens_as_ids` spells tokens as ids where they stand beside log-probabilities. `num_prompt_logprobs` alternatives
    are told for each prompt token, None: nothing. `request_id` is the client's own name for the request, and
    `prompt_names` are those for its prompts, where each has one.
    """

    prompts: list[list[int]]
    sampling: SamplingParams
    n: int
    terms: Terms
    stream: bool
    include_usage: bool = False
    continuous_usage: bool = False
    num_kept: int | None = None
    return_token_ids: bool = False
    return_spec: bool = False
    return_versions: bool = False
    tokens_as_ids: bool = False
    num_prompt_logprobs: int | None = None
    request_id: str = ""
    prompt_names: list[str] = field(default_factory=list)

    def takes_long_to_write(self, num_tokens: int) -> bool:
        """Whether an answer of so many tokens has so many log-probabilities that others should not wait for it."""
        num_scores = num_tokens if self.sampling.logprobs is not None else 0
        if self.sampling.prompt_logprobs is not None:
            num_scores += sum(map(len, self.prompts))
        return num_scores > MANY_SCORES

    def watch(self) -> Callable[[str], bool] | None:
        """For one choice: what is told its text, token by token, and says whether that is all that counts. None where
        only the model and the sampling settings end it."""
        return None

    def needs_scores(self) -> bool:
        """Whether the prompt's log-probabilities, where they are asked for, cannot be left out when the request is
        aborted before there are any."""
        return True


@dataclass(frozen=True)
class StepSpec:
    """Of a step, or of several: drafts `proposed` and `accepted`, and one letter per token for where it came from, p:
    prefill, d: an accepted draft, t: the target's own."""

    accepted: int = 0
    proposed: int = 0
    origins: str = ""


@dataclass(frozen=True)
class Delta:
    """What one step added to a choice. `finish_reason` ends it; `stop_reason` is the stop string or token id. The first
    one has the prompt's log-probabilities, from its second token on, if they were asked for."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None
    stop_reason: str | int | None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    spec: StepSpec = StepSpec()


class Choice:
    """One continuation: turns the engine's outputs into deltas and cuts them at stop strings, or where its text
    `is_complete` (see `Job.watch`)."""

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        clock: RequestClock,
        is_complete: Callable[[str], bool] | None = None,
    ):
        self._detokenizer = detokenizer
        self._is_complete = is_complete
        self.clock = clock
        self.index = index
        self.num_accepted = 0
        self.num_proposed = 0
        self.num_cached = 0
        self.num_steps = 0
        self.drafted_steps: list[tuple[int, int]] = []  # drafts proposed and accepted, of steps that had any
        self.finish_reason: str | None = None
        self.weight_version: str | None = None  # of the newest tokens
        self._versions: list[tuple[str, int]] = []  # with the number of tokens before it

    @property
    def num_tokens(self) -> int:
        """Output tokens so far, a stop token included."""
        return self._detokenizer.num_used

    def begin_version(self, weight_version: str) -> None:
        """What comes next was made by these weights."""
        self.weight_version = weight_version
        self._versions.append((weight_version, self.num_tokens))

    def version_spans(self) -> list[dict[str, Any]]:
        """Which tokens so far were made by which weights: {version, start, end} in their order, end not included."""
        spans: list[dict[str, Any]] = []
        ends = [start for _, start in self._versions[1:]] + [self.num_tokens]
        for (version, start), end in zip(self._versions, ends, strict=False):
            if spans and spans[-1]["version"] == version:
                spans[-1]["end"] = end
            elif end > start:
                spans.append({"version": version, "start": start, "end": end})
        return spans

    def take(self, output: TokenOutput) -> Delta:
        """The delta of one output. A stop string ends the choice even where the engine would go on."""
        detokenizer, num_before = self._detokenizer, self.num_tokens
        text, is_complete = self._push(output)
        if output.finish_reason is not None and not is_complete:
            text += detokenizer.finish()
        matched = detokenizer.stop_match
        was_cut = is_complete or matched is not None
        self.finish_reason = FINISH_STOP if was_cut else output.finish_reason
        num_new = self.num_tokens - num_before
        self.clock.count_tokens(num_new, output.queue_seconds, output.num_steps - self.num_steps, output.age)
        spec = self._count(output, num_new, was_cut)
        if self.finish_reason is not None:
            self.clock.end(self.finish_reason)
        stop_reason = matched if was_cut else output.stop_token_id
        return Delta(
            self.index,
            text,
            output.token_ids[:num_new],
            output.logprobs[:num_new],
            self.finish_reason,
            stop_reason,
            output.prompt_logprobs,
            spec,
        )

    def _push(self, output: TokenOutput) -> tuple[str, bool]:
        """(the text of an output, whether it has made the choice complete: then its other tokens are left out)."""
        detokenizer, ends = self._detokenizer, output.finish_reason == FINISH_STOP
        if self._is_complete is None:
            return detokenizer.push(output.token_ids, ends), False
        texts = []
        for count, token_id in enumerate(output.token_ids, start=1):
            texts.append(detokenizer.push([token_id], ends and count == len(output.token_ids)))
            if self._is_complete(texts[-1]) and detokenizer.stop_match is None:
                return "".join(texts), True
        return "".join(texts), False

    def _count(self, output: TokenOutput, num_new: int, was_cut: bool) -> StepSpec:
        num_accepted, num_proposed = output.num_accepted, output.num_proposed
        if was_cut:
            num_accepted = count_kept_drafts(self.num_accepted, num_accepted, num_new)
            num_proposed = count_kept_drafts(self.num_proposed, num_proposed, num_new)
        accepted, proposed = num_accepted - self.num_accepted, num_proposed - self.num_proposed
        is_verify = output.num_steps > self.num_steps
        origins = "d" * accepted + "t" * (num_new - accepted) if is_verify else "p" * num_new
        self.num_accepted, self.num_proposed, self.num_cached = num_accepted, num_proposed, output.num_cached
        self.num_steps = output.num_steps
        self.drafted_steps += output.drafted_steps or ([(proposed, accepted)] if proposed else [])
        return StepSpec(accepted, proposed, origins)

    def close(self) -> None:
        """The request is over; a choice without a finish reason was aborted."""
        if self.finish_reason is None:
            self.clock.end(FINISH_ABORT)


class Generation:
    """All choices of one HTTP request, which is called `name` when it is to be aborted."""

    def __init__(self, job: Job, tokenizer: Tokenizer, client: EngineClient, metrics: Metrics, name: str = ""):
        self.job = job
        self.name = name
        self._client = client
        self._prefix = uuid.uuid4().hex
        metrics.params_n.observe(job.n)
        detokenizers = (Detokenizer(tokenizer, job.sampling) for _ in range(len(job.prompts) * job.n))
        self.choices = [
            Choice(
                index,
                detokenizer,
                metrics.start_request(len(job.prompts[index // job.n]), job.sampling),
                job.watch(),
            )
            for index, detokenizer in enumerate(detokenizers)
        ]

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Everything that is generated, the choices mixed. Closing it early aborts what still runs.

        Raises what `EngineClient.submit` raises, and the error of a choice that the engine refuses, that it does not
        come to in time or that fails: one choice takes the others along.
        """
        with self._client.submit(self._requests(), self._names()) as outputs:
            try:
                async for output in outputs:
                    choice = self.choices[int(output.request_id.rpartition("-")[2])]
                    if output.finish_reason == FINISH_ABORT and self._lacks_scores(choice):
                        raise Conflict("the request was aborted before its prompt was scored; send it again")
                    if choice.weight_version is not outputs.weight_version:
                        choice.begin_version(outputs.weight_version)
                    delta = choice.take(output)
                    if delta.finish_reason is not None and output.finish_reason is None:
                        outputs.abort(output.request_id)
                    yield delta
            finally:
                for choice in self.choices:
                    choice.close()

    def end(self) -> None:
        """End what still runs; the deltas say so."""
        self._client.end(self._id(choice.index) for choice in self.choices)

    def _lacks_scores(self, choice: Choice) -> bool:
        """Whether the scores of the prompt, which come with the first token, were asked for and have not come."""
        is_asked = self.job.sampling.prompt_logprobs is not None and self.job.needs_scores()
        return is_asked and choice.num_tokens == 0

    def usage(self) -> dict[str, object]:
        """OpenAI's usage object so far: each prompt counts once, the choices add up."""
        num_prompt = sum(map(len, self.job.prompts))
        num_output = sum(choice.num_tokens for choice in self.choices)
        num_accepted = sum(choice.num_accepted for choice in self.choices)
        num_proposed = sum(choice.num_proposed for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": self._count_cached()},
            "completion_tokens_details": {
                "accepted_prediction_tokens": num_accepted,
                "rejected_prediction_tokens": num_proposed - num_accepted,
            },
        }

    def _count_cached(self) -> int:
        """Reused tokens of the prompts, each as its first choice found it: the others find what that one computed."""
        firsts = self.choices[:: self.job.n]
        return sum(min(c.num_cached, len(prompt)) for c, prompt in zip(firsts, self.job.prompts, strict=True))

    def _id(self, index: int) -> str:
        return f"{self._prefix}-{index}"

    def _requests(self) -> list[Generate]:
        terms = self.job.terms
        samplings = [choice_sampling(self.job.sampling, index) for index in range(self.job.n)]
        # A text that may end an answer must be seen as it comes.
        is_watched = self.job.sampling.stop or self.job.return_spec or self.job.watch() is not None
        told_whole = not (self.job.stream or is_watched)
        return [
            Generate(
                self._id(p * self.job.n + i),
                prompt,
                sampling,
                priority=terms.priority,
                timeout=terms.timeout,
                cache_salt=terms.cache_salt,
                told_whole=told_whole,
            )
            for p, prompt in enumerate(self.job.prompts)
            for i, sampling in enumerate(samplings)
        ]

    def _names(self) -> list[str]:
        """A name for each of the requests."""
        names = self.job.prompt_names or [self.name] * len(self.job.prompts)
        return [name for name in names for _ in range(self.job.n)]
