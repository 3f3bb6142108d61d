"""What several benchmarks do with an engine: serve random tokens and other prompts, all at once or always so many."""

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from server.llm import LLM, Generate, SamplingParams
from server.messages import TokenOutput

Prompt = tuple[list[int], SamplingParams]


@dataclass
class Served:
    """What one request got: seconds since all were handed over until its first and its last token, the tokens, and the
    counts of its last message."""

    first_seconds: float = 0.0
    end_seconds: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    num_steps: int = 0
    num_cached: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Speed behind the first token; needs two messages."""
        return (len(self.token_ids) - 1) / (self.end_seconds - self.first_seconds)

    def take(self, output: TokenOutput, seconds: float) -> None:
        """Add what a step gave, `seconds` after the start."""
        self.first_seconds = self.first_seconds if self.token_ids else seconds
        self.end_seconds = seconds
        self.token_ids += output.token_ids
        self.num_steps, self.num_cached = output.num_steps, output.num_cached


def serve(llm: LLM, requests: Sequence[Prompt]) -> list[Served]:
    """Hand all requests over at once and step until the engine has nothing left to do."""
    start, served = time.perf_counter(), [Served() for _ in requests]
    for index, (prompt, params) in enumerate(requests):
        llm.engine.add(Generate(str(index), prompt, params))
    while llm.engine.has_work():
        outputs = llm.engine.step()
        seconds = time.perf_counter() - start
        for output in outputs:
            assert isinstance(output, TokenOutput), output
            served[int(output.request_id)].take(output, seconds)
    return served


def serve_full(llm: LLM, requests: Iterable[Prompt], size: int, num_tokens: int) -> tuple[list[Served], float]:
    """Keep `size` requests in the engine, one that ends is replaced at once, until num_tokens have come in all: what
    each got, in the order of `requests`, and the seconds it took. Those still open are aborted."""
    served: list[Served] = []
    start, source, num_open, total = time.perf_counter(), iter(requests), 0, 0
    while total < num_tokens:
        while num_open < size:
            prompt, params = next(source)
            llm.engine.add(Generate(str(len(served)), prompt, params))
            served.append(Served())
            num_open += 1
        outputs = llm.engine.step()
        seconds = time.perf_counter() - start
        for output in outputs:
            assert isinstance(output, TokenOutput), output
            served[int(output.request_id)].take(output, seconds)
            total += len(output.token_ids)
            num_open -= output.finish_reason is not None
    elapsed = time.perf_counter() - start
    for index in range(len(served)):
        llm.engine.abort(str(index))
    while llm.engine.has_work():
        llm.engine.step()
    return served, elapsed


def accept_length(served: Sequence[Served]) -> float:
    """(Output tokens - 1) / verify steps over all of them."""
    num_steps = sum(one.num_steps for one in served)
    return sum(len(one.token_ids) - 1 for one in served) / num_steps if num_steps else 1.0


def draw_tokens(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    """Tokens that mean nothing."""
    return [rng.randrange(vocab_size) for _ in range(count)]
