"""Contestants take turns, one that ends does not end the run, and ratios are of the same round."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.openai_server import RunFailed
from benchmarks.peers import checkpoints, decode
from benchmarks.peers.__main__ import main
from benchmarks.peers.contestant import Contestant
from benchmarks.peers.decode import Work, describe, measure, same_share

FAKE_CHILD = """
import sys
from benchmarks.peers.child import run_child

class FakeDecoder:
    version = "1.2"

    def __init__(self, task):
        print("a library says hello")
        if task["model"] == "broken":
            sys.exit("no such model")

    def decode(self, prompts, num_steps, take):
        print("noise")
        if not prompts:
            raise ValueError("nothing to decode")
        for step in range(num_steps + 1):
            take([prompt[0] + step for prompt in prompts])

run_child(FakeDecoder)
"""


class FakeContestant:
    """Answers from a list of seconds per step; raises what stands there instead."""

    def __init__(self, name: str, seconds: list[Any], log: list[str]):
        self.name, self._seconds, self._log = name, iter(seconds), log

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self._log.append(self.name)
        value = next(self._seconds)
        if isinstance(value, BaseException):
            raise value
        steps = question["num_steps"]
        tokens = [[7] * (steps + 1) for _ in question["prompts"]]
        return {"prefill_seconds": value, "decode_seconds": value * steps, "tokens": tokens}


@pytest.fixture
def fake_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Contestant]:
    """Starts a contestant around the fake decoder."""
    for package in (tmp_path / "benchmarks", tmp_path / "benchmarks" / "peers"):
        package.mkdir()
        (package / "__init__.py").touch()
    child = Path(decode.__file__).with_name("child.py").read_text()
    (tmp_path / "benchmarks" / "peers" / "child.py").write_text(child)
    (tmp_path / "benchmarks" / "peers" / "fake_child.py").write_text(FAKE_CHILD)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with it every print is written at once anyway
    variables = dict(os.environ) | {"PYTHONPATH": str(tmp_path)}
    return lambda model: Contestant("fake", Path(sys.executable), "fake_child", variables, {"model": model})


def test_contestants_take_turns_and_the_first_round_counts_for_nothing() -> None:
    log: list[str] = []
    contestants = [
        FakeContestant(name, [9.0, 0.2 * place, 0.4 * place], log) for place, name in ((1, "tandem"), (2, "b"))
    ]
    work = Work(decode.DECODE, [[1, 2], [3, 4]], 4)
    assert measure(contestants, [work], 2) == {}  # type: ignore[arg-type]
    assert log == ["tandem", "b", "b", "tandem", "tandem", "b"]
    assert work.seconds("tandem") == pytest.approx([0.2, 0.4]) and work.seconds("b") == pytest.approx([0.4, 0.8])


def test_ratios_are_to_the_tandem_with_as_many_bits_round_by_round() -> None:
    names = ["tandem", "tandem-int8", "transformers", "llama.cpp-Q8_0"]
    seconds = [[0.1, 0.2], [0.05, 0.1], [0.3, 0.4], [0.1, 0.1]]
    contestants = [FakeContestant(name, [1.0, *own], []) for name, own in zip(names, seconds, strict=True)]
    works = [Work(decode.DECODE, [[1, 2], [3, 4]], 4), Work(decode.PREFILL, [[1, 2, 3]], 0)]
    measure(contestants, works[:1], 2)  # type: ignore[arg-type]
    tables = describe(works)
    rows = {row["contestant"]: row for row in tables["decode"]}
    assert list(rows) == names and tables["prefill"] == []
    assert (rows["transformers"]["ratio_to"], rows["llama.cpp-Q8_0"]["ratio_to"]) == ("tandem", "tandem-int8")
    spread = [rows["transformers"][f"ratio{end}"] for end in ("_min", "", "_max")]
    assert spread == pytest.approx([2.0, 2.5, 3.0])
    assert rows["tandem"]["step_ms"] == pytest.approx(150) and rows["tandem"]["tok_s"] == pytest.approx(2 / 0.15)
    assert rows["llama.cpp-Q8_0"]["ratio"] == pytest.approx(1.5) and rows["tandem"]["ratio"] == 1


def test_one_that_ends_is_left_out_and_an_interrupted_run_keeps_its_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    log: list[str] = []
    bad = FakeContestant("llama.cpp", [1.0, RunFailed("llama.cpp ended with status 1: no memory")], log)
    good = FakeContestant("tandem", [1.0, 0.5, 0.25, KeyboardInterrupt()], log)
    work = Work(decode.DECODE, [[1]], 2)
    failures = measure([good, bad], [work], 5)  # type: ignore[list-item]
    assert failures == {"llama.cpp": "llama.cpp ended with status 1: no memory"}
    assert log.count("llama.cpp") == 2 and work.seconds("tandem") == [0.5, 0.25]
    assert [row["contestant"] for row in describe([work])["decode"]] == ["tandem"]
    assert "interrupted" in capsys.readouterr().err


def test_tokens_are_the_same_until_the_first_that_differs() -> None:
    one = {"tokens": [[1, 2, 3, 4], [1, 2, 3, 4]]}
    assert same_share(one, one) == 1
    assert same_share(one, {"tokens": [[1, 2, 3, 4], [1, 9, 3, 4]]}) == 5 / 8


def test_a_process_answers_on_a_clean_channel_and_says_why_it_ends(fake_child: Callable[[str], Contestant]) -> None:
    with fake_child("good") as contestant:
        assert contestant.version == "1.2"
        answer = contestant.ask({"prompts": [[5], [10]], "num_steps": 2})
        assert answer["tokens"] == [[5, 6, 7], [10, 11, 12]]
        assert answer["prefill_seconds"] > 0 and answer["decode_seconds"] > 0
        with pytest.raises(RunFailed, match="fake ended with status 1: ValueError: nothing to decode"):
            contestant.ask({"prompts": [], "num_steps": 2})
    with pytest.raises(RunFailed, match="fake ended with status 1: no such model"), fake_child("broken"):
        raise AssertionError("it has started")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["decode", "--checkpoint", "nowhere"], "--checkpoint nowhere is no directory with a config.json"),
        (["decode", "--batch", "0"], "--batch has 0, the least is 1"),
        (["serve", "--contestants", "ollama"], "ollama is not known, it must be one of tandem, llama.cpp, vllm"),
        (["install", "sglang"], "sglang is not known, it must be one of transformers, llama.cpp, vllm"),
        (
            ["decode", "--checkpoint", "27B"],
            r"27B has 53,\d{3},\d{3},\d{3} bytes of weights; 7 contestants with it take",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.setattr(checkpoints, "free_memory", lambda device: 2**34)
    assert main([*flags, "--directory", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


@pytest.mark.slow
def test_tandem_alone_is_measured_where_no_peer_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    flags = [
        "--checkpoint",
        "demo",
        "--batch",
        "2",
        "--steps",
        "3",
        "--prefill",
        "40",
        "--rounds",
        "1",
        "--num-threads",
        "1",
    ]
    names = ["--contestants", "tandem", "transformers", "llama.cpp"]
    assert main(["decode", *flags, *names, "--directory", str(tmp_path), "--json", str(file)]) == 0
    output = capsys.readouterr().out
    assert "transformers is missing: transformers is not installed in " in output
    found = json.loads(file.read_text())
    assert found == json.loads(output.splitlines()[-1]) and found["benchmark"] == "peers"
    (step,), (prefill,) = found["results"]["decode"], found["results"]["prefill"]
    assert (step["batch"], step["contestant"], prefill["prompt"]) == (2, "tandem", 40)
    assert found["results"]["missing"].keys() == {"transformers", "llama.cpp"}


def test_the_demo_is_asked_word_problems_of_one_length() -> None:
    args = argparse.Namespace(seed=0, prompt_len=50, batch=[1, 3], steps=4, prefill=[90])
    works = decode.draw_works(checkpoints.Checkpoint(checkpoints.DEMO, Path()), args)
    assert [[len(prompt) for prompt in work.prompts] for work in works] == [[50], [50] * 3, [90]]
    assert works[1].prompts[0] != works[1].prompts[1]


def test_random_weights_are_written_once_with_a_text_for_every_token(tmp_path: Path) -> None:
    found = checkpoints.find_checkpoint("tiny", tmp_path, ["tandem"])
    stamp = (found.directory / "model.safetensors").stat().st_mtime_ns
    again = checkpoints.find_checkpoint("tiny", tmp_path, ["tandem"])
    assert again == found and (again.directory / "model.safetensors").stat().st_mtime_ns == stamp
    tokenizer = decode.Tokenizer.from_file(str(found.directory / "tokenizer.json"))
    demo = decode.Tokenizer.from_file(str(checkpoints.DEMO / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == found.config["vocab_size"] == 4096
    assert tokenizer.decode([4095]).strip() and tokenizer.token_to_id("<|im_end|>") == demo.token_to_id("<|im_end|>")
    assert tokenizer.encode("Tom has 3 boxes").ids == demo.encode("Tom has 3 boxes").ids
