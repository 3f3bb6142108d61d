"""How does the cost of a decode step grow? `python -m benchmarks.scaling [--preset tiny 0.8B]`.

One engine per preset, random weights: steps at contexts, batch sizes and numbers of drafts, in interleaved rounds, and
by the size of the weights over all presets. Each axis is fitted twice, with equal weight to relative errors: as a power
law, and as a + b x, which is what something constant and something linear together cost; the closer one is named. What
is linear at most never grows by a larger factor than its axis, so `steepest` is the largest exponent between two points
that are at least four times apart, and above 1.1 counts as superlinear: the exit code is 1 then. What a request keeps
in memory is computed by the engine's plan. Prints tables, and as the last line one JSON object.
"""

import argparse
import gc
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import trange

from benchmarks.report import percentile, print_json, print_table
from benchmarks.static_throughput.decode import Cell, DecodeBench, room_of
from benchmarks.static_throughput.presets import DEMO, PRESET_NAMES, Preset, TooLarge, open_preset
from server.llm import TandemError

LINEAR = 1.1  # exponents up to this pass for 1
_SPAN = 4  # two points are this many times apart
_SHORT = 128  # tokens of each request where the context is not what grows

Axis = dict[str, list[tuple[int, Cell]]]


def make_axes(args: argparse.Namespace) -> Axis:
    """By name: what grows, and the requests there. A verify step has one row more than drafts."""
    return {
        "context": [(context, Cell(1, context, 0)) for context in args.context],
        "batch": [(batch, Cell(batch, _SHORT, 0)) for batch in args.batch],
        "rows": [(k + 1, Cell(1, _SHORT, k)) for k in range(args.mtp_step + 1)],
    }


def measure_preset(preset: Preset, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every point of its axes."""
    axes = make_axes(args)
    cells = [cell for points in axes.values() for _, cell in points]
    room = room_of(args.steps, args.mtp_step)
    num_tokens = max(cell.batch * (cell.context + room) for cell in cells)
    longest, most = max(cell.context for cell in cells) + room, max(cell.batch for cell in cells)
    bench = DecodeBench(preset, args.mtp_step, most, longest, num_tokens, num_threads=args.num_threads)
    seconds: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for number in trange(args.rounds + 1, desc=preset.name):
        for cell in seconds:
            samples = bench.measure_at(cell, args.steps, number)
            seconds[cell] += [sample.seconds for sample in samples] if number else []
    plan = bench.engine.runner.plan
    return [
        {
            "preset": preset.name,
            "axis": axis,
            "x": x,
            "step_ms": 1e3 * statistics.median(seconds[cell]),
            "step_ms_p10": 1e3 * percentile(seconds[cell], 10),
            "step_ms_p90": 1e3 * percentile(seconds[cell], 90),
            "kv_bytes": plan.limits.pages_for(cell.context) * plan.sizes.page,
            "state_bytes": plan.sizes.state + plan.sizes.rings,
            "weight_bytes": plan.sizes.weights,
        }
        for axis, points in axes.items()
        for x, cell in points
    ]


def fit_all(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each axis of each preset, for what a request keeps, and for the weights over all presets."""
    fits = []
    for (preset, axis), group in itertools.groupby(rows, key=lambda row: (row["preset"], row["axis"])):
        points = list(group)
        values = ["step_ms", *(["kv_bytes", "state_bytes"] if axis == "context" else [])]
        fits += [{"preset": preset, "axis": axis, **_fit_rows(points, "x", value)} for value in values]
    single = [row for row in rows if row["axis"] == "rows" and row["x"] == 1]
    fits.append({"preset": "all", "axis": "weights", **_fit_rows(single, "weight_bytes", "step_ms")})
    return [one for one in fits if one["points"] > 1]


def _fit_rows(rows: Sequence[dict[str, Any]], x: str, y: str) -> dict[str, Any]:
    return {"of": y, "points": len({row[x] for row in rows}), **fit([row[x] for row in rows], [row[y] for row in rows])}


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Exponent of the power law, a and b of a + b x, the worst relative error of each, which one is closer, and the
    steepest exponent; empty for less than two points."""
    if len(set(x)) < 2:
        return {}
    xs, ys = np.array(x, dtype=float), np.array(y, dtype=float)
    exponent, scale = np.polyfit(np.log(xs), np.log(ys), 1)
    (start, slope), *_ = np.linalg.lstsq(np.stack([1 / ys, xs / ys], axis=1), np.ones(len(ys)), rcond=None)
    power_error = float(np.abs(np.exp(scale) * xs**exponent / ys - 1).max())
    linear_error = float(np.abs((start + slope * xs) / ys - 1).max())
    steepest = find_steepest(x, y)
    return {
        "exponent": float(exponent),
        "a": float(start),
        "b": float(slope),
        "power_error": power_error,
        "linear_error": linear_error,
        "closer": "a + b x" if linear_error <= power_error else "power law",
        "steepest": steepest,
        "growth": "superlinear" if steepest > LINEAR else "linear at most",
    }


def find_steepest(x: Sequence[float], y: Sequence[float]) -> float:
    """The largest exponent between two points that are far apart; of the outermost two, if none are."""
    points = sorted(zip(x, y, strict=True))
    pairs = [(one, two) for one, two in itertools.combinations(points, 2) if two[0] >= _SPAN * one[0]]
    pairs = pairs or [(points[0], points[-1])]
    return max(math.log(two[1] / one[1]) / math.log(two[0] / one[0]) for one, two in pairs)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    presets = [name for name in PRESET_NAMES if name != DEMO]
    add("--preset", nargs="+", default=["tiny", "0.8B"], choices=presets, help="model dimensions")
    add("--context", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384, 32768], help="tokens of one request")
    add("--batch", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="decoding requests")
    add("--mtp-step", type=int, default=4, help="drafts per step, at most")
    add("--steps", type=int, default=8, help="decode steps per round")
    add("--rounds", type=int, default=5, help="rounds; all points take turns")
    add("--num-threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args(argv)
    if min([*args.context, *args.batch, args.steps, args.rounds, args.num_threads]) < 1 or args.mtp_step < 0:
        parser.error("sizes and counts must be at least 1")
    return args


def main(argv: list[str]) -> int:
    """Measure and print; the exit code is 1 where something is superlinear or does not fit in memory."""
    args = parse_args(argv)
    torch.set_num_threads(args.num_threads)
    rows, refused = [], []
    for name in args.preset:
        try:
            with open_preset(name, 1, "cuda" if torch.cuda.is_available() else "cpu") as preset:
                rows += measure_preset(preset, args)
        except TooLarge as error:
            refused.append(str(error))
        except TandemError as error:
            refused.append(f"preset {name}: {error}")
        gc.collect()
    fits = fit_all(rows)
    print_table(rows)
    print_table(fits)
    for line in refused:
        print(f"error: {line}", file=sys.stderr)
    if rows:
        print_json("scaling", vars(args), {"points": rows, "fits": fits, "skipped": refused})
    return 1 if refused or any(one["growth"] == "superlinear" for one in fits) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
