"""What every benchmark prints: a table for people, and one JSON object as the last line.

`python -m benchmarks.report [FILES] [--out report.html]` makes one HTML page of such objects, by default of all in
benchmarks/results: plots with machine, commit, date and command under each. Files that are something else are named and
left out.
"""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report_page.page import plot_results, render
from benchmarks.report_page.results import read_results

RESULTS = Path(__file__).with_name("results")


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of one kind; the columns are those of the first."""
    if not rows:
        return
    widths = {name: max(len(name), 9) for name in rows[0]}
    print("  ".join(f"{name:>{width}}" for name, width in widths.items()))
    for row in rows:
        cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths.values(), strict=True)))


def print_json(benchmark: str, config: dict[str, Any], results: Any) -> str:
    """The last line: what ran, on what, and the numbers. Gives what it prints."""
    command = shlex.join(["python", *sys.orig_argv[1:]])
    about = {"benchmark": benchmark, "command": command, "config": config, **_describe_machine()}
    line = json.dumps({**about, "results": results})
    print(line)
    return line


def spread(name: str, values: Iterable[float]) -> dict[str, float]:
    """The median of the rounds' values as `name`, with the least and the most of them as `name_min` and `name_max`."""
    rounds = sorted(values)
    return {name: statistics.median(rounds), f"{name}_min": rounds[0], f"{name}_max": rounds[-1]}


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(percent) // 100) - 1)]


def _describe_machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(argv: list[str]) -> int:
    """Write the page; the exit code is 1 if there is nothing to show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="what benchmarks have printed, or its last line")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page")
    args = parser.parse_args(argv)
    results, unreadable = read_results(args.files or sorted(RESULTS.glob("*.json")))
    plots, unknown = plot_results(results)
    for line in (*unreadable, *unknown):
        print(f"skipped: {line}", file=sys.stderr)
    if not plots:
        print("error: no file has results that can be shown", file=sys.stderr)
        return 1
    args.out.write_text(render(plots, [*unreadable, *unknown]), encoding="utf-8")
    print(f"{len(plots)} plots and tables of {len(results) - len(unknown)} results are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
