"""Draws speed and latency over the load, where matplotlib is installed."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_PANELS = (
    ("output tokens per second", lambda row: row["output_tok_s"]),
    ("TTFT p50 / ms", lambda row: row["ttft_ms"] and row["ttft_ms"]["p50"]),
    ("TPOT p50 / ms", lambda row: row["tpot_ms"] and row["tpot_ms"]["p50"]),
)


def plot(loads: Sequence[dict[str, Any]], path: Path) -> str:
    """Write a picture with a line per server, of results as they stand in the JSON object; says what was done."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    if not loads:
        return "no plot: nothing was measured"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(_PANELS), 4), layout="constrained")
    for axes, (title, read) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        lines = make_lines(loads, read)
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_xlabel(loads[0]["kind"].replace("_", " "))
        axes.set_title(title)
        axes.set_ylim(bottom=0)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lines))
    figure.savefig(path)
    return f"the plot is in {path}"


def make_lines(
    loads: Sequence[dict[str, Any]], read: Callable[[dict[str, Any]], float | None]
) -> dict[str, list[tuple[float, float]]]:
    """Points of each server: the load, and what `read` finds. One that was broken off may lack some servers."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for load in loads:
        for row in load["servers"]:
            lines.setdefault(row["server"], []).append((float(load["value"]), read(row) or math.nan))
    return lines
