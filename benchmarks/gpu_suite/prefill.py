"""How long new prompts take from the engine's queue to their first token, at real dimensions with dummy weights,
against the floor of the target's products."""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_suite.card import CardSpeed
from benchmarks.gpu_suite.dimensions import dimensions_of
from benchmarks.gpu_suite.roofline import Card, prefill_floor_seconds
from benchmarks.workload import draw_tokens
from server.llm import LLM, Generate, SamplingParams

# Requests, and tokens of each prompt; the last is more than one pass.
SHAPES = ((1, 128), (1, 2048), (8, 256), (4, 2048))
_ROUNDS = 5


def measure_prefill(
    llm: LLM, preset: str, batch: int, num_tokens: int, card: CardSpeed, synchronize: Callable[[], object]
) -> dict[str, Any]:
    """Median wall time of `batch` prompts of num_tokens each that come to an idle engine, draft head included."""
    rng, seconds = random.Random(num_tokens), []
    for _ in range(_ROUNDS + 1):
        prompts = [draw_tokens(rng, num_tokens, llm.engine.ready.vocab_size) for _ in range(batch)]
        synchronize()
        start = time.perf_counter()
        for index, prompt in enumerate(prompts):
            llm.engine.add(Generate(f"prefill {index}", prompt, SamplingParams(temperature=0, max_tokens=1)))
        while llm.engine.has_work():
            llm.engine.step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])  # the first may compile kernels
    lens = [num_tokens] * batch
    floor = prefill_floor_seconds(dimensions_of(preset), lens, Card(card.bandwidth, card.matmul_rate))
    return {
        "model": preset,
        "requests": batch,
        "tokens": num_tokens,
        "ms": 1e3 * median,
        "tok_s": sum(lens) / median,
        "floor_ms": 1e3 * floor,
        "share_of_floor": floor / median,
    }
