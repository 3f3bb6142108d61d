"""Two versions of Tandem, each in a process of its own, decoding in turns.

Knows how to run `decode_child.py` in another checkout; `static_throughput --baseline` prints what comes of it.
"""

import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
CHILD = Path(__file__).with_name("decode_child.py")


class Version:
    """A process that decodes with the checkout at `root`; steps happen only while `measure` runs."""

    def __init__(self, root: Path, task: dict[str, Any]):
        root = root.resolve()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(CHILD)],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        used = self._ask(task)["root"]
        if used != str(root):
            raise SystemExit(f"{root} is no checkout of Tandem: its process imports the one at {used}")

    def __enter__(self) -> "Version":
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.communicate()

    def measure(self, num_steps: int) -> float:
        """Tokens per second of so many steps."""
        answer = self._ask(num_steps)
        return answer["tokens"] / answer["seconds"]

    def _ask(self, question: object) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of another version ended with status {self._process.wait()}")
        return json.loads(line)


def compare_versions(baseline: Path, task: dict[str, Any], num_steps: int, num_rounds: int) -> dict[str, float]:
    """Tokens per second of the baseline and of this checkout, medians of interleaved rounds, and of their ratios."""
    with ExitStack() as stack:
        old, new = (stack.enter_context(Version(root, task)) for root in (baseline, HERE))
        rounds = [_measure_round(old, new, num_steps, number % 2 == 0) for number in range(num_rounds + 1)]
    return {
        "baseline_tok_s": statistics.median(before for before, _ in rounds[1:]),
        "tok_s": statistics.median(after for _, after in rounds[1:]),
        "new_over_old": statistics.median(after / before for before, after in rounds[1:]),
    }


def _measure_round(old: Version, new: Version, num_steps: int, old_first: bool) -> tuple[float, float]:
    if old_first:
        before = old.measure(num_steps)
        return before, new.measure(num_steps)
    after = new.measure(num_steps)
    return old.measure(num_steps), after
