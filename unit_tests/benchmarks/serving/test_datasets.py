"""Conversations are those that were asked for, the same for the same seed, and broken files are no tracebacks."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.openai_server import RunFailed
from benchmarks.serving.command_line import read_command_line
from benchmarks.serving.datasets import Conversation, Dataset, make_dataset
from unit_tests.benchmarks.gsm8k.splits import write_splits


def dataset(*flags: str, takes_ids: bool = False) -> Dataset:
    return make_dataset(read_command_line(["--dataset", *flags], None), takes_ids)


def first(count: int, *flags: str, takes_ids: bool = False) -> list[Conversation]:
    return list(itertools.islice(dataset(*flags, takes_ids=takes_ids).conversations, count))


def only_turn(conversation: Conversation) -> Any:
    (turn,) = conversation.turns
    return turn.said


@pytest.mark.parametrize("name", ["random", "shared-prefix", "multi-turn", "word-problems"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_the_seed_decides_what_is_asked(name: str, endpoint: str) -> None:
    one, again, other = (first(20, name, "--endpoint", endpoint, "--seed", seed) for seed in "112")
    assert one == again != other
    assert len({repr(conversation) for conversation in one}) == 20


def test_random_prompts_are_ids_of_the_length_asked_for() -> None:
    flags = ["--input-len", "40", "--output-len", "10", "--range-ratio", "0.5", "--vocab-size", "50"]
    drawn = first(300, "random", *flags, takes_ids=True)
    lengths = [len(only_turn(one)) for one in drawn]
    assert (min(lengths), max(lengths)) == (20, 60) and 38 < sum(lengths) / 300 < 42
    assert {one.turns[0].max_tokens for one in drawn} == set(range(5, 16))
    assert {token_id for one in drawn for token_id in only_turn(one)} == set(range(50))
    assert drawn[0].prompt([]).content == {"prompt": only_turn(drawn[0])}


def test_random_prompts_are_words_where_ids_are_not_taken() -> None:
    (one,) = first(1, "random", "--input-len", "30")
    assert len(only_turn(one).split()) == 30 and one.prompt([]).max_tokens == 128


@pytest.mark.parametrize("takes_ids", [True, False])
def test_prompts_of_a_group_begin_alike(takes_ids: bool) -> None:
    flags = ["--prefix-len", "12", "--input-len", "5", "--num-groups", "3"]
    said = [only_turn(one) for one in first(60, "shared-prefix", *flags, takes_ids=takes_ids)]
    split = [tuple(one if takes_ids else one.split()) for one in said]
    assert {len(one) for one in split} == {17}
    assert len({one[:12] for one in split}) == 3 and len({one[12:] for one in split}) == 60


def test_a_chat_grows_with_the_server_s_answers() -> None:
    (chat,) = first(1, "multi-turn", "--num-turns", "3", "--input-len", "2")
    said = [turn.said for turn in chat.turns]
    assert chat.prompt(["one", "two"]).content == {
        "messages": [
            {"role": "user", "content": said[0]},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": said[1]},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": said[2]},
        ]
    }
    (text,) = first(1, "multi-turn", "--num-turns", "2", "--input-len", "2", "--endpoint", "completions")
    assert text.prompt([" one"]).content["prompt"] == (f"User: {said[0]}\nAssistant: one\nUser: {said[1]}\nAssistant:")


def test_word_problems_are_framed_for_completions_only() -> None:
    (text,), (chat,) = first(1, "word-problems"), first(1, "word-problems", "--endpoint", "chat")
    assert only_turn(text) == f"Question: {only_turn(chat)}\nAnswer:" and only_turn(chat).endswith("?")


EXCHANGE = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "By four times six letters"}]
ENTRIES: list[Any] = [
    {"conversations": EXCHANGE},
    {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "user", "value": "Why?"}, EXCHANGE[1]]},
    {"conversations": EXCHANGE[:1]},
    {"conversations": [EXCHANGE[0], {"from": "gpt", "value": " "}]},
    {"conversations": "x"},
    {"text": "x"},
    "x",
    None,
]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_sharegpt_s_first_questions_are_asked_and_broken_entries_counted(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"data.{form}"
    lines = [json.dumps(entry).encode() for entry in ENTRIES]
    path.write_bytes(
        b"[" + b",".join(lines) + b"]" if form == "json" else b"\n".join([*lines, b"{broken", b"", b"\xff"])
    )
    read = dataset("sharegpt", "--data", str(path))
    assert (read.size, read.skipped) == (2, 6 if form == "json" else 8)
    asked = list(itertools.islice(read.conversations, 4))
    assert {only_turn(one) for one in asked[:2]} == {"How?", "Why?"} and asked[2:] == asked[:2]
    assert asked[0].endpoint == "chat" and asked[0].prompt([]).max_tokens == len(EXCHANGE[1]["value"]) // 4
    (given,) = first(1, "sharegpt", "--data", str(path), "--output-len", "9")
    assert given.prompt([]).max_tokens == 9


def test_gsm8k_is_asked_as_the_harness_asks_it(tmp_path: Path) -> None:
    data = str(write_splits(tmp_path))
    text, *_ = first(1, "gsm8k", "--data", data, "--shots", "1")
    assert text.prompt([]).content == {
        "prompt": "Question: What is 1 plus 1?\nAnswer: 1+1 = <<1+1=2>>2.\n#### 2\n\n"
        "Question: What is 1 times 1000?\nAnswer:",
        "stop": ["Question", "Assistant:", "<|separator|>"],
    }
    assert text.prompt([]).max_tokens == 512
    chat = first(14, "gsm8k", "--data", data, "--shots", "2", "--endpoint", "chat")
    messages = chat[1].prompt([]).content["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    assert messages[-1]["content"] == "What is 2 times 1000?" and chat[12] == chat[0]


def test_broken_rows_of_gsm8k_are_counted_and_left_out(tmp_path: Path) -> None:
    path = write_splits(tmp_path) / "test.jsonl"
    path.write_bytes(b"{broken\n" + path.read_bytes() + b"\xff\n[]\n")
    read = dataset("gsm8k", "--data", str(tmp_path), "--shots", "0")
    assert (read.size, read.skipped) == (12, 3)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_files_that_cannot_be_used_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    files = {
        "cannot read": [tmp_path / "missing.json", tmp_path, write(tmp_path / "cut.json", b'[{"conversations"')],
        "no entry with a question": [write(tmp_path / "e.json", b"[]"), write(tmp_path / "l.jsonl", b"{\nx\n")],
    }
    for message, paths in files.items():
        for path in paths:
            with pytest.raises(RunFailed, match=message):
                dataset("sharegpt", "--data", str(path))
    with pytest.raises(RunFailed, match="datasets library"):
        dataset("gsm8k", "--data", str(tmp_path))
