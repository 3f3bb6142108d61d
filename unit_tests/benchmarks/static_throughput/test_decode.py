"""Decode steps of real engines: contexts, forced lengths and bytes are what the rows say."""

from typing import Any

import pytest
import torch

from benchmarks.gpu_suite.roofline import Workload, floor_bytes
from benchmarks.static_throughput.acceptance import REAL, Acceptance
from benchmarks.static_throughput.decode import Cell, DecodeBench, measure_cell, pick, room_of
from benchmarks.static_throughput.machine import BandwidthProbe
from benchmarks.static_throughput.presets import Preset, open_preset

SETTINGS = {"num_threads": 1}


def make_bench(preset: Preset, mtp_step: int, batch: int = 2, longest: int = 120, **settings: Any) -> DecodeBench:
    return DecodeBench(preset, mtp_step, batch, longest, **(SETTINGS | settings))


def stand(bench: DecodeBench) -> list[int]:
    """Tokens in the cache of each request, on the device."""
    rows = [request.row for request in bench.engine.scheduler.running]
    return bench.engine.runner.table.seq_len[rows].tolist()


def test_requests_of_random_weights_stand_at_the_context_without_computing_it(nano: Preset) -> None:
    bench = make_bench(nano, 1)
    bench.start(Cell(2, 50))
    target = bench.engine.runner.target
    assert stand(bench) == [50, 50] and type(target).__name__ == "Qwen35"
    gdn = bench.engine.runner.table.cache.gdn
    rows = [request.row for request in bench.engine.scheduler.running]
    assert all(0.05 < gdn.state[:, row].std() < 0.2 for row in rows)
    bench.start(Cell(1, 30))
    assert stand(bench) == [30]
    bench.stop()
    assert not bench.engine.has_work()


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_forced_lengths_are_what_steps_emit_and_commit(nano: Preset, overlap: str) -> None:
    bench = make_bench(nano, 3, overlap=overlap)
    bench.start(Cell(2, 40))
    bench.measure(2)
    bench.engine.drain()
    before = stand(bench)
    lens = [torch.tensor([4, 1]), torch.tensor([2, 3]), torch.tensor([1, 4])]
    samples = bench.measure(3, lens)
    bench.engine.drain()
    assert [now - then for now, then in zip(stand(bench), before, strict=True)] == [7, 8]
    if overlap == "off":
        assert [sample.num_tokens for sample in samples] == [5, 5, 5]
        assert all(0 < sample.draft_seconds < sample.seconds for sample in samples)


def test_a_limit_of_drafts_makes_narrower_steps(nano: Preset) -> None:
    bench = make_bench(nano, 3)
    widths = []
    sample = bench.engine.runner.sampler.sample

    def watched(logits: torch.Tensor, *rest: Any) -> Any:
        widths.append(len(logits))
        return sample(logits, *rest)

    bench.engine.runner.sampler.sample = watched  # type: ignore[method-assign]
    for max_draft, width in ((0, 1), (2, 3), (None, 4)):
        bench.measure_at(Cell(1, 30, max_draft), 2)
        assert widths[-1] == width


def test_the_demo_really_accepts_and_has_prompts_of_the_length() -> None:
    with open_preset("demo", 1, "cpu") as preset:
        bench = make_bench(preset, 3, batch=1, longest=64 + room_of(12, 3))
        samples = bench.measure_at(Cell(1, 64), 12)
        assert sum(sample.num_tokens for sample in samples) > 18
        assert bench.engine.scheduler.running[0].prompt_ids[-1] == bench.llm.tokenizer.encode("Answer:")[-1]
        assert len(bench.engine.scheduler.running[0].prompt_ids) == 64


def test_a_cell_has_a_row_per_mtp_step_and_acceptance(nano: Preset) -> None:
    acceptances = [Acceptance("0", rate=0.0), Acceptance("1", rate=1.0)]
    probe = BandwidthProbe("cpu", 2**20)
    rows = measure_cell(nano, Cell(2, 40), [0, 3], acceptances, probe, 3, 2, SETTINGS)
    assert [(row["mtp_step"], row["acceptance"], row["accept_len"]) for row in rows] == [
        (0, "-", 1.0),
        (3, "0", 1.0),
        (3, "1", 4.0),
    ]
    plain = rows[0]
    assert plain["gain"] == plain["verify_ratio"] == 1.0 and plain["draft_ms"] == 0
    for row in rows:
        assert row["step_ms_p10"] <= row["step_ms"] <= row["step_ms_p90"]
        assert row["itl_ms"] == pytest.approx(2e3 / row["tok_s"])
        seconds = row["step_ms"] / 1e3
        assert row["bandwidth_share"] == pytest.approx(row["mib_per_step"] * 2**20 / seconds / probe.bytes_per_second)
    assert pick(rows, "batch")[0] == {"batch": 2}


def test_bytes_of_a_step_are_those_of_the_roofline_in_the_engines_dtype(nano: Preset) -> None:
    bench = make_bench(nano, 1)
    num_bytes = bench.count_bytes(Cell(2, 40), 1.5)
    exact = floor_bytes(nano.dimensions, Workload(2, 1, 40, 0.5, element=4, weight_element=4.0))
    assert num_bytes == pytest.approx(exact, rel=0.01)
    assert REAL.draw(1, 1, 1) is None


def test_bytes_count_the_tokens_that_a_step_emitted(nano: Preset) -> None:
    bench, cell = make_bench(nano, 3), Cell(2, 40)
    plain, half = (floor_bytes(nano.dimensions, Workload(2, 3, 40, rate)) for rate in (0.0, 0.5))
    # Each draft right with a half: 1.875 tokens. Rings alone, in float32, depend on them.
    assert bench.count_bytes(cell, 1.875) - bench.count_bytes(cell, 1.0) == pytest.approx(half - plain)
