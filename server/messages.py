"""What the api and the engine say to each other, and the sampling settings that travel with a request.

Plain dataclasses: `channel.py` encodes them with msgspec, and the offline engine uses them as they are. Knows token
ids, never text (stop strings ride along for the side that detokenises). No torch.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from server.control import Control, Done
from server.errors import InvalidRequest

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_ABORT = "abort"
GREEDY_TEMPERATURE = 1e-5

# Entries of stop_token_ids and logit_bias that the device keeps of a request.
MAX_STOP_TOKEN_IDS, MAX_BIASES = 256, 1024
# Grammars larger than this take a compiler seconds; the other two bound what is looked at for every token.
MAX_CONSTRAINT_CHARS, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS = 256 * 1024, 1024, 64
LOGPROBS_MODES = RAW_LOGPROBS, PROCESSED_LOGPROBS = ("raw_logprobs", "processed_logprobs")
CONSTRAINT_KINDS = ("json_schema", "json_object", "regex", "choice", "grammar", "structural_tag")

_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (1e-6, 1),
    "top_k": (0, 2**31),
    "min_p": (0, 1),
    "seed": (-(2**63), 2**63 - 1),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "repetition_penalty": (0.01, 100),
    "min_tokens": (0, 2**31),
    "max_tokens": (0, 2**63 - 1),
    "logprobs": (0, 2**31),
    "prompt_logprobs": (0, 2**31),
    "max_draft": (0, 2**31),
    "thinking_budget": (0, 2**31),
}


@dataclass(frozen=True)
class Constraint:
    """What an output must match, to its end.

    `text` is for kind json_schema the schema (JSON), json_object nothing, regex the pattern, choice a JSON list of
    strings, grammar EBNF or Lark, structural_tag the tag (JSON). Tokens up to and including the first `after_token_id`
    are free (the end of thinking) but for those that would end the request; None constrains from the first token on.
    `field` is the request's field that asks for it, for errors. An output may match an `alternative` (kind, text)
    instead.
    """

    kind: str
    text: str = ""
    after_token_id: int | None = None
    field: str = "constraint"
    alternative: tuple[str, str] | None = None

    def check(self) -> None:
        """Raise InvalidRequest for an unknown kind or a text that is too long to compile."""
        if self.kind not in CONSTRAINT_KINDS:
            kinds = ", ".join(CONSTRAINT_KINDS)
            raise InvalidRequest(f"{self.field} is of kind {self.kind!r}, it must be one of {kinds}", self.field)
        num_chars = max(len(self.text), len(self.alternative[1]) if self.alternative else 0)
        if num_chars > MAX_CONSTRAINT_CHARS:
            raise InvalidRequest(
                f"{self.field} has {num_chars} characters, the limit is {MAX_CONSTRAINT_CHARS}", self.field
            )


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request draws its tokens; the same settings give the same law with and without speculation.

    Order of the transforms on float32 logits: `constraint`, `allowed_token_ids` (empty: all) and `bad_words` (sequences
    of tokens whose last one may not follow the others) mask, min_tokens mask, logit_bias, repetition then frequency and
    presence penalty, temperature, min_p, top_k, top_p. A `temperature` below 1e-5 is greedy. `top_k` 0 is off.
    `logprobs` None is off, 0 reports the sampled token only, n adds the n best. With `logprobs_mode` raw_logprobs they
    are log-softmax values before every transform, with processed_logprobs behind all of them: of the logits from which
    the token is drawn, -inf for what masks and filters leave out (a greedy request: at temperature 1, without filters).
    `prompt_logprobs` asks for raw ones of the prompt's tokens, from the second on; with `max_tokens` 0 the request ends
    there, without a token. After `thinking_budget` tokens without `think_end_id` the next one is
    `think_end_id`. `max_draft` bounds the drafts per step, 0 is plain decoding, None leaves it to the server; it
    changes speed only. `seed` None draws a fresh seed; a seeded request gives the same tokens alone, in any batch and
    with any mtp_step.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    logprobs: int | None = None
    logprobs_mode: str = RAW_LOGPROBS
    prompt_logprobs: int | None = None
    max_draft: int | None = None
    constraint: Constraint | None = None
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    thinking_budget: int | None = None
    think_end_id: int | None = None

    @property
    def is_greedy(self) -> bool:
        """The best token is taken; nothing is drawn."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def wants_processed(self) -> bool:
        """Its log-probabilities are of the law that its tokens are drawn from."""
        return self.logprobs is not None and self.logprobs_mode == PROCESSED_LOGPROBS

    @property
    def is_masked(self) -> bool:
        """Which tokens may come next depends on more than the logits, and only the host knows."""
        return bool(self.constraint or self.allowed_token_ids or self.bad_words or self.thinking_budget is not None)

    def check(self, vocab_size: int) -> None:
        """Raise InvalidRequest, naming field, value and range, for what no law of sampling is defined for."""
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InvalidRequest(f"{name} is {value}, the range is {low}..{high}", name)
        if self.logprobs_mode not in LOGPROBS_MODES:
            modes = " or ".join(LOGPROBS_MODES)
            raise InvalidRequest(f"logprobs_mode is {self.logprobs_mode!r}, it must be {modes}", "logprobs_mode")
        for name, limit in (("stop_token_ids", MAX_STOP_TOKEN_IDS), ("logit_bias", MAX_BIASES)):
            if len(getattr(self, name)) > limit:
                raise InvalidRequest(f"{name} has {len(getattr(self, name))} entries, the limit is {limit}", name)
            for token_id in getattr(self, name):
                if not 0 <= token_id < vocab_size:
                    raise InvalidRequest(f"{name} has {token_id}, token ids lie in 0..{vocab_size - 1}", name)
        if not all(math.isfinite(bias) for bias in self.logit_bias.values()):
            raise InvalidRequest("logit_bias has a value that is not finite", "logit_bias")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InvalidRequest("stop must be a tuple of strings that are not empty", "stop")
        self._check_masks(vocab_size)

    def _check_masks(self, vocab_size: int) -> None:
        if self.thinking_budget is not None and self.think_end_id is None:
            raise InvalidRequest("thinking_budget is given without think_end_id", "thinking_budget")
        named = {
            "allowed_token_ids": self.allowed_token_ids,
            "bad_words": [token_id for word in self.bad_words for token_id in word],
            "think_end_id": [] if self.think_end_id is None else [self.think_end_id],
        }
        for name, token_ids in named.items():
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
                raise InvalidRequest(f"{name} has a token outside of 0..{vocab_size - 1}", name)
        longest = max(map(len, self.bad_words), default=1)
        if len(self.bad_words) > MAX_BAD_WORDS or not all(self.bad_words) or longest > MAX_BAD_WORD_TOKENS:
            raise InvalidRequest(
                f"bad_words has {len(self.bad_words)} sequences of up to {longest} tokens, the limits are "
                f"{MAX_BAD_WORDS} and 1..{MAX_BAD_WORD_TOKENS}",
                "bad_words",
            )
        if self.constraint is not None:
            self.constraint.check()


