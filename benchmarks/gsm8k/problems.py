"""GSM8K's problems: where they are read from, which are asked, and what number a text gives as its answer.

Questions come from the test split and examples from the train split, never the other way round. Knows no server.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from benchmarks.openai_server import RunFailed, one_line

ANSWER_MARK = "####"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(?<!\.jsonl)(?<!\.parquet)")

# A minus right after a word, a number or a bracket is not a sign. Commas count between groups of three digits only.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-−])?\$?(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)", re.ASCII
)


@dataclass(frozen=True)
class Problem:
    """A question with its worked answer. `number` counts from 1 in its split, `gold` is the number after "####"."""

    number: int
    question: str
    answer: str
    gold: Decimal


def parse_answer(text: str) -> Decimal | None:
    """The first number after "####", else the last number of the text; None when there is no number."""
    marked = _NUMBER.search(text.partition(ANSWER_MARK)[2])
    matches = [marked] if marked else list(_NUMBER.finditer(text))
    if not matches:
        return None
    value = Decimal(matches[-1]["digits"].replace(",", ""))
    return -value if matches[-1]["sign"] else value


def read_split(data: str, split: str, subset: str) -> tuple[list[Problem], int]:
    """The problems of `split` ("train" or "test") in a file, a directory or on the Hub, and how many rows were broken.
    Raises RunFailed, where none is whole too."""
    path = Path(data)
    if path.is_file():
        path = _file_of_split(path, split)
        return _make_problems(_read_rows(path), str(path))
    if path.is_dir() and (files := _files_of_split(path, split, subset)):
        return _make_problems([row for file in files for row in _read_rows(file)], f"{data}, {split} split")
    if not path.exists() and not _HUB_NAME.fullmatch(data):
        raise RunFailed(f"there is no file or directory {data}")
    return _make_problems(_read_with_datasets(data, split, subset), f"{data}, {split} split")


def _file_of_split(path: Path, split: str) -> Path:
    """A file given by name holds the questions; examples are in the one called train where it is called test."""
    if split == "test":
        if "train" in path.name:
            raise RunFailed(f"{path} is a train split, questions come from test; give the test file or the directory")
        return path
    sibling = path.with_name(path.name.replace("test", "train"))
    if sibling == path or not sibling.is_file():
        raise RunFailed(f"examples come from the train split, and there is none beside {path}; use --shots 0")
    return sibling


def _files_of_split(directory: Path, split: str, subset: str) -> list[Path]:
    """The files that the names of a dataset repository give to a split, all of one format in one folder."""
    for folder in (directory / subset, directory / "data", directory):
        names = sorted(folder.iterdir()) if folder.is_dir() else []
        for suffix in (".jsonl", ".parquet"):
            files = [x for x in names if x.suffix == suffix and re.fullmatch(rf"{split}([-._].*)?", x.stem)]
            if files:
                return files
    return []


def _read_rows(path: Path) -> Sequence[Any]:
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path)
        if path.suffix == ".jsonl":
            return [_read_line(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise RunFailed(f"cannot read {path}: {one_line(error)}") from error
    raise RunFailed(f"cannot read {path}: the formats are .jsonl and .parquet")


def _read_line(line: bytes) -> Any:
    """None where it is not JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _read_parquet(path: Path) -> Sequence[Any]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise RunFailed(f"{path} needs pyarrow to be read: pip install pyarrow, or give a .jsonl file") from error
    return parquet.read_table(path).to_pylist()


def _read_with_datasets(data: str, split: str, subset: str) -> Iterable[Any]:
    try:
        import datasets
    except ImportError as error:
        seen = f"no {split} file (.jsonl, .parquet) in {data}" if Path(data).exists() else f"there is no {data} here"
        message = f"{seen}; other layouts and names on the Hub need the datasets library: pip install datasets"
        raise RunFailed(message) from error
    try:
        if Path(data, "dataset_dict.json").exists():
            return datasets.load_from_disk(data)[split]
        return datasets.load_dataset(data, subset, split=split)
    except (OSError, ValueError, KeyError) as error:
        raise RunFailed(f"the datasets library cannot load {data} ({subset}, {split}): {one_line(error)}") from error


def _make_problems(rows: Iterable[Any], where: str) -> tuple[list[Problem], int]:
    found = [_make_problem(number, row) for number, row in enumerate(rows, 1)]
    problems = [problem for problem in found if problem is not None]
    if not problems:
        raise RunFailed(
            f"{where} has no row with a `question` and an `answer` with a number after {ANSWER_MARK} "
            f"({len(found)} are broken); is it GSM8K?"
        )
    return problems, len(found) - len(problems)


def _make_problem(number: int, row: Any) -> Problem | None:
    question, answer = (row.get("question"), row.get("answer")) if isinstance(row, dict) else (None, None)
    if not isinstance(question, str) or not isinstance(answer, str):
        return None
    gold = parse_answer(answer.partition(ANSWER_MARK)[2])
    return None if gold is None else Problem(number, question, answer, gold)


def choose_problems(args: argparse.Namespace) -> tuple[list[Problem], list[Problem], int]:
    """The first problems of the train split as examples, those of the test split as questions, and how many rows of
    both were broken and left out. Raises RunFailed."""
    tests, num_broken = read_split(args.data, "test", args.subset)
    trains, num_broken_shots = read_split(args.data, "train", args.subset) if args.shots else ([], 0)
    questions = _take(tests, args.num_questions, "--num-questions", "test")
    shots = _take(trains, args.shots, "--shots", "train")
    asked = {problem.question: problem.number for problem in questions}
    for shot in shots:
        if shot.question in asked:
            raise RunFailed(
                f"train problem {shot.number} is test question {asked[shot.question]}: the splits are mixed"
            )
    return shots, questions, num_broken + num_broken_shots


def _take(problems: list[Problem], count: int | None, flag: str, split: str) -> list[Problem]:
    if (count or 0) > len(problems):
        raise RunFailed(f"{flag} asks for {count} problems, the {split} split has {len(problems)}")
    return problems[:count]
