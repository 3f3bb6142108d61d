"""Is this checkout slower than a commit? `python -m benchmarks.regression [--against HEAD~1]`.

The commit is checked out in a git worktree in a temporary directory, and both run a short set in turns, each in a
process of its own: decode steps of tiny random weights and of the demo, whose drafts are really accepted, over batch
and mtp_step, and the prefill of 512 random tokens. A row has the ratio of the rounds' speeds, its median and the
interval in which that lies with 95 % confidence. The exit code is 1 where even the upper end of an interval is below
--tolerance, so noise alone hardly fails it. Prints a table, and as the last line one JSON object.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.report import print_json, print_table
from benchmarks.versions import HERE, Task, compare_versions
from benchmarks.word_problems import draw_problem
from server.config import DEMO_MODEL

BATCHES, MTP_STEPS = (1, 4, 16), (0, 1, 3)
_PROMPT_LEN, _PREFILL_LEN, _NUM_PROMPTS = 64, 512, 2


@contextmanager
def worktree(revision: str) -> Iterator[tuple[Path, str]]:
    """A checkout of the revision that lasts as long as this, and its commit. Raises SystemExit if there is none."""
    commit = _git("rev-parse", "--verify", "--short", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="tandem-") as directory:
        root = Path(directory) / "checkout"
        _git("worktree", "add", "--detach", "--quiet", str(root), commit)
        try:
            yield root, commit
        finally:
            _git("worktree", "remove", "--force", str(root))


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def make_tasks(tiny: Path, args: argparse.Namespace) -> dict[tuple[str, int, int], Task]:
    """By what names a row: (model, batch, mtp_step); batch 0 is the prefill."""
    tasks = {}
    for model, directory in (("tiny", str(tiny)), ("demo", DEMO_MODEL)):
        for mtp_step in MTP_STEPS:
            for batch in BATCHES:
                tasks[model, batch, mtp_step] = _decode_task(directory, batch, mtp_step, model == "demo", args)
        settings = {
            "model": directory,
            "prefix_cache": "off",
            "num_threads": args.num_threads,
            "max_running_requests": 1,
        }
        tasks[model, 0, 0] = Task(settings | {"max_model_len": 2 * _PREFILL_LEN}, 0, _PREFILL_LEN, _NUM_PROMPTS)
    return tasks


def _decode_task(directory: str, batch: int, mtp_step: int, has_text: bool, args: argparse.Namespace) -> Task:
    rng = random.Random(batch)
    texts = tuple(draw_problem(rng) for _ in range(batch)) if has_text else ()
    settings = {
        "model": directory,
        "mtp_step": mtp_step,
        "speculation": "fixed",
        "prefix_cache": "off",
        "max_running_requests": batch,
        "max_model_len": 2 * _PROMPT_LEN + (args.rounds + 2) * args.steps * (mtp_step + 1) + batch,
        "num_threads": args.num_threads,
    }
    return Task(settings, batch, _PROMPT_LEN, args.steps, texts)


def judge(named: dict[tuple[str, int, int], dict[str, float]], tolerance: float) -> list[dict[str, Any]]:
    """The rows, each with whether it `holds`."""
    return [
        {
            "model": model,
            "what": f"decode, batch {batch}" if batch else f"prefill, {_PREFILL_LEN} tokens",
            "mtp_step": mtp_step,
            **speeds,
            "holds": speeds["new_over_old_max"] >= tolerance,
        }
        for (model, batch, mtp_step), speeds in named.items()
    ]


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.regression",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--against", default="HEAD~1", help="the commit to compare with")
    add("--tolerance", type=float, default=0.95, help="least ratio of the speeds, this one's over the commit's")
    add("--steps", type=int, default=24, help="decode steps per round")
    add("--rounds", type=int, default=9, help="rounds; both take turns")
    add("--num-threads", type=int, default=2, help="CPU threads of each process")
    args = parser.parse_args(argv)
    if min(args.steps, args.rounds, args.num_threads) < 1 or args.tolerance <= 0:
        parser.error("all numbers must be above 0")
    return args


def main(argv: list[str]) -> int:
    """Measure and print; the exit code is 1 if something has become slower."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="tandem-") as tiny, worktree(args.against) as (root, commit):
        write_random_checkpoint(Path(tiny), "tiny")
        tasks = make_tasks(Path(tiny), args)
        speeds = compare_versions(root, list(tasks.values()), args.rounds)
    rows = judge(dict(zip(tasks, speeds, strict=True)), args.tolerance)
    print_table(rows)
    slower = [row for row in rows if not row["holds"]]
    print(f"{len(slower)} of {len(rows)} are slower than {args.tolerance:g} times {commit}")
    print_json("regression", vars(args) | {"commit_before": commit}, rows)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
