"""What was measured -> the results of the JSON object."""

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.openai_server import Server
from benchmarks.serving.comparison import compare, find_differences
from benchmarks.serving.measure import Measured, Result
from benchmarks.serving.summary import summarize


def describe(measured: Measured, servers: Sequence[tuple[str, Server]], args: argparse.Namespace) -> dict[str, Any]:
    """Per load, one entry for each server that had a round of it; the comparison stands with those after the first."""
    dataset, names = measured.dataset, [name for name, _ in servers]
    size = {"size": dataset.size, "asked": measured.num_asked, "skipped": dataset.skipped, "unit": measured.prompt_unit}
    return {
        "is_partial": measured.is_partial,
        "dataset": size,
        "servers": [{"server": name, "url": one.url, "model": args.model or one.model} for name, one in servers],
        "loads": [_describe_load(result, names, args) for result in measured.results if any(result.rounds)],
    }


def _describe_load(result: Result, names: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    pairs = zip(names, result.rounds, strict=True)
    rows = {place: {"server": name, **summarize(own, args.goodput)} for place, (name, own) in enumerate(pairs) if own}
    if len(names) > 1:
        for place, comparison in enumerate(compare(result.rounds)):
            rows[place]["comparison"] = comparison
    if args.temperature == 0:
        for place in rows.keys() - {0}:
            rows[place]["differences"] = find_differences(result.rounds[0], result.rounds[place])
    return {"kind": result.load.kind, "value": _plain(result.load.value), "servers": list(rows.values())}


def _plain(value: float) -> float | str:
    """JSON has no infinity."""
    return "inf" if value == float("inf") else value
