"""Overlap, prefix reuse in every form, the host tier, and depths that change every step change no token."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine import Engine
from server.messages import Generate, SamplingParams
from server.router.planner import SpeculationState
from server.router.prompt_pace import PromptPace
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.commands import pause
from unit_tests.server.engines import assert_nothing_left, generate, make_engine, make_prompts, watch_passes

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SEEDED = SamplingParams(temperature=1, max_tokens=20, ignore_eos=True, seed=11, presence_penalty=0.5)
MIXED = [
    GREEDY,
    replace(SEEDED, max_draft=0),
    replace(GREEDY, max_draft=1),
    SEEDED,
    replace(GREEDY, max_draft=2, frequency_penalty=0.4),
]
Conversation = tuple[list[int], SamplingParams]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("modes"), num_layers=4, close_draft=True)


@pytest.fixture(scope="module")
def moe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe-modes"), moe=True, num_layers=4, close_draft=True)


def make_conversations(count: int, seed: int) -> list[Conversation]:
    """First turns: most begin with one of three long system prompts, and some branch off in their middle."""
    rng = random.Random(seed)
    systems = [[rng.randrange(256) for _ in range(length)] for length in (100, 129, 151)]
    prompts = []
    for index in range(count):
        begin = rng.choice(systems)[: rng.choice([70, 99, 100, 151, 151])] if rng.random() < 0.8 else []
        prompts.append((begin + [rng.randrange(256) for _ in range(rng.randint(1, 40))], MIXED[index % len(MIXED)]))
    return prompts


def next_turn(conversations: Sequence[Conversation], answers: list[list[int]], seed: int) -> list[Conversation]:
    """Prompt, answer and a new message: what a chat sends next."""
    rng = random.Random(seed)
    tails = [[rng.randrange(256) for _ in range(rng.randint(1, 30))] for _ in conversations]
    return [
        (prompt + answer + tail, params)
        for (prompt, params), answer, tail in zip(conversations, answers, tails, strict=True)
    ]


def serve(engine: Engine, conversations: Sequence[Conversation]) -> list[list[int]]:
    prompts, params = zip(*conversations, strict=True)
    return generate(engine, prompts, params)


@pytest.fixture(scope="module")
def turns(checkpoint: Path) -> list[tuple[list[Conversation], list[list[int]]]]:
    """Three turns of 24 conversations, with the tokens of plain decoding."""
    engine, conversations, found = make_engine(checkpoint, max_running_requests=16), make_conversations(24, 3), []
    for turn in range(3):
        answers = serve(engine, conversations)
        found.append((conversations, answers))
        conversations = next_turn(conversations, answers, turn)
    return found


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("mtp_step", [0, 3])
def test_prompts_that_wait_for_decoding_requests_change_nothing(
    checkpoint: Path,
    turns: list[tuple[list[Conversation], list[list[int]]]],
    mtp_step: int,
    overlap: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks of any length in some of the steps; whether there is one is up to chance instead of the clock."""
    budgets, rng = [], random.Random(mtp_step)

    def draw_budget(_: PromptPace, widths: list[int], _waiting: int, most: int) -> int:
        budgets.append(rng.choice([0, 0, 1, 7, most]) if widths else most)
        return budgets[-1]

    monkeypatch.setattr(PromptPace, "budget", draw_budget)
    engine = make_engine(checkpoint, mtp_step=mtp_step, overlap=overlap, max_running_requests=5, prefix_cache="on")
    passes = watch_passes(engine)
    for conversations, answers in turns[:2]:
        assert serve(engine, conversations) == answers
    assert {0, 1, 7} < set(budgets) and (engine.scheduler.counters.num_accepted > 0) == (mtp_step > 0)
    assert sum(len(batches) > 1 for batches in passes) > 20 or engine.scheduler.limits.max_joint_tokens == 0


def use_random_depths(engine: Engine, seed: int) -> None:
    """Every request gets another depth in every step, with runs of plain decoding in between."""
    rng = random.Random(seed)

    def plan(states: Sequence[SpeculationState]) -> list[int]:
        is_plain = rng.random() < 0.3
        return [0 if is_plain else rng.randint(0, state.max_draft) for state in states]

    engine.scheduler.planner.plan = plan  # type: ignore[method-assign]


