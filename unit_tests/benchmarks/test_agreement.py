"""Two runs agree where their spreads meet."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import agreement
from benchmarks.agreement import find_measured, main
from benchmarks.report import spread


def write(path: Path, results: Any, benchmark: str = "adaptive") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"benchmark": benchmark, "results": results}))
    return path


def make_rows(*ratios: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"kind": "all", "batch": batch, **spread("ratio", pair)} for batch, pair in enumerate(ratios)]


def test_a_spread_is_the_median_with_least_and_most() -> None:
    assert spread("ratio", iter([3.0, 1.0, 2.0])) == {"ratio": 2.0, "ratio_min": 1.0, "ratio_max": 3.0}


def test_every_kind_of_spread_is_found_at_any_depth() -> None:
    first = {
        "rows": [{"kind": "a", "step_ms": 2.0, "step_ms_p10": 1.0, "step_ms_p90": 3.0, "tok_s": 5.0}],
        "loads": [{"comparison": [{"metric": "ttft", "min": 1, "max": 2, "ratio_min": 0.5, "ratio_max": None}]}],
        "rounds": [4, 5],
    }
    second = json.loads(json.dumps(first).replace("1.0", "1.5")) | {"rounds": [4]}
    found = {one.name: (one.first, one.second) for one in find_measured(first, second)}
    assert found == {
        "rows[0] a: step_ms": ((1.0, 3.0), (1.5, 3.0)),
        "loads[0].comparison[0] ttft: value": ((1, 2), (1, 2)),
    }


@pytest.mark.parametrize(
    ("second", "status", "num_apart"),
    [(((1.0, 2.0), (2.0, 9.0)), 0, 0), (((0.9, 0.95), (2.0, 3.0)), 1, 1), (((3.0, 4.0), (0.1, 0.2)), 1, 2)],
)
def test_numbers_that_are_apart_are_named(
    second: tuple[tuple[float, float], ...],
    status: int,
    num_apart: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = write(tmp_path / "1.json", make_rows((1.0, 2.0), (1.0, 2.0))), tmp_path / "2.json"
    write(two, make_rows(*second))
    assert main([str(one), str(two)]) == status
    out = capsys.readouterr().out
    assert out.split()[:6] == ["numbers", "agree", "result", "2", str(2 - num_apart), "2.json"]
    assert out.count("apart: 2.json: [") == num_apart


def test_repeats_are_compared_with_the_results_of_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agreement, "RESULTS", tmp_path)
    write(tmp_path / "2026-11-26-adaptive-cpu.json", make_rows((1.0, 2.0)))
    write(tmp_path / "2026-11-25-adaptive-cpu.json", make_rows((7.0, 8.0)))
    write(tmp_path / "repeats" / "2026-11-27-adaptive-cpu.json", make_rows((1.5, 1.6)))
    assert main([]) == 0 and "2026-11-27-adaptive-cpu.json" in capsys.readouterr().out
    write(tmp_path / "repeats" / "2026-11-27-other-cpu.json", [])
    assert main([]) == 2 and "repeats of nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("results", "benchmark", "message"),
    [
        (make_rows((1.0, 2.0)) * 2, "adaptive", "1 rows in the first and 2 in the second"),
        (make_rows((1.0, 2.0)), "scaling", "is of adaptive"),
        ([{"ratio": 1.0}], "adaptive", "no number with a spread"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    results: Any, benchmark: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write(tmp_path / "1.json", make_rows((1.0, 2.0))), write(tmp_path / "2.json", results, benchmark)]
    assert main([str(path) for path in paths]) == 2 and message in capsys.readouterr().err
    (tmp_path / "2.json").write_text("{")
    assert main([str(path) for path in paths]) == 2
    with pytest.raises(SystemExit):
        main([str(paths[0])])


def test_the_repeats_of_this_project_can_be_compared() -> None:
    assert main([]) in (0, 1)
