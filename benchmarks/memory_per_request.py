"""How many requests fit a byte budget? `python -m benchmarks.memory_per_request [--budget-gib 4]`.

Replay, which the engine does, keeps one GDN state per request and rings of the newest tokens' inputs. Snapshots, the
usual way, keep a state after each of the K + 1 tokens of a verify step and a conv window K tokens wider, and no rings;
they are computed from the same shapes and element sizes. Pages of the KV cache and what is kept for the draft head are
the same for both. Nothing is timed. Prints a table, and as the last line one JSON object.
"""

import argparse
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import PRESETS, write_random_checkpoint
from benchmarks.report import print_json, print_table
from server.llm import LLM

GIB = 2**30
MIB = 2**20


def measure(checkpoint: Path, preset: str, mtp_step: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per context length, from the plan and the tensors of an engine with one row."""
    llm = LLM(
        model=str(checkpoint),
        mtp_step=mtp_step,
        speculation="fixed",
        prefix_cache="off",
        max_running_requests=1,
        max_model_len=64,
        num_threads=1,
    )
    plan, gdn = llm.engine.runner.plan, llm.engine.runner.table.cache.gdn
    sizes, fixed = plan.sizes, {"preset": preset, "mtp_step": mtp_step}
    num_layers, _, _, num_channels = gdn.conv_ring.shape
    window = num_layers * (gdn.conv_width - 1 + mtp_step) * num_channels * gdn.conv_ring.element_size()
    replay = sizes.state + sizes.rings
    snapshots = (mtp_step + 1) * sizes.state + window
    rows = []
    for context_len in args.context_len:
        common = plan.limits.pages_for(context_len) * sizes.page + sizes.history
        budget = int(args.budget_gib * GIB)
        replay_requests, snapshot_requests = budget // (replay + common), budget // (snapshots + common)
        rows.append(
            {
                **fixed,
                "context": context_len,
                "kv_and_history_mib": common / MIB,
                "replay_mib": replay / MIB,
                "snapshots_mib": snapshots / MIB,
                "replay_requests": replay_requests,
                "snapshot_requests": snapshot_requests,
                "ratio": replay_requests / snapshot_requests if snapshot_requests else float("inf"),
            }
        )
    return rows


def run_preset(preset: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one preset."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="tandem-") as name:
        write_random_checkpoint(Path(name), preset)
        for mtp_step in args.mtp_steps:
            rows += measure(Path(name), preset, mtp_step, args)
            gc.collect()
    return rows


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_per_request", description=__doc__)
    parser.add_argument("--preset", nargs="+", default=list(PRESETS), choices=list(PRESETS), help="model dimensions")
    parser.add_argument("--mtp-steps", nargs="+", type=int, default=[3], help="drafts per step")
    parser.add_argument("--context-len", nargs="+", type=int, default=[1024, 8192, 32768], help="tokens per request")
    parser.add_argument("--budget-gib", type=float, default=4.0, help="memory for the state of requests")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Compute and print."""
    args = parse_args(argv)
    rows = [row for preset in args.preset for row in run_preset(preset, args)]
    print_table(rows)
    print_json("memory_per_request", vars(args), rows)


if __name__ == "__main__":
    main(sys.argv[1:])
