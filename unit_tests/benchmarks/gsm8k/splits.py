"""A small data set in GSM8K's form, in files."""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.gsm8k.__main__ import parse_args

TRAIN = [{"question": f"What is {n} plus {n}?", "answer": f"{n}+{n} = <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"}
         for n in range(1, 8)]  # fmt: skip
TEST = [{"question": f"What is {n} times 1000?", "answer": f"It is {n},000.\n#### {n},000"} for n in range(1, 13)]


def write_splits(directory: Path, train: str = "train.jsonl", test: str = "test.jsonl") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    write_rows(directory / train, TRAIN)
    write_rows(directory / test, TEST)
    return directory


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def args_for(data: Path | str, *more: str) -> argparse.Namespace:
    return parse_args(["--data", str(data), *more])
