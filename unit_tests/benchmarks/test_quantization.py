"""Texts and checkpoints that cannot be read are one line each, and precisions that were measured are kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quantization
from benchmarks.openai_server import RunFailed
from benchmarks.quantization import main, read_texts

GOOD = json.dumps({"question": "How many?", "answer": "#### 2"})


def test_texts_are_prompts_and_answers_of_the_first_lines(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\nbroken\n")
    assert read_texts(path, 2) == [("Question: How many?\nAnswer:", " #### 2")] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"", "is empty"),
        (b"\xff\n", "cannot read"),
        (GOOD.encode() + b"\n{", "line 2 is no JSON object"),
        (b'{"question": "?"}', "line 1 is no JSON object with question and answer: 'answer'"),
        (b"[1]", "line 1 is no JSON object"),
    ],
)
def test_texts_that_cannot_be_used_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "texts.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert main(["--texts", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.jsonl").write_text(GOOD)
    assert main(["--texts", str(tmp_path / "texts.jsonl"), "--model", str(tmp_path / "missing")]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and len(output.err.splitlines()) == 1


def test_precisions_before_one_that_fails_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: object) -> Iterator[dict[str, Any]]:
        yield {"dtype": "float32", "perplexity": 2.0}
        raise RunFailed("no such precision")

    (tmp_path / "texts.jsonl").write_text(GOOD)
    monkeypatch.setattr(quantization, "measure", measure)
    assert main(["--texts", str(tmp_path / "texts.jsonl")]) == 2
    output = capsys.readouterr()
    assert output.err == "error: no such precision\n"
    assert json.loads(output.out.splitlines()[-1])["results"] == [{"dtype": "float32", "perplexity": 2.0}]
