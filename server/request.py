"""What router and backend both know: a request on the host, and the batch of requests of one pass. No torch."""

import secrets
from dataclasses import dataclass, field

from server.messages import FINISH_LENGTH, FINISH_STOP, Generate, SamplingParams


@dataclass(eq=False)
class Request:
    """`prompt_ids` and `output_ids` are the truth; everything on the device can be rebuilt from them.

    `num_computed` tokens are in the KV cache; `is_decoding` once the newest token is the only one that is not and waits
    on the device with its drafts. `row` is None while waiting. `max_output` is the most tokens it may emit.
    """

    id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    stop_ids: frozenset[int]
    max_output: int
    seed: int
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    is_decoding: bool = False
    row: int | None = None
    pages: list[int] = field(default_factory=list)
    num_prompt_counted: int = 0
    num_steps: int = 0
    num_proposed: int = 0
    num_accepted: int = 0

    @staticmethod
    def create(message: Generate, eos_ids: tuple[int, ...], max_model_len: int) -> "Request":
        """A waiting request; an unseeded one gets a fresh seed."""
        sampling = message.sampling
        room = max_model_len - len(message.prompt_token_ids)
        return Request(
            id=message.request_id,
            prompt_ids=message.prompt_token_ids,
            sampling=sampling,
            stop_ids=frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else eos_ids),
            max_output=room if sampling.max_tokens is None else min(room, sampling.max_tokens),
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
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
        for count, token_id in enumerate(token_ids, start=1):
            self.output_ids.append(token_id)
            if token_id in self.stop_ids:
                return token_ids[:count], FINISH_STOP
            if len(self.output_ids) >= self.max_output:
                return token_ids[:count], FINISH_LENGTH
        return token_ids, None

    def count_prompt(self) -> int:
        """Prompt tokens computed for the first time since the last call (a preempted request computes them again)."""
        num_new = max(0, min(self.num_computed, len(self.prompt_ids)) - self.num_prompt_counted)
        self.num_prompt_counted += num_new
        return num_new

    def forget_device_state(self) -> None:
        """Back to waiting: the tokens stay, the cache is gone."""
        self.row, self.pages, self.num_computed, self.is_decoding = None, [], 0, False


@dataclass(frozen=True)
class Batch:
    """Requests of one forward pass and the tokens each contributes. A verify batch runs T tokens of every request."""

    requests: list[Request]
    token_counts: list[int]
    is_verify: bool

    @property
    def ends_any_prompt(self) -> bool:
        """Some request of this pass gets a token."""
        return any(self.ends_prompt(index) for index in range(len(self.requests)))

    def ends_prompt(self, index: int) -> bool:
        """This pass gives the request's next token: a verify step, or the last chunk of a prefill."""
        request = self.requests[index]
        return self.is_verify or request.num_computed + self.token_counts[index] == request.num_known
