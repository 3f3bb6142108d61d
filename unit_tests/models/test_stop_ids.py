"""Stop ids: whatever one file leaves out another may name, and all of them count."""

import json
import subprocess
import sys

import pytest

from models.errors import CheckpointError
from models.stop_ids import read_stop_ids, read_turn_ids
from unit_tests.checkpoints import ENDOFTEXT, IM_END, IM_START, make_checkpoint


def write(directory, **files) -> None:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_a_checkpoint_stops_on_end_of_turn_and_end_of_text(tmp_path):
    assert read_stop_ids(make_checkpoint(tmp_path)) == (ENDOFTEXT, IM_END)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json", "tokenizer_config.json", "tokenizer.json"])
def test_any_one_file_may_be_missing(file, tmp_path):
    make_checkpoint(tmp_path)
    (tmp_path / file).unlink()
    assert read_stop_ids(tmp_path) == (ENDOFTEXT, IM_END)


def test_the_union_of_all_places_is_taken(tmp_path):
    write(
        tmp_path,
        generation_config={"eos_token_id": 1},
        config={"eos_token_id": [2, 3], "text_config": {"eos_token_id": 4}},
        tokenizer_config={"eos_token": {"content": "<end>"}},
        tokenizer={"added_tokens": [{"id": 5, "content": "<end>"}], "model": {"vocab": {"<end>": 99}}},
    )
    assert read_stop_ids(tmp_path) == (1, 2, 3, 4, 5)


def test_an_end_token_among_the_words_is_found(tmp_path):
    write(tmp_path, tokenizer_config={"eos_token": "</s>"}, tokenizer={"model": {"vocab": {"</s>": 7}}})
    assert read_stop_ids(tmp_path) == (7,)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"generation_config": {"eos_token_id": None}, "config": {"text_config": None}},
        {"tokenizer_config": {"eos_token": None}},
        {
            "tokenizer_config": {"eos_token": "<gone>"},
            "tokenizer": {"added_tokens": None, "model": {"vocab": [["a", 0]]}},
        },
    ],
)
def test_nothing_named_means_nothing_stops(files, tmp_path):
    write(tmp_path, **files)
    assert read_stop_ids(tmp_path) == ()


@pytest.mark.parametrize("value", ["258", [1, "2"], {"a": 1}, True, 1.5])
def test_an_id_that_is_no_integer_is_refused_with_its_place(value, tmp_path):
    write(tmp_path, generation_config={"eos_token_id": value})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is"):
        read_stop_ids(tmp_path)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not readable JSON"):
        read_stop_ids(tmp_path)


def test_a_turn_of_a_chat_begins_with_im_start_alone(tmp_path):
    assert read_turn_ids(make_checkpoint(tmp_path)) == {IM_START}
    assert read_turn_ids(str(tmp_path)) == {IM_START}


@pytest.mark.parametrize(
    "tokenizer",
    [
        {},
        {"added_tokens": None},
        {"added_tokens": []},
        {"added_tokens": [{"id": 3, "content": "<|im_end|>"}, {"id": 4, "content": "im_start"}, {"id": 5}]},
        {"added_tokens": [], "model": {"vocab": {"<|im_start|>": 7}}},
    ],
)
def test_without_an_added_turn_token_no_turn_begins(tokenizer, tmp_path):
    assert read_turn_ids(tmp_path) == frozenset()
    write(tmp_path, tokenizer=tokenizer)
    assert read_turn_ids(tmp_path) == frozenset()


def test_a_broken_tokenizer_file_is_named_when_turns_are_read(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not readable JSON"):
        read_turn_ids(tmp_path)


def test_reading_stop_ids_needs_no_torch():
    code = "import sys, models.stop_ids; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
