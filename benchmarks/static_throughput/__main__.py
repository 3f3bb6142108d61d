"""Speed of the engine without HTTP: `python -m benchmarks.static_throughput [--preset demo 0.8B]`.

Decode: how long does a step take for a batch of B requests that all stand at the same context, at each mtp_step, and
what does it emit? With random weights drafts are hardly ever right, so --accept-rate and --acceptance-trace say how
many are accepted; the demo's real drafts can decide. Depths are fixed, nothing is cached, and the host's work is not
hidden. A step is set against the bytes that it must move at the bandwidth that the same run measured by reading half a
GiB; models that fit in a cache may be faster than that. Peak memory is what an engine with its requests adds to the
process. Prefill: prompts of the same lengths in chunks of --chunks tokens, new ones and last turns of a chat.

More contestants, whose rounds are interleaved: `--compare transformers` runs the same checkpoint under
`transformers.generate`, `--compare overlap` the engine with and without overlap of host and device, `--baseline DIR`
another checkout of this project and this one, both with their default settings. `--trace FILE` writes a timeline with
overlap for chrome://tracing or Perfetto and says how much of the host's work was hidden behind the device's. Prints
tables, and as the last line one JSON object. What does not fit in memory or fails is named and left out; the exit code
is then 1.
"""

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.openai_server import one_line
from benchmarks.report import print_json, print_table
from benchmarks.static_throughput.acceptance import choose_acceptances
from benchmarks.static_throughput.comparisons import (
    compare_baseline,
    compare_overlap,
    compare_transformers,
    trace_steps,
)
from benchmarks.static_throughput.decode import Cell, measure_cell, pick
from benchmarks.static_throughput.machine import BandwidthProbe
from benchmarks.static_throughput.prefill import measure_prefill
from benchmarks.static_throughput.presets import PRESET_NAMES, Preset, TooLarge, open_preset
from server.llm import TandemError

# SystemExit: another checkout's process refuses its task.
_FAILURES = (TandemError, ImportError, OSError, RuntimeError, ValueError, SystemExit)
_KEY = ("batch", "context", "mtp_step", "acceptance")
_TABLES = (
    (*_KEY, "step_ms", "step_ms_p10", "step_ms_p90", "tok_s", "itl_ms", "accept_len"),
    (*_KEY, "gain", "gain_min", "gain_max", "verify_ms", "verify_ratio", "verify_ratio_min", "verify_ratio_max"),
    (*_KEY, "draft_ms", "mib_per_step", "bandwidth_share", "peak_mib"),
)


def measure_preset(preset: Preset, args: argparse.Namespace) -> dict[str, Any]:
    """All tables of one preset; what an engine refuses, as too large, and what fails is named in `skipped`."""
    names = ("prefill", "rows", "transformers", "overlap", "baseline", "skipped")
    tables: dict[str, list[Any]] = {name: [] for name in names}
    probe, settings = BandwidthProbe(args.device), {"num_threads": args.num_threads} | args.set
    jobs: list[Cell | None] = [None] if args.chunks else []
    jobs += [Cell(batch, context) for context, batch in itertools.product(args.context, args.batch)]
    for cell in tqdm(jobs, desc=preset.name):
        with _skipping(tables["skipped"], f"{preset.name}, {cell or 'prefill'}"):
            if cell is None:
                tables["prefill"] = measure_prefill(preset, args.context, args.chunks, args.rounds, settings)
            else:
                _measure_cell(preset, cell, probe, tables, settings, args)
    hidden = None
    if args.trace is not None and args.batch:
        cell = Cell(max(args.batch), max(args.context))
        with _skipping(tables["skipped"], f"{preset.name}, trace of {cell}"):
            hidden = trace_steps(preset, cell, max(args.mtp_steps), args.trace, args.steps, settings)
    about = {"preset": preset.name, "dtype": args.set.get("dtype", preset.dtype), "gb_s": probe.bytes_per_second / 1e9}
    return about | tables | {"hidden_host_share": hidden}


@contextmanager
def _skipping(skipped: list[str], what: str) -> Iterator[None]:
    """What fails inside becomes a line of `skipped`; its engines are gone afterwards."""
    try:
        yield
    except _FAILURES as error:
        skipped.append(f"{what}: {one_line(error)}")
    gc.collect()


