"""A picture where matplotlib is, one line where it is not."""

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.plot import make_lines, plot


def load(value: float | str, *speeds: float) -> dict[str, Any]:
    rows = [
        {
            "server": "a",
            "output_tok_s": speed,
            "ttft_ms": {"p50": 1.0},
            "tpot_ms": None if speed == 1.0 else {"p50": 2.0},
        }
        for speed in speeds
    ]
    return {"kind": "request_rate", "value": value, "servers": rows}


def test_without_matplotlib_there_is_one_line_and_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = plot([load(1.0, 10.0)], tmp_path / "x.png")
    assert line == "no plot: matplotlib is not installed (pip install matplotlib)"
    assert list(tmp_path.iterdir()) == []


def test_with_matplotlib_there_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "x.png"
    assert plot([load(1.0, 10.0, 12.0), load("inf", 1.0, 20.0)], path) == f"the plot is in {path}"
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert plot([], path) == "no plot: nothing was measured"


def test_a_load_that_was_broken_off_is_drawn_for_the_servers_that_had_it() -> None:
    whole, broken_off = load(1.0, 10.0, 12.0), load(2.0, 20.0)
    whole["servers"][0]["server"] = "b"
    lines = make_lines([whole, broken_off], lambda row: row["output_tok_s"])
    assert lines == {"b": [(1.0, 10.0)], "a": [(1.0, 12.0), (2.0, 20.0)]}
