"""The measured costs are a complete grid of numbers, and nothing of the measuring is left in the engine."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.backend import step_costs
from server.backend.runner import Runner, build_runner
from server.backend.step_costs import _Stopwatch, measure_costs
from server.config import EngineConfig
from server.engine import Engine
from server.messages import SamplingParams
from server.router.cost_table import CostTable
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.engines import generate, make_engine, make_prompts, run

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, max_tokens=12, ignore_eos=True, seed=5)
PENALISED = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("costs"), num_layers=4, mtp_layers=2, close_draft=True)


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """How exact the numbers are is not asked here."""
    monkeypatch.setattr(step_costs, "_SECONDS", 0.0)


def make_runner(checkpoint: Path, **settings: object) -> Runner:
    defaults = {"model": str(checkpoint), "num_threads": 1, "max_model_len": 64, "prefix_cache": "off"}
    return build_runner(EngineConfig(**defaults | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("most", "mtp_step", "batches", "widths"),
    [
        (1, 1, [1], [1, 2]),
        (2, 2, [1, 2], [1, 2, 3]),
        (4, 3, [1, 2, 4], [1, 2, 4]),
        (6, 8, [1, 2, 4, 6], [1, 2, 9]),
    ],
)
@pytest.mark.parametrize("mode", ["eagle", "vanilla"])
def test_the_grids_are_complete_and_hold_finite_seconds(
    most: int, mtp_step: int, batches: list[int], widths: list[int], mode: str, checkpoint: Path
) -> None:
    runner = make_runner(checkpoint, max_running_requests=most, mtp_step=mtp_step, mtp_mode=mode)
    verify, draft, extend, mixed = measure_costs(runner, mtp_step)
    grid = {(batch, width) for batch in batches for width in widths}
    assert set(verify) == set(extend) == grid and set(draft) == set(batches)
    for seconds in (*verify.values(), *extend.values()):
        assert 0 < seconds < 10
    assert all(0 <= seconds < 10 for seconds in draft.values())
    assert set(mixed) == {batch for batch in batches if batch > 1} and all(0 < one < 10 for one in mixed.values())
    costs = CostTable.from_samples(verify, draft, extend, mixed)
    for batch in range(1, most + 1):
        assert math.isfinite(costs.verify(batch, batch)) and costs.verify(batch, batch) > 0
        assert math.isfinite(costs.extend(batch, 2 * batch)) and costs.draft(batch) >= 0


def test_the_measured_passes_have_the_widths_and_depths_that_they_stand_for(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is the number of passes of each kind: a verify is one target call, a draft one draft call more."""
    runner = make_runner(checkpoint, max_running_requests=3, mtp_step=3, mtp_mode="eagle")
    calls: list[int] = []
    assert runner.draft is not None
    for model in (runner.target, runner.draft):
        model.register_forward_hook(lambda module, args, out: calls.append(len(getattr(args[0], "token_ids", args[0]))))
    times = iter(range(10**6))
    seen: dict[int, list[int]] = {}

    def count(watch: _Stopwatch, name: str, batch_size: int, width: int, function: Callable[[], object]) -> object:
        calls.clear()
        result = function()
        number = next(times)
        seen[number] = calls.copy()
        watch.seconds[name, batch_size, width] = float(number)
        return result

    monkeypatch.setattr(_Stopwatch, "time", count)
    verify, draft, extend, mixed = measure_costs(runner, 3)
    for (batch, width), number in verify.items():
        assert seen[int(number)] == [batch * width]
    for (batch, width), number in extend.items():
        assert seen[int(number)] == [batch * width], "one call of the draft head over the pass's rows"
    for batch, difference in draft.items():
        assert seen[int(difference + extend[batch, 4])] == [batch * 4, batch], "and one more, of a token each"
    for batch, number in mixed.items():
        half = batch // 2
        assert seen[int(number)] == [batch + half, 2 * half], "half of them with a draft, in both heads"


def test_a_bad_moment_of_the_machine_is_on_no_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes long in the warm-up, and five times as long for a while in the middle and from the end on."""
    now, sizes = 0.0, [1, 2, 4, 8, 16]
    monkeypatch.setattr(step_costs, "_SECONDS", 1.0)
    monkeypatch.setattr(step_costs.time, "perf_counter", lambda: now)

    def work(size: int) -> int:
        nonlocal now
        seconds = 1e-4 * size
        now += 100 * seconds if now < 0.3 else 5 * seconds if 0.32 < now < 0.33 or now > 0.35 else seconds
        return size

    watch, num_rounds = _Stopwatch("cpu"), 0
    for _ in watch.rounds():
        num_rounds += 1
        assert [watch.time("verify", size, 1, lambda size=size: work(size)) for size in sizes] == sizes
    assert num_rounds > 10
    assert watch.grid("verify") == {(size, 1): pytest.approx(1e-4 * size) for size in sizes}
    assert watch.grid("extend") == {}


def test_measured_rows_are_those_of_empty_sequences_again(checkpoint: Path) -> None:
    runner = make_runner(checkpoint, max_running_requests=5, mtp_step=3)
    table, gdn = runner.table, runner.table.cache.gdn
    for tensor in (gdn.state, *gdn.ring, gdn.conv_ring):
        assert (tensor[:, 1:] == 0).all()
    before = table.cache.kv.data[:, :, 1:].clone()
    measure_costs(runner, 3)
    for tensor in (gdn.state, *gdn.ring, gdn.conv_ring):
        assert (tensor[:, 1:] == 0).all()
    assert torch.equal(table.cache.kv.data[:, :, 1:], before), "only the padding page was written"
    assert (table.page_table == 0).all() and table.output_counts is None


def measured_twice(checkpoint: Path, **settings: object) -> Engine:
    engine = make_engine(checkpoint, speculation="adaptive", mtp_step=3, max_running_requests=5, **settings)
    measure_costs(engine.runner, 3)
    return engine


@pytest.mark.parametrize("params", [GREEDY, SEEDED, PENALISED])
def test_an_engine_that_has_measured_gives_the_same_messages_as_one_that_has_not(
    params: SamplingParams, checkpoint: Path
) -> None:
    """With all drafts in every step: then also what was proposed and accepted is the same, step by step."""
    prompts = make_prompts(7, 30, 256, seed=1)
    measured, fresh = measured_twice(checkpoint), make_engine(checkpoint, mtp_step=3, max_running_requests=5)
    measured.scheduler.planner.is_adaptive = False
    assert run(measured, prompts, params) == run(fresh, prompts, params)


def test_an_engine_that_plans_with_its_costs_gives_the_tokens_of_plain_decoding(checkpoint: Path) -> None:
    prompts = make_prompts(7, 30, 256, seed=2)
    engine = make_engine(checkpoint, speculation="adaptive", mtp_step=3, max_running_requests=5)
    assert generate(engine, prompts, GREEDY) == generate(make_engine(checkpoint), prompts, GREEDY)