def load(checkpoint: Path, mtp_step: int, **settings: Any) -> Engine:
    """An engine with everything on, a random depth in each step and checkpoints in short prompts."""
    defaults = {"overlap": "on", "prefix_cache": "on", "max_running_requests": 12, "checkpoint_interval": 64}
    engine = make_engine(checkpoint, mtp_step=mtp_step, max_model_len=400, **defaults | settings)
    use_random_depths(engine, mtp_step)
    return engine


@pytest.mark.slow
@pytest.mark.parametrize("mtp_step", [0, 1, 2, 3, 4])
def test_cold_warm_and_continued_prompts_give_the_tokens_of_plain_decoding(
    checkpoint: Path, turns: list[tuple[list[Conversation], list[list[int]]]], mtp_step: int
) -> None:
    engine = load(checkpoint, mtp_step, chunked_prefill_size=[64, 7, 512, 33, 20][mtp_step])
    cache = engine.scheduler.cache.counters
    for conversations, answers in turns:
        num_hits = cache.num_hits
        assert serve(engine, conversations) == answers
        assert cache.num_hits > num_hits
    for conversations, answers in turns[::-1]:
        num_hits = cache.num_hits
        assert serve(engine, conversations) == answers, "warm"
        assert cache.num_hits - num_hits >= 12
    assert cache.num_cached_tokens > 3000


@pytest.mark.slow
@pytest.mark.parametrize(("mtp_step", "host_cache_bytes"), [(0, 0), (3, 0), (0, 2**30), (3, 2**30), (2, 2**20)])
def test_eviction_preemption_and_the_way_through_host_memory_change_nothing(
    checkpoint: Path, turns: list[tuple[list[Conversation], list[list[int]]]], mtp_step: int, host_cache_bytes: int
) -> None:
    engine = load(checkpoint, mtp_step, max_total_tokens=960, host_cache_bytes=host_cache_bytes, page_size=8)
    cache, counters = engine.scheduler.cache.counters, engine.scheduler.counters
    for conversations, answers in (*turns, *turns):
        assert serve(engine, conversations) == answers
    assert cache.num_evicted_pages > 100 and cache.num_evicted_checkpoints > 10 and cache.num_hits > 20
    assert counters.num_preemptions > 0
    assert (cache.num_host_hits > 0) == (host_cache_bytes > 0)
    assert engine.scheduler.cache.host_bytes_used <= host_cache_bytes


def test_a_host_entry_that_was_damaged_is_refused_and_computed_again(
    checkpoint: Path, turns: list[tuple[list[Conversation], list[list[int]]]]
) -> None:
    engine = load(checkpoint, 2, max_total_tokens=960, host_cache_bytes=2**30)
    for conversations, answers in turns:
        assert serve(engine, conversations) == answers
        with torch.inference_mode():
            for entry in engine.runner.mover.entries.values():
                entry.data[-1] ^= 1
    assert engine.scheduler.cache.counters.num_host_refused > 0


def test_nothing_computed_before_a_flush_is_reused(
    checkpoint: Path, turns: list[tuple[list[Conversation], list[list[int]]]]
) -> None:
    engine = load(checkpoint, 2, host_cache_bytes=2**30)
    conversations, answers = turns[0]
    assert serve(engine, conversations) == answers
    with_other_weights = engine.runner.target.embed_tokens.weight
    with_other_weights.copy_(with_other_weights.flip(0))
    engine.flush_cache()
    num_hits = engine.scheduler.cache.counters.num_hits
    changed = serve(engine, conversations[:1])
    assert changed != answers[:1] and engine.scheduler.cache.counters.num_hits == num_hits
    with_other_weights.copy_(with_other_weights.flip(0))
    engine.flush_cache()
    assert serve(engine, conversations) == answers


