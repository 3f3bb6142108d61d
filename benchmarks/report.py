"""What every benchmark prints: a table for people, and one JSON object as the last line."""

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


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
    line = json.dumps({"benchmark": benchmark, "config": config, **_describe_machine(), "results": results})
    print(line)
    return line


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
