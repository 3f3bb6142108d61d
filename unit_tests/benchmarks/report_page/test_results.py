"""Results tell where they come from, and older ones their command from their settings."""

import json
from pathlib import Path

from benchmarks.report_page.results import Result, read_results


def make(**content: object) -> Result:
    return Result("x.json", "adaptive", {"benchmark": "adaptive", "results": [], **content})


def test_a_command_is_the_recorded_one_or_made_of_the_settings() -> None:
    assert make(command="python -m x --y").command == "python -m x --y"
    config = {"batch": [1, 4], "trace": None, "chat": True, "partial": False, "compare": [], "name": "a b"}
    assert make(config=config).command == "python -m benchmarks.adaptive --batch 1 4 --chat --name 'a b'"
    training = Result("x.json", "training_speed", {"results": [], "config": {"rounds": 5}})
    assert training.command == "python -m models.training.speed --rounds 5"


def test_the_origin_names_what_is_known() -> None:
    full = make(device="AMD EPYC", num_threads=2, torch="2.13.0", commit="abc", date="2026-11-26")
    assert full.origin == "AMD EPYC, 2 threads, torch 2.13.0, commit abc, 2026-11-26, x.json"
    assert make(commit="").origin == "x.json"


def test_files_are_read_in_order_and_what_is_none_is_named(tmp_path: Path) -> None:
    good = {"benchmark": "b", "results": [1]}
    for name, text in {
        "one": json.dumps(good),
        "two": f"table\n\n{json.dumps(good, indent=None)}\n",
        "three": f"{json.dumps({'other': 1}, indent=1)}\ntable\n{json.dumps(good)}\n",
        "four": json.dumps(good, indent=1),
        "bad": "{}",
    }.items():
        (tmp_path / name).write_text(text)
    results, skipped = read_results(tmp_path / name for name in ("two", "bad", "one", "gone", "three", "four"))
    assert [result.name for result in results] == ["two", "one", "three", "four"]
    assert all(result.results == [1] for result in results)
    assert (
        len(skipped) == 2 and skipped[0].startswith("bad: is not the JSON object") and skipped[1].startswith("gone: ")
    )
