"""What the engine refuses is one line, and cases that were measured before are kept."""

import json
from pathlib import Path

import pytest

from benchmarks.long_prompt import main


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path / "missing")]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and len(output.err.splitlines()) == 1


def test_cases_before_one_that_is_refused_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--batch 1 --long-prompt-len 40 --steps 8 --rounds 1 --num-threads 1 --stream-slowdown 100"
    assert main([*small.split(), "--chunked-prefill-size", "64", "-1"]) == 2
    output = capsys.readouterr()
    assert output.err.splitlines()[-1].startswith("error: ")
    rows = json.loads(output.out.splitlines()[-1])["results"]
    assert [(row["chunk_size"], row["long_prompt"]) for row in rows] == [(64, 0), (64, 40)]