@dataclass(frozen=True)
class Generate:
    """api -> engine: a new request. `prompt_token_ids` is not empty and fits the context limit, with one token of
    output unless `max_tokens` is 0.

    A lower `priority` is served first. After `timeout` seconds the request is ended. Requests reuse each other's prefix
    only under the same `cache_salt`. If it is `told_whole`, nobody reads tokens before the last one: outputs may hold
    those of several steps.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    timeout: float | None = None
    cache_salt: str = ""
    told_whole: bool = False


@dataclass(frozen=True)
class Abort:
    """api -> engine: forget a request (client gone, or a stop string was found). Unknown ids are ignored."""

    request_id: str


class TokenLogprobs(NamedTuple):  # no dataclass: there is one per token, and so it is written without its fields' names
    """Log-probabilities at one position: its token's, and the best alternatives, best first. `rank` is one more than
    the number of tokens that were likelier."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]
    rank: int = 1


@dataclass  # not frozen: that takes four times as long to make, and there is one per request and step
class TokenOutput:
    """engine -> api: tokens that one step gave one request, or several steps one that is `told_whole`.

    `logprobs` has one entry per token, or is empty when not asked for. `finish_reason` is None until the last message
    of the request; a stop token ends `token_ids` and is named by `stop_token_id` (None for eos). The counts are running
    totals of the request: verify steps run, drafts proposed, drafts accepted; `num_cached` prompt tokens were reused,
    and `queue_seconds` passed before the request got its first row.
    Of one step's tokens all that are accepted drafts come first. Where there may be several steps, the first of them
    ended `age` seconds ago, and `drafted_steps` has the drafts proposed and accepted of each that had any.
    `prompt_logprobs`, if asked for, come with the first output, one entry per prompt token from the second on.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_token_id: int | None = None
    num_steps: int = 0
    num_proposed: int = 0
    num_accepted: int = 0
    num_cached: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    queue_seconds: float = field(default=0.0, compare=False)
    drafted_steps: list[tuple[int, int]] = field(default_factory=list)
    age: float = field(default=0.0, compare=False)


def count_kept_drafts(before: int, after: int, num_kept: int) -> int:
    """The running total of drafts when a stop string keeps the first `num_kept` tokens of the step that led from
    `before` to `after`: the step then counts like one that ends there by itself, up to its last token."""
    return before + min(num_kept, after - before)


@dataclass(frozen=True)
class Failed:
    """engine -> api: a request was refused, or has failed. `error` is the class name in `errors.py`, `param` the field
    at fault."""

    request_id: str
    error: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class EngineStats:
    """engine -> api: gauges now, and counters since start.

    `proposed_per_position[i]` and `accepted_per_position[i]` count i+1-th drafts, `requests_per_depth[d]` the requests
    of verify steps that were run on d drafts. The gains are tokens per second over plain decoding, as the planner
    expects and as it turned out; 1.0 without speculation. `cache_misses` counts admitted requests by reason;
    `num_cached_tokens` of `num_prompt_tokens` were reused. `faults` counts what self-diagnosis found, by kind.
    All outputs of a report were made by `weight_version`. The draft head's weights came with `mtp_weight_version`; it
    is `mtp_stale` where the target has changed since. `drafts_by_version` has the drafts proposed and accepted per
    position under each of the newest versions, in their order. While it `is_frozen`, the engine runs no step: it
    `is_paused`, or the memory of `released_tags`, or the weights in it, must come back first.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_free_pages: int = 0
    num_steps: int = 0
    num_verify_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_proposed: int = 0
    num_accepted: int = 0
    accepted_per_position: tuple[int, ...] = ()
    proposed_per_position: tuple[int, ...] = ()
    requests_per_depth: tuple[int, ...] = ()
    predicted_gain: float = 1.0
    measured_gain: float = 1.0
    num_cached_pages: int = 0
    num_checkpoints: int = 0
    num_free_checkpoints: int = 0
    host_cache_bytes_used: int = 0
    num_cached_tokens: int = 0
    num_cache_hits: int = 0
    cache_misses: dict[str, int] = field(default_factory=dict)
    num_evicted_pages: int = 0
    num_evicted_checkpoints: int = 0
    num_host_hits: int = 0
    num_host_refused: int = 0
    num_timeouts: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    weight_version: str = "default"
    mtp_weight_version: str = "default"
    mtp_stale: bool = False
    is_paused: bool = False
    is_frozen: bool = False
    released_tags: tuple[str, ...] = ()
    num_weight_updates: int = 0
    drafts_by_version: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """engine -> api: the model is loaded and the first request can be served. Ids in `eos_token_ids` end a request.

    What runs where (`dtype`, `device`), how much at a time, and `memory_bytes` by what takes it, are for people.
    """

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    mtp_step: int
    dtype: str = ""
    device: str = ""
    max_running_requests: int = 0
    page_size: int = 0
    num_pages: int = 0
    num_checkpoints: int = 0
    memory_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """engine -> api: everything one engine step has to say; commands that are `done` were so after the outputs."""

    outputs: list[TokenOutput]
    failed: list[Failed]
    stats: EngineStats
    done: list[Done] = field(default_factory=list)


@dataclass(frozen=True)
class Fatal:
    """engine -> api: start-up or a step failed; the engine process exits. `message` is one line for the user."""

    message: str


Request = Generate | Abort | Control
Reply = Ready | StepReport | Fatal
