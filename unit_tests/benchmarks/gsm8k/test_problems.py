"""Answers are found in tricky texts, and splits in files, directories and data sets."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gsm8k.problems import choose_problems, parse_answer
from unit_tests.benchmarks.gsm8k.splits import TEST, TRAIN, args_for, write_rows, write_splits


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so he has 18 apples.", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### 12\n\nThat took 3 steps", "12"),
        ("####\n18", "18"),
        ("She has 5 of them. ####", "5"),
        ("It costs $1,080.50.", "1080.50"),
        ("#### $18.00", "18"),
        ("the change is -5", "-5"),
        ("the change is -$5 a day", "-5"),
        ("the change is −7 degrees", "-7"),
        ("16-3-4=9", "9"),
        ("then 16-3", "3"),
        ("(4)-3", "3"),
        ("of type A-4", "4"),
        ("grows by 25%", "25"),
        ("only $.50", ".50"),
        ("it is 2.5 km", "2.5"),
        ("pages 1, 2, 3", "3"),
        ("pages 1,2,3", "3"),
        ("1,2345", "2345"),
        ("**42**", "42"),
        ("\\boxed{-42}", "-42"),
        ("9*2 = $<<9*2=18>>18 every day", "18"),
        ("in step.7", "7"),
        ("007", "7"),
        ("eighteen", None),
        ("", None),
        ("#### ", None),
        ("٣", None),
    ],
)
def test_the_answer_is_the_number_after_the_mark_or_else_the_last(text: str, value: str | None) -> None:
    assert parse_answer(text) == (None if value is None else Decimal(value))


@pytest.mark.parametrize(
    ("folder", "train", "test"),
    [
        (".", "train.jsonl", "test.jsonl"),
        ("main", "train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"),
        ("data", "train.jsonl", "test.jsonl"),
    ],
)
def test_a_directory_gives_questions_from_test_and_examples_from_train(
    tmp_path: Path, folder: str, train: str, test: str
) -> None:
    write_splits(tmp_path / "set" / folder, train, test)
    write_splits(tmp_path / "set" / "socratic")
    (tmp_path / "set" / "testing.jsonl").write_text("not a split")
    shots, questions, _ = choose_problems(args_for(tmp_path / "set", "--shots", "7"))
    assert [shot.question for shot in shots] == [row["question"] for row in TRAIN]
    assert [(problem.number, problem.gold) for problem in questions] == [(n, 1000 * n) for n in range(1, 13)]


def test_shards_follow_each_other_and_lines_may_hold_any_character(tmp_path: Path) -> None:
    strange = {"question": "One\u2028two\x85three?", "answer": "#### -3"}
    write_rows(tmp_path / "test-00001-of-00002.jsonl", [strange])
    write_rows(tmp_path / "test-00000-of-00002.jsonl", TEST)
    _, questions, num_broken = choose_problems(args_for(tmp_path, "--shots", "0"))
    assert [problem.number for problem in questions] == list(range(1, 14))
    assert questions[-1].question == strange["question"] and questions[-1].gold == -3 and num_broken == 0


def test_broken_rows_of_both_splits_are_counted_and_left_out(tmp_path: Path) -> None:
    bad: list[Any] = [{"text": "x"}, ["x"], {"question": "?", "answer": "2 ####"}]
    write_rows(tmp_path / "train.jsonl", [*TRAIN, *bad])
    path = write_rows(tmp_path / "test.jsonl", [*bad, *TEST])
    path.write_bytes(b"{\n\xff\n" + path.read_bytes())
    shots, questions, num_broken = choose_problems(args_for(tmp_path, "--shots", "7"))
    assert (len(shots), len(questions), num_broken) == (7, 12, 3 + 5)
    assert [problem.number for problem in questions] == list(range(6, 18))


def test_a_file_gives_the_questions_and_its_train_sibling_the_examples(data: Path) -> None:
    shots, questions, _ = choose_problems(args_for(data / "test.jsonl", "--num-questions", "2"))
    assert [shot.question for shot in shots] == [row["question"] for row in TRAIN[:5]] and len(questions) == 2


def test_parquet_files_are_read_where_pyarrow_is_installed(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "main").mkdir()
    for name, rows in (("train", TRAIN), ("test", TEST)):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "main" / f"{name}-00000-of-00001.parquet")
    shots, questions, _ = choose_problems(args_for(tmp_path))
    assert len(shots) == 5 and [problem.gold for problem in questions] == [1000 * n for n in range(1, 13)]


def test_other_layouts_and_hub_names_go_through_datasets_where_it_is_installed(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_list(rows) for name, rows in (("train", TRAIN), ("test", TEST))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    shots, questions, _ = choose_problems(args_for(tmp_path / "saved"))
    assert [shot.question for shot in shots] == [row["question"] for row in TRAIN[:5]] and len(questions) == 12
