"""Two versions of Tandem, each in a process of its own, working in turns.

Knows how to run `decode_child.py` in another checkout; `static_throughput --baseline` and `regression` print what comes
of it.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent
CHILD = Path(__file__).with_name("decode_child.py")
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Task:
    """What both versions do: decode `batch` requests with settings of LLM, of random prompts of that length or of
    `texts`, `count` steps per round; with batch 0 they compute so many such prompts."""

    settings: dict[str, Any]
    batch: int
    prompt_len: int
    count: int
    texts: tuple[str, ...] = ()


class Version:
    """A process with the checkout at `root`; it works only while it is asked to."""

    def __init__(self, root: Path):
        root = root.resolve()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(CHILD)],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        used = self._read()["root"]
        if used != str(root):
            raise SystemExit(f"{root} is no checkout of Tandem: its process imports the one at {used}")

    def __enter__(self) -> "Version":
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.communicate()

    def start(self, task: Task) -> None:
        """Make an engine for this task in place of the last one."""
        self._ask(asdict(task))

    def measure(self, count: int) -> float:
        """Tokens per second of so many steps, or prompts."""
        answer = self._ask(count)
        return answer["tokens"] / answer["seconds"]

    def _ask(self, question: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of another version ended with status {self._process.wait()}")
        return json.loads(line)


def compare_versions(baseline: Path, tasks: Sequence[Task], num_rounds: int) -> list[dict[str, float]]:
    """For each task tokens per second of the baseline and of this checkout, medians of interleaved rounds, and of their
    ratios with the interval in which its true value lies."""
    with ExitStack() as stack:
        old, new = (stack.enter_context(Version(root)) for root in (baseline, HERE))
        return [_compare(old, new, task, num_rounds) for task in tqdm(tasks)]


def _compare(old: Version, new: Version, task: Task, num_rounds: int) -> dict[str, float]:
    for version in (old, new):
        version.start(task)
    rounds = [_measure_round(old, new, task.count, number % 2 == 0) for number in range(num_rounds + 1)][1:]
    low, high = median_interval([after / before for before, after in rounds])
    return {
        "baseline_tok_s": statistics.median(before for before, _ in rounds),
        "tok_s": statistics.median(after for _, after in rounds),
        "new_over_old": statistics.median(after / before for before, after in rounds),
        "new_over_old_min": low,
        "new_over_old_max": high,
    }


def _measure_round(old: Version, new: Version, count: int, old_first: bool) -> tuple[float, float]:
    if old_first:
        before = old.measure(count)
        return before, new.measure(count)
    after = new.measure(count)
    return old.measure(count), after


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The narrowest two of the values, equally far from both ends, between which the median of what they were drawn
    from lies with 95 % confidence, by the binomial law of how many lie below it; all of them if they are too few."""
    ordered, count = sorted(values), len(values)
    num_cut, outside = 0, 2 * 0.5**count
    while num_cut < (count - 1) // 2:
        outside += 2 * math.comb(count, num_cut + 1) * 0.5**count
        if outside > 1 - _CONFIDENCE:
            break
        num_cut += 1
    return ordered[num_cut], ordered[-1 - num_cut]
