"""Tables, the JSON object, and the page of what lies in benchmarks/results."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.report import RESULTS, main, percentile, print_json, print_table


def test_columns_are_those_of_the_first_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"name": "a", "value": 1.234}, {"name": "b", "value": 20}])
    print_table([])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["name", "value"],
        ["a", "1.23"],
        ["b", "20"],
    ]


def test_the_json_object_has_command_machine_and_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", "-m", "benchmarks.adaptive", "--a", "b c"])
    written = json.loads(print_json("adaptive", {"a": 1}, [2]))
    assert json.loads(capsys.readouterr().out) == written
    assert written["command"] == "python -m benchmarks.adaptive --a 'b c'"
    assert written["results"] == [2] and {"commit", "date", "device", "num_threads"} <= written.keys()


@pytest.mark.parametrize(("percent", "expected"), [(1, 1), (10, 1), (50, 5), (90, 9), (100, 10)])
def test_percentiles_are_values_that_occurred(percent: float, expected: float) -> None:
    assert percentile([float(value) for value in range(10, 0, -1)], percent) == expected


def test_the_page_shows_every_result_of_this_project_and_asks_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    assert main(["--out", str(out)]) == 0
    captured, page = capsys.readouterr(), out.read_text()
    assert not captured.err and "Skipped" not in page
    for path in RESULTS.glob("*.json"):
        assert path.name in page
    assert page.count("<svg") > 5 and "prefers-color-scheme: dark" in page
    assert not re.search(r"(src|href)=|url\(|@import|https?:", page)


def test_broken_and_foreign_files_are_named_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {
        "broken.json": "{",
        "foreign.json": "[1, 2]",
        "empty.json": "",
        "other.json": '{"benchmark": "adaptive", "results": {"contenders": [{"batch": 1}]}}',
        "nothing.json": '{"benchmark": "unheard", "results": 5}',
        "good.json": 'a table\n{"benchmark": "unheard", "results": [{"<b>": "<i>"}]}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    paths = [str(tmp_path / name) for name in (*texts, "missing.json")]
    out = tmp_path / "report.html"
    assert main([*paths, "--out", str(out)]) == 0
    captured, page = capsys.readouterr(), out.read_text()
    for name in (*texts, "missing.json"):
        assert (f"skipped: {name}: " in captured.err) == (name != "good.json")
        assert name in page
    assert "<td>&lt;i&gt;</td>" in page and "<i>" not in page.replace('<i class="', "")


def test_nothing_to_show_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    assert main([str(tmp_path / "missing.json"), "--out", str(out)]) == 1
    assert "error: no file has results" in capsys.readouterr().err and not out.exists()