def test_a_flush_while_nothing_may_run_frees_host_memory_at_once(
    checkpoint: Path, turns: list[tuple[list[Conversation], list[list[int]]]]
) -> None:
    engine = load(checkpoint, 2, max_total_tokens=960, host_cache_bytes=2**30, overlap="off")
    for conversations, answers in turns[:2]:
        assert serve(engine, conversations) == answers
    assert engine.runner.mover.entries
    engine.control(pause("keep"))
    while not engine.take_done():
        engine.step()
    engine.flush_cache()
    assert not engine.runner.mover.entries and engine.scheduler.cache.host_bytes_used == 0


@pytest.mark.parametrize("mtp_step", [0, 3])
def test_aborts_at_any_moment_leave_the_others_tokens_and_nothing_else(
    checkpoint: Path, turns: list[tuple[list[Conversation], list[list[int]]]], mtp_step: int
) -> None:
    engine, rng = load(checkpoint, mtp_step, max_total_tokens=1600), random.Random(5)
    for conversations, answers in turns:
        tokens: dict[str, list[int]] = {str(index): [] for index in range(len(conversations))}
        doomed = []
        for index, (prompt, params) in enumerate(conversations):
            engine.add(Generate(str(index), prompt, params))
            if index % 3 == 0:
                doomed.append(f"doomed-{index}")
                engine.add(Generate(doomed[-1], prompt[: rng.randint(1, len(prompt))], params))
        while engine.has_work():
            for output in engine.step():
                tokens.get(output.request_id, []).extend(output.token_ids)  # type: ignore[union-attr]
            if doomed and rng.random() < 0.3:
                engine.abort(doomed.pop())
        assert list(tokens.values()) == answers
        assert_nothing_left(engine)


@pytest.mark.parametrize("mtp_step", [0, 2])
def test_moe_reuses_prefixes_without_a_change(moe_checkpoint: Path, mtp_step: int) -> None:
    conversations = make_conversations(20, 9)
    expected = serve(make_engine(moe_checkpoint, max_model_len=400), conversations)
    engine = load(moe_checkpoint, mtp_step)
    for _ in range(3):
        assert serve(engine, conversations) == expected
    assert engine.scheduler.cache.counters.num_hits > 20


def test_several_mtp_layers_keep_up_with_depths_that_change(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, num_layers=4, mtp_layers=3, close_draft=True)
    prompts = make_prompts(24, 130, 256, seed=2)
    expected = generate(make_engine(checkpoint), prompts, GREEDY)
    engine = load(checkpoint, 4, mtp_mode="vanilla", chunked_prefill_size=33)
    for _ in range(2):
        assert generate(engine, prompts, GREEDY) == expected
    assert engine.scheduler.counters.num_accepted > 0


def test_a_salt_keeps_requests_apart(checkpoint: Path) -> None:
    engine, prompt = load(checkpoint, 1), make_conversations(1, 1)[0][0] + list(range(100))
    cached = []
    for index, salt in enumerate(["", "", "a", "a", ""]):
        engine.add(Generate(str(index), prompt, GREEDY, cache_salt=salt))
        outputs = []
        while engine.has_work():
            outputs += engine.step()
        cached.append(outputs[-1].num_cached)  # type: ignore[union-attr]
    assert cached[0] == cached[2] == 0 and cached[1] > 60 and cached[3] > 60 and cached[4] > 60
    assert engine.scheduler.cache.counters.misses["salt"] == 1


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_adaptive_depths_and_per_request_bounds_are_honoured(
    checkpoint: Path, turns: list[tuple[list[Conversation], list[list[int]]]], overlap: str
) -> None:
    engine = make_engine(checkpoint, mtp_step=3, speculation="adaptive", overlap=overlap, max_model_len=400)
    conversations, answers = turns[0]
    outputs: dict[str, Any] = {}
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(conversations))}
    for index, (prompt, params) in enumerate(conversations):
        engine.add(Generate(str(index), prompt, params))
    while engine.has_work():
        for output in engine.step():
            outputs[output.request_id] = output
            tokens[output.request_id] += output.token_ids  # type: ignore[union-attr]
    assert list(tokens.values()) == answers
    for index, (_, params) in enumerate(conversations):
        output = outputs[str(index)]
        if params.max_draft is not None:
            assert output.num_proposed <= params.max_draft * output.num_steps
