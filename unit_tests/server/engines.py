"""Small engines for the tests, and what must hold after every run."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.backend.pass_result import PassResult
from server.config import EngineConfig
from server.engine import Engine
from server.messages import Generate, SamplingParams, TokenOutput
from server.request import Batch


def make_engine(checkpoint: Path, **settings: Any) -> Engine:
    """An engine in float64, where rounding (1e-16) cannot make two correct runs differ, on one thread.

    Without what depends on time: all drafts in every step, whole chunks, no prefix cache, nothing ahead of results.
    """
    defaults: dict[str, Any] = {
        "dtype": "float64",
        "max_model_len": 320,
        "num_threads": 1,
        "speculation": "fixed",
        "stream_slowdown": math.inf,
        "prefix_cache": "off",
        "overlap": "off",
    }
    return Engine(EngineConfig(model=str(checkpoint), **defaults | settings))


def watch_passes(engine: Engine) -> list[list[Batch]]:
    """The batches of every pass that the engine runs from now on."""
    passes, run_pass = list[list[Batch]](), engine._run_pass

    def watch(batches: list[Batch]) -> list[PassResult]:
        passes.append(batches)
        return run_pass(batches)

    engine._run_pass = watch  # type: ignore[method-assign]
    return passes


def make_prompts(count: int, longest: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random prompts of 1..longest tokens, most of them short."""
    rng = random.Random(seed)
    lengths = [max(1, int(longest * rng.random() ** 4)) for _ in range(count)]
    lengths[:2] = [1, longest]
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


def run(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[list[TokenOutput]]:
    """Serve all prompts at once; every request's messages in order."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    messages: dict[str, list[TokenOutput]] = {str(index): [] for index in range(len(prompts))}
    for index, (prompt, sampling) in enumerate(zip(prompts, each, strict=True)):
        engine.add(Generate(str(index), prompt, sampling))
    while engine.has_work():
        for output in engine.step():
            messages[output.request_id].append(output)
    assert_nothing_left(engine)
    return list(messages.values())


def tokens_of(messages: list[list[TokenOutput]]) -> list[list[int]]:
    """The output tokens of every request."""
    return [[token for message in one for token in message.token_ids] for one in messages]


def generate(engine: Engine, prompts: Sequence[list[int]], params: Any) -> list[list[int]]:
    """`run`, tokens only."""
    return tokens_of(run(engine, prompts, params))


def assert_nothing_left(engine: Engine) -> None:
    """No page, row or request is held; what the prefix cache keeps is accounted for."""
    scheduler = engine.scheduler
    assert not scheduler.running and not scheduler.waiting and not scheduler._by_id and not scheduler.holdings
    scheduler.cache.begin_step()  # what the last pass wrote is settled
    scheduler.cache.check([])
    assert scheduler.pages.num_free + scheduler.cache.num_cached_pages == scheduler.pages.count
    assert scheduler.rows.num_free == scheduler.rows.count
