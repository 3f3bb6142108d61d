"""Peers run in the same rounds; the share of hidden work is that of the spans."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest

from benchmarks.static_throughput import comparisons
from benchmarks.static_throughput.comparisons import (
    TransformersBench,
    compare_baseline,
    compare_overlap,
    compare_transformers,
    hidden_share,
    trace_steps,
)
from benchmarks.static_throughput.decode import Cell, DecodeBench
from benchmarks.static_throughput.presets import Preset
from benchmarks.versions import HERE

SETTINGS = {"num_threads": 1}
CELL = Cell(2, 24)


def span(track: str, name: str, start: float, seconds: float) -> dict[str, object]:
    return {"tid": track, "name": name, "ts": start, "dur": seconds}


def test_hidden_share_counts_planning_and_booking_inside_steps() -> None:
    events = [
        span("device", "step", 0, 10),
        span("device", "verify", 0, 100),
        span("host", "schedule", 8, 4),
        span("host", "collect", 1, 2),
        span("host", "wait", 0, 50),
    ]
    assert hidden_share(events) == pytest.approx(4 / 6)


def test_a_trace_is_written_with_its_share(nano: Preset, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    share = trace_steps(nano, CELL, 1, path, 6, SETTINGS)
    assert 0 <= share <= 1
    assert {event["name"] for event in json.loads(path.read_text())["traceEvents"]} >= {"step", "schedule", "collect"}


def test_overlap_is_compared_at_each_mtp_step(nano: Preset) -> None:
    rows = compare_overlap(nano, CELL, [0, 1], 3, 1, SETTINGS)
    assert [row["mtp_step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["on_over_off"] == pytest.approx(row["overlap_on_tok_s"] / row["overlap_off_tok_s"])


def test_no_more_than_two_engines_are_held_at_a_time(nano: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[DecodeBench] = weakref.WeakSet()
    counts = []

    class Counted(DecodeBench):
        def __init__(self, *args: Any, **settings: Any):
            super().__init__(*args, **settings)
            alive.add(self)
            counts.append(len(alive))

    monkeypatch.setattr(comparisons, "DecodeBench", Counted)
    compare_overlap(nano, CELL, [0, 1], 2, 1, SETTINGS)
    assert counts == [1, 2, 1, 2]


@pytest.mark.slow
def test_transformers_runs_the_same_checkpoint(nano: Preset) -> None:
    assert len(TransformersBench(nano, CELL).measure(3)) == 3
    row = compare_transformers(nano, CELL, 3, 1, SETTINGS)
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert row["tandem_tok_s"] == pytest.approx(2e3 / row["tandem_step_ms"])


@pytest.mark.slow
def test_another_checkout_takes_turns_with_this_one(nano: Preset) -> None:
    (row,) = compare_baseline(nano, CELL, [1], HERE, 3, 2, SETTINGS)
    assert (row["batch"], row["context"], row["mtp_step"]) == (2, 24, 1)
    assert 0 < row["new_over_old_min"] <= row["new_over_old"] <= row["new_over_old_max"]
