"""What a recipe bounds stays bounded: requests that run at once, and the bytes of weights and caches."""

from pathlib import Path

import pytest

from server.engine import Engine
from server.messages import Generate, SamplingParams, TokenOutput
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.engines import assert_nothing_left, generate, make_engine, make_prompts

LIMIT = 4
PROMPTS = make_prompts(10 * LIMIT, 40, 256, seed=9)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("admission"), num_layers=4, close_draft=True)


def run_overloaded(engine: Engine) -> tuple[list[list[int]], list[int]]:
    """All prompts at once: every request's tokens, and how many requests ran after each step."""
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    ends, num_running = set(), []
    for index, prompt in enumerate(PROMPTS):
        engine.add(Generate(str(index), prompt, GREEDY))
    while engine.has_work():
        for output in engine.step():
            assert isinstance(output, TokenOutput)
            tokens[int(output.request_id)] += output.token_ids
            ends |= {output.request_id} if output.finish_reason == "length" else set()
        stats = engine.stats()
        num_running.append(stats.num_running)
        assert stats.num_running + stats.num_waiting + len(ends) == len(PROMPTS), "a request is nowhere"
    assert_nothing_left(engine)
    assert len(ends) == len(PROMPTS)
    return tokens, num_running


@pytest.mark.parametrize("mtp_step", [0, 3])
def test_ten_times_as_many_requests_as_may_run_all_end_and_never_more_run(checkpoint: Path, mtp_step: int) -> None:
    tokens, num_running = run_overloaded(make_engine(checkpoint, mtp_step=mtp_step, max_running_requests=LIMIT))
    assert max(num_running) == LIMIT
    assert tokens == generate(make_engine(checkpoint, max_running_requests=len(PROMPTS)), PROMPTS, GREEDY)


def test_requests_that_outgrow_the_pages_wait_and_none_is_lost(checkpoint: Path) -> None:
    settings = {"mtp_step": 3, "max_running_requests": LIMIT, "page_size": 4, "max_model_len": 64}
    engine = make_engine(checkpoint, max_total_tokens=80, **settings)
    tokens, num_running = run_overloaded(engine)
    assert max(num_running) <= LIMIT and engine.stats().num_preemptions > 0
    assert tokens == generate(make_engine(checkpoint, max_running_requests=len(PROMPTS)), PROMPTS, GREEDY)


@pytest.mark.parametrize("prefix_cache", ["on", "off"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_weights_and_caches_stay_within_the_share_of_the_machines_memory(
    checkpoint: Path, share: float, prefix_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes = 24 * MIB
    monkeypatch.setattr("server.backend.runner.free_memory", lambda device: free_bytes)
    engine = make_engine(
        checkpoint, mtp_step=3, mem_fraction_static=share, prefix_cache=prefix_cache, chunked_prefill_size=64
    )
    runner = engine.runner
    assert runner.draft is not None and runner.table.cache.history is not None
    cache, checkpoints, history = runner.table.cache, runner.mover.checkpoints, runner.table.cache.history
    held = [*runner.target.parameters(), *runner.draft.parameters(), cache.kv.data, cache.gdn.state, *cache.gdn.ring]
    held += [cache.gdn.conv_ring, checkpoints.state, checkpoints.conv_window, history.hidden, history.token_ids]
    num_bytes = sum(tensor.nbytes for tensor in held) + runner.plan.sizes.workspace
    assert num_bytes == runner.plan.num_bytes <= share * free_bytes
    tokens, num_running = run_overloaded(engine)
    assert max(num_running) == min(len(PROMPTS), runner.plan.limits.max_running_requests)
    assert sum(map(len, tokens)) == len(PROMPTS) * GREEDY.max_tokens  # type: ignore[operator]
