"""The rows of a job: written at once, so that a job which is ended or crashes leaves what it has measured."""

import json
import time
from pathlib import Path
from typing import Any


class Log:
    """Rows of named tables, one JSON object per line of `path`; the job should end `seconds` after now."""

    def __init__(self, path: Path, seconds: float):
        self._file = path.open("a", encoding="utf-8")
        self._end = time.monotonic() + seconds

    def add(self, table: str, **row: Any) -> None:
        """One row. `ok` False makes the whole suite red."""
        print(json.dumps({"table": table, **row}), file=self._file, flush=True)

    def skip(self, what: str) -> None:
        """Say what was left out because time ran out."""
        self.add("skipped", what=what, why="time ran out")

    def is_over(self, reserve: float = 0.0) -> bool:
        """Fewer than `reserve` seconds are left."""
        return time.monotonic() + reserve > self._end


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log; none without the file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
