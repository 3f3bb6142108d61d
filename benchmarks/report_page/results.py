"""Reads what benchmarks have printed: JSON files -> results, and a line about each file that is none."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MODULES = {"training_speed": "models.training.speed"}  # all others are called as the benchmark is


@dataclass(frozen=True)
class Result:
    """One benchmark's JSON object, from the file `name`."""

    name: str
    benchmark: str
    content: dict[str, Any]

    @property
    def results(self) -> Any:
        """The numbers, in the benchmark's own form."""
        return self.content["results"]

    @property
    def origin(self) -> str:
        """Machine, threads, commit and date."""
        content = self.content
        threads = content.get("num_threads")
        parts = [
            content.get("device"),
            f"{threads} threads" if threads else None,
            f"torch {content['torch']}" if "torch" in content else None,
            f"commit {content['commit']}" if content.get("commit") else None,
            content.get("date"),
            self.name,
        ]
        return ", ".join(str(part) for part in parts if part)

    @property
    def command(self) -> str:
        """What was run; older results have only the settings that it is made of."""
        if "command" in self.content:
            return str(self.content["command"])
        words = ["python", "-m", _MODULES.get(self.benchmark, f"benchmarks.{self.benchmark}")]
        for key, value in self.content.get("config", {}).items():
            if value is None or value is False or value == []:
                continue
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += ["--" + key.replace("_", "-"), *(str(one) for one in values)]
        return shlex.join(words)


def read_results(paths: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """Results in the order of the paths, and lines about what could not be read."""
    results, skipped = [], []
    for path in paths:
        try:
            results.append(_read(path))
        except (OSError, ValueError) as error:
            skipped.append(f"{path.name}: {error}")
    return results, skipped


def _read(path: Path) -> Result:
    """Of a file with the JSON object, or with all that a benchmark has printed, of which it is the last line. Raises
    OSError or ValueError."""
    text = path.read_text(encoding="utf-8").strip()
    last = text.rpartition("\n")[2]
    content = json.loads(last if last.startswith("{") else text if text.startswith("{") else last or "null")
    if not isinstance(content, dict) or not isinstance(content.get("benchmark"), str) or "results" not in content:
        raise ValueError("is not the JSON object of a benchmark, which has a name and results")
    return Result(path.name, content["benchmark"], content)
