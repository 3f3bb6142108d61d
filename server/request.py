"""What router and backend both know: a request on the host, and the batch of requests of one pass. No torch."""

import math
import secrets
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from server.cache_ops import CacheOp
from server.messages import FINISH_LENGTH, FINISH_STOP, Generate, SamplingParams, TokenLogprobs, TokenOutput


@dataclass(eq=False)
class Request:
    """`prompt_ids` and `output_ids` are the truth; everything on the device can be rebuilt from them.

    `num_computed` tokens are in the KV cache as far as the host has heard, or has planned for known tokens;
    `widths_in_flight` are the passes with an output it has not heard of (0: the end of a prefill). `is_decoding` once
    the newest token and its drafts live on the device. `row` is None while waiting; `epoch` counts rows it has left.
    `max_output` is the most tokens it may emit. `num_drafts` drafts wait on the device for its next verify.
    `num_cached` prompt tokens were reused when it was first admitted. In the last `num_refused` verify steps no draft
    was right. `is_plain`: it gets no drafts; `is_isolated`: it shares nothing with others. Prefill chunks end at
    `cuts`. `deadline` and `added_at` are in seconds of the scheduler's clock. `scores` are the log-probabilities of
    prompt tokens, from the second on, that its first output is to bring. Of its output the first `num_told` tokens have
    been told; the log-probabilities of the others are kept in `logprobs`, and of one that is `told_whole` in
    `drafted_steps` the drafts proposed and accepted of steps since, the first of which ended at `untold_since`.
    `matcher` knows which tokens may come next, where that depends on more than the logits.
    """

    id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    stop_ids: frozenset[int]
    max_output: int
    seed: int
    priority: int = 0
    deadline: float = math.inf
    cache_salt: str = ""
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    widths_in_flight: list[int] = field(default_factory=list)
    is_decoding: bool = False
    is_over: bool = False
    row: int | None = None
    epoch: int = 0
    num_pages_sent: int = 0
    arrival: int = 0
    speculation: Any = None
    num_drafts: int = 0
    num_behind: int = 0
    num_cached: int | None = None
    num_refused: int = 0
    is_plain: bool = False
    is_isolated: bool = False
    cuts: frozenset[int] = frozenset()
    num_prompt_counted: int = 0
    num_steps: int = 0
    num_proposed: int = 0
    num_accepted: int = 0
    added_at: float = 0.0
    queue_seconds: float = 0.0
    scores: list[TokenLogprobs] = field(default_factory=list)
    told_whole: bool = False
    num_told: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    drafted_steps: list[tuple[int, int]] = field(default_factory=list)
    untold_since: float | None = None
    matcher: Any = None

    @staticmethod
    def create(
        message: Generate, eos_ids: tuple[int, ...], max_model_len: int, deadline: float = math.inf
    ) -> "Request":
        """A waiting request; an unseeded one gets a fresh seed."""
        sampling = message.sampling
        room = max_model_len - len(message.prompt_token_ids)
        # Where a constraint lets an output end it must, or what follows would break it.
        ends_at_eos = not sampling.ignore_eos or sampling.constraint is not None
        return Request(
            id=message.request_id,
            prompt_ids=message.prompt_token_ids,
            sampling=sampling,
            stop_ids=frozenset(sampling.stop_token_ids) | frozenset(eos_ids if ends_at_eos else ()),
            max_output=room if sampling.max_tokens is None else min(room, sampling.max_tokens),
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            priority=message.priority,
            deadline=deadline,
            cache_salt=message.cache_salt,
            told_whole=message.told_whole,
        )

    @property
    def num_known(self) -> int:
        """Tokens that exist: prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    def known_ids(self, start: int, end: int) -> list[int]:
        """Tokens at positions start..end-1 of prompt and output."""
        split = len(self.prompt_ids)
        return self.prompt_ids[start:end] + self.output_ids[max(start - split, 0) : max(end - split, 0)]

    def emit(self, token_ids: list[int]) -> tuple[list[int], str | None]:
        """Append tokens up to the first one that ends the request: (tokens emitted, finish reason or None)."""
        if self.max_output == 0:
            return [], FINISH_LENGTH
        for count, token_id in enumerate(token_ids, start=1):
            self.output_ids.append(token_id)
            if token_id in self.stop_ids:
                return token_ids[:count], FINISH_STOP
            if len(self.output_ids) >= self.max_output:
                return token_ids[:count], FINISH_LENGTH
        return token_ids, None

    @property
    def wants_scores(self) -> bool:
        """The log-probabilities of its prompt are wanted and nobody has been told them: no token may be skipped."""
        return self.sampling.prompt_logprobs is not None and not self.output_ids

    def count_scored(self, start: int, end: int) -> int:
        """Of the tokens at start..end-1, how many are followed by a prompt token whose log-probability is wanted."""
        return max(0, min(end, len(self.prompt_ids) - 1) - start) if self.wants_scores else 0

    def keep_scores(self, start: int, scores: list[TokenLogprobs]) -> None:
        """Those that a chunk from position `start` on gave; what was computed before a preemption is overwritten."""
        self.scores[start : start + len(scores)] = scores

    @property
    def has_untold(self) -> bool:
        """It keeps tokens back: nobody waits for them."""
        return self.untold_since is not None

    def keep_back(self, now: float) -> None:
        """What it has just emitted is told later."""
        if self.untold_since is None:
            self.untold_since = now

    def make_output(self, finish_reason: str | None, now: float) -> TokenOutput:
        """What the request has to say now: the tokens that it has not told, and all its counts."""
        untold, self.num_told = self.output_ids[self.num_told :], len(self.output_ids)
        ended_by_request = finish_reason == FINISH_STOP and untold[-1] in self.sampling.stop_token_ids
        since, self.untold_since = self.untold_since, None
        scores, self.scores = self.scores, []
        logprobs, self.logprobs = self.logprobs, []
        drafted_steps, self.drafted_steps = self.drafted_steps, []
        return TokenOutput(
            request_id=self.id,
            token_ids=untold,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_token_id=untold[-1] if ended_by_request else None,
            num_steps=self.num_steps,
            num_proposed=self.num_proposed,
            num_accepted=self.num_accepted,
            num_cached=self.num_cached or 0,
            prompt_logprobs=scores,
            queue_seconds=self.queue_seconds,
            drafted_steps=drafted_steps,
            age=0.0 if since is None else now - since,
        )

    @property
    def longest_len(self) -> int:
        """Tokens that may be in the cache once everything planned has run."""
        return min(self.num_computed + sum(self.widths_in_flight), len(self.prompt_ids) + self.max_output)

    @property
    def surely_ends(self) -> bool:
        """What is in flight gives it its last token at the latest: every pass gives at least one."""
        return len(self.output_ids) + len(self.widths_in_flight) >= self.max_output

    def count_prompt(self) -> int:
        """Prompt tokens computed for the first time since the last call (a preempted request computes them again)."""
        num_new = max(0, min(self.num_computed, len(self.prompt_ids)) - self.num_prompt_counted)
        self.num_prompt_counted += num_new
        return num_new

    def enter_row(self, row: int, num_computed: int, now: float) -> None:
        """On a row, with that many tokens computed by others."""
        self.row, self.num_computed = row, num_computed
        if self.num_cached is None:
            self.num_cached, self.queue_seconds = num_computed, now - self.added_at

    def leave_row(self) -> None:
        """Back to waiting: the tokens stay, the cache is gone."""
        self.row, self.num_computed, self.num_pages_sent, self.num_behind, self.is_decoding = None, 0, 0, 0, False
        self.epoch += 1


@dataclass(frozen=True)
class Work:
    """One request's share of a pass, as the host knew it when the pass was planned: nothing that happens later reaches
    it.

    While the pass runs only `request.prompt_ids`, `.sampling` and `.seed` may be read, which never change. A prefill
    runs `token_ids` from position `start` on; `following_ids` are known tokens after these. A verify runs the newest
    token and num_tokens - 1 drafts, all from the device. `num_drafts` are wanted for the request's next step.
    The draft head must catch up on `num_behind` positions before the pass; of an idle work it sees nothing yet.
    Behind the first `num_scored` tokens of a prefill the log-probability of the next prompt token is wanted.
    `pages` are new in the row's page table, from index `first_page` on. A request that enters its row brings the
    `output_ids` it has, else None.
    """

    request: Request
    row: int
    num_tokens: int
    epoch: int = 0
    start: int = 0
    token_ids: tuple[int, ...] = ()
    following_ids: tuple[int, ...] = ()
    ends_prompt: bool = True
    num_drafts: int = 0
    num_behind: int = 0
    is_idle: bool = False
    num_scored: int = 0
    first_page: int = 0
    pages: tuple[int, ...] = ()
    output_ids: tuple[int, ...] | None = None

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling


@dataclass(frozen=True)
class Batch:
    """One pass: a prefill of known tokens, or a verify of guessed ones. Equal widths lie side by side."""

    works: list[Work]
    is_verify: bool

    @cached_property
    def is_idle(self) -> bool:
        """Nothing in this pass concerns the draft head."""
        return all(work.is_idle for work in self.works)

    @property
    def num_tokens(self) -> int:
        """Of all requests."""
        return sum(work.num_tokens for work in self.works)

    @property
    def decode_shape(self) -> tuple[list[int], list[int], int, int]:
        """Of a verify: rows and widths of its requests, the widest, and the most drafts that one wants."""
        widths = [work.num_tokens for work in self.works]
        return [work.row for work in self.works], widths, max(widths), max(work.num_drafts for work in self.works)

    @property
    def widths_and_depths(self) -> tuple[list[int], list[int]]:
        """Tokens that each request runs, and drafts that it wants."""
        return [work.num_tokens for work in self.works], [work.num_drafts for work in self.works]

    @property
    def catches_up(self) -> bool:
        """The draft head has missed positions and runs over them in this pass."""
        return not self.is_idle and any(work.num_behind and not work.is_idle for work in self.works)

    @cached_property
    def has_matchers(self) -> bool:
        """What some request of this pass may emit depends on more than the logits."""
        return any(work.request.matcher is not None for work in self.works)

    @cached_property
    def wants_processed(self) -> bool:
        """Some request of this pass wants log-probabilities of logits that no decode graph writes down."""
        return any(work.sampling.wants_processed for work in self.works)

    @property
    def ends_any_prompt(self) -> bool:
        """Some request of this pass gets a token."""
        return any(work.ends_prompt for work in self.works)


@dataclass(frozen=True)
class Step:
    """What the device is to do: cache operations `before` the passes, the passes, and operations `after` them.
    `is_joint`: the passes read the weights together, and take their time together."""

    before: list[CacheOp]
    batches: list[Batch]
    after: list[CacheOp]
    is_joint: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a pass gave: the target's tokens per request, of which the first accept_lens count (0 inside a prompt);
    match_lens: as many would, if the request did not end there. The log-probabilities that were asked for, which
    requests' logits were all finite, the seconds it took (of a joint step: that both passes took), and the
    log-probabilities of prompt tokens (of no request, where none of them asked)."""

    token_ids: list[list[int]]
    accept_lens: list[int]
    match_lens: list[int]
    logprobs: list[list[TokenLogprobs]]
    is_finite: list[bool]
    seconds: float
    prompt_logprobs: list[list[TokenLogprobs]] = field(default_factory=list)