def _measure_cell(
    preset: Preset,
    cell: Cell,
    probe: BandwidthProbe,
    tables: dict[str, list[Any]],
    settings: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    counts = args.steps, args.rounds, settings
    tables["rows"] += measure_cell(preset, cell, args.mtp_steps, args.acceptances, probe, *counts)
    gc.collect()
    comparisons = {
        "transformers": lambda: [compare_transformers(preset, cell, *counts)],
        "overlap": lambda: compare_overlap(preset, cell, args.mtp_steps, *counts),
        "baseline": lambda: compare_baseline(preset, cell, args.mtp_steps, args.baseline, *counts),
    }
    for name, compare in comparisons.items():
        if name in args.compare or (name == "baseline" and args.baseline is not None):
            with _skipping(tables["skipped"], f"{preset.name}, {cell}, {name}"):
                tables[name] += compare()


def print_tables(result: dict[str, Any], args: argparse.Namespace) -> None:
    """What was measured of one preset."""
    about = f"{args.num_threads} threads, memory read at {result['gb_s']:.1f} GB/s"
    print(f"\n{result['preset']} ({result['dtype']}), {about}")
    print_table(result["prefill"])
    for names in _TABLES:
        print_table(pick(result["rows"], *names))
    for name in ("transformers", "overlap", "baseline"):
        print_table(result[name])
    if result["hidden_host_share"] is not None:
        print(f"host work hidden: {100 * result['hidden_host_share']:.0f} %")
    for line in result["skipped"]:
        print(f"skipped: {line}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static_throughput",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", nargs="+", default=["tiny"], choices=PRESET_NAMES, help="model dimensions")
    add("--batch", nargs="*", type=int, default=[1, 4, 16], help="decoding requests; no number: no decoding")
    add("--context", nargs="+", type=int, default=[128], help="tokens of each request, and of prompts")
    add("--mtp-steps", nargs="+", type=int, default=[0, 1, 3], help="drafts per step; 0 first")
    add("--accept-rate", nargs="+", type=float, default=[], help="probabilities that a draft is right after another")
    add("--acceptance-trace", type=Path, help="file of accept lengths to replay, a JSON list or one per line")
    add("--chunks", nargs="*", type=int, default=[128, 512], help="prompt tokens per step; no number: no prefill")
    add("--steps", type=int, default=32, help="decode steps per round")
    add("--rounds", type=int, default=5, help="rounds; contestants take turns")
    add("--num-threads", type=int, default=2, help="CPU threads, for all contestants")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other settings of the engine, by their field names")
    add("--compare", nargs="+", default=[], choices=["transformers", "overlap"], help="run a peer in the same rounds")
    add("--baseline", type=Path, help="another checkout of this project to compare with")
    add("--trace", type=Path, help="file for a timeline of --steps decode steps (the last preset's)")
    args = parser.parse_args(argv)
    if min([*args.batch, *args.context, *args.chunks, args.steps, args.rounds, args.num_threads]) < 1:
        parser.error("sizes and counts must be at least 1")
    if args.baseline is not None and not (args.baseline / "server" / "llm.py").is_file():
        parser.error(f"--baseline {args.baseline} is no checkout of this project: it has no server/llm.py")
    if args.trace is not None and (args.trace.is_dir() or not args.trace.parent.is_dir()):
        parser.error(f"--trace {args.trace} must be a file in a directory that exists")
    if not all("=" in pair for pair in args.set):
        parser.error(f"--set takes NAME=VALUE, got {' '.join(args.set)}")
    args.set = {name: _parse_value(value) for name, value in (pair.split("=", 1) for pair in args.set)}
    return args


def count_engines(args: argparse.Namespace) -> int:
    """The most models that stand side by side: one per mtp_step, or two that are compared."""
    return max(len(args.mtp_steps), 2 if args.compare or args.baseline is not None else 1)


def _parse_value(text: str) -> Any:
    """JSON, or the word itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(argv: list[str]) -> int:
    """Measure and print; the exit code is 1 where something was left out."""
    args = parse_args(argv)
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    args.acceptances = choose_acceptances(args.accept_rate, args.acceptance_trace)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.num_threads)
    results, refused = [], []
    for name in args.preset:
        try:
            with open_preset(name, count_engines(args), args.device) as preset:
                results.append(measure_preset(preset, args))
        except TooLarge as error:
            refused.append(str(error))
    for result in results:
        print_tables(result, args)
    for line in refused:
        print(f"error: {line}", file=sys.stderr)
    if results:
        print_json("static_throughput", config, results)
    return 1 if refused or any(result["skipped"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
