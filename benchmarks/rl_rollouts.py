"""RL runs against a rollout server: `python -m benchmarks.rl_rollouts`.

Runs the recipes in models/training/rl/recipes, each with a server of its own: weights that travel whole (full), and
only what has changed (delta). Rewards must rise, and both servers must end with the same bits. Then a policy drifts far
from the checkpoint (drift), once with a draft head that is trained along and once with one that stays. Both servers,
and a new one with `--mtp-step 0` that loads the trained policy from disk, answer the same prompts in turns, and give
the same tokens: no speculation, frozen head, synced head.

The runs themselves are `python -m models.training.rl`. Prints tables, and as the last line one JSON object; the exit
code is 1 where a claim does not hold.
"""

import argparse
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.openai_server import RunFailed, Server
from benchmarks.report import print_json, print_table, spread
from benchmarks.serving.launch import launched_servers

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "models" / "training" / "rl" / "recipes"
LEAST_RISE = 0.1
LEAST_GAIN = 2.0
TIMEOUT_SECONDS = 600.0


@dataclass
class Row:
    """A server that holds the policy, and what it gave in each round: tokens per second, drafts proposed and taken."""

    name: str
    server: Server
    speeds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    proposed: int = 0
    accepted: int = 0

    def ask(self, prompts: Sequence[Sequence[int]], max_tokens: int, parallel: int) -> None:
        """Answer all prompts once."""
        start = time.perf_counter()
        with ThreadPoolExecutor(parallel) as pool:
            answers = list(pool.map(lambda index: self._ask(index, prompts[index], max_tokens), range(len(prompts))))
        seconds = time.perf_counter() - start
        self.tokens = [answer["output_ids"] for answer in answers]
        self.speeds.append(sum(map(len, self.tokens)) / seconds)
        self.proposed += sum(answer["meta_info"]["spec_draft_token_num"] for answer in answers)
        self.accepted += sum(answer["meta_info"]["spec_accept_token_num"] for answer in answers)

    def _ask(self, seed: int, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        params: dict[str, Any] = {
            "temperature": 1.0,
            "max_new_tokens": max_tokens,
            "ignore_eos": True,
            "sampling_seed": seed,
        }
        return self.server.send("/generate", {"input_ids": list(prompt), "sampling_params": params})


def launch(recipe: str, args: argparse.Namespace, stack: ExitStack, more: Sequence[str] = ()) -> str:
    """The URL of a server as a recipe, changed by the arguments `more`, asks for it."""
    flags = shlex.join(["--enable-rl", "--speculation", "fixed", "--num-threads", str(args.num_threads)])
    arguments = run_trainer(["--recipe", str(RECIPES / f"{recipe}.yaml"), *more], args)
    [url] = stack.enter_context(launched_servers([f"{arguments.strip()} {flags}"], args.start_timeout))
    return url


def train(recipe: str, url: str, args: argparse.Namespace, more: Sequence[str] = ()) -> dict[str, Any]:
    """Run a recipe, with the arguments `more`, with a server: its summary, and the rewards. Raises RunFailed."""
    steps = ["--set", f"trainer_base.total_train_steps={args.steps}"] if args.steps else []
    words = ["--recipe", str(RECIPES / f"{recipe}.yaml"), "--server", url, *steps, *more]
    start = time.perf_counter()
    *reports, summary = [json.loads(line) for line in run_trainer(words, args).splitlines()]
    return {
        **summary,
        "rewards": [round(report["reward"], 3) for report in reports],
        "logprob_gap": max(report["logprob_gap"] for report in reports),
        "seconds": round(time.perf_counter() - start, 1),
    }


def run_trainer(words: Sequence[str], args: argparse.Namespace) -> str:
    """What `python -m models.training.rl` prints. Raises RunFailed."""
    command = [sys.executable, "-m", "models.training.rl", *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.num_threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RunFailed(f"{shlex.join(command)} ended with status {done.returncode}; the reason stands above")
    return done.stdout


def take_turns(rows: Sequence[Row], args: argparse.Namespace, vocab_size: int) -> list[dict[str, Any]]:
    """Every server answers the same prompts, round after round; the first round is warm-up."""
    rng = random.Random(0)
    prompts = [rng.choices(range(vocab_size), k=4) for _ in range(args.prompts)]
    for number in range(args.rounds + 1):
        first = number % len(rows)
        for row in [*rows[first:], *rows[:first]]:
            row.ask(prompts, args.max_tokens, args.parallel)
            if number == 0:
                row.speeds.clear()
                row.proposed = row.accepted = 0
    plain = rows[0]
    return [
        {
            "row": row.name,
            "acceptance": row.accepted / row.proposed if row.proposed else 0.0,
            "tok_s": statistics.median(row.speeds),
            **spread("over_plain", (mine / other for mine, other in zip(row.speeds, plain.speeds, strict=True))),
            "same_tokens": row.tokens == plain.tokens,
        }
        for row in rows
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All runs and the table. Raises RunFailed."""
    runs = {}
    for recipe in ("full", "delta"):
        with ExitStack() as stack:
            runs[recipe] = train(recipe, launch(recipe, args, stack), args)
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        synced, frozen = (launch("drift", args, stack) for _ in range(2))
        out = str(Path(folder, "trained"))
        runs["drift, synced head"] = train("drift", synced, args, more=["--out", out])
        runs["drift, frozen head"] = train("drift", frozen, args, more=["--set", "trainer_base.mtp.enabled=no"])
        plain = launch("drift", args, stack, ["--set", "engine.mtp_step=0", "--set", f"experiment.model_path={out}"])
        names = {"no speculation": plain, "frozen head": frozen, "synced head": synced}
        rows = [Row(name, Server(url, TIMEOUT_SECONDS)) for name, url in names.items()]
        config = json.loads((ROOT / "models" / "demo" / "config.json").read_text(encoding="utf-8"))
        return {"runs": runs, "rows": take_turns(rows, args, config["vocab_size"])}


def check_claims(results: dict[str, Any]) -> dict[str, bool]:
    """What is claimed, and whether it holds."""
    runs, rows = results["runs"], {row["row"]: row for row in results["rows"]}
    return {
        f"rewards rise by at least {LEAST_RISE:g} in both recipes": all(
            runs[name]["reward_last"] >= runs[name]["reward_first"] + LEAST_RISE for name in ("full", "delta")
        ),
        "some weights of the second recipe travelled as deltas": "delta" in runs["delta"]["transfers"],
        "both servers end with the same bits, the trainer's": len(
            {runs[name][side] for name in ("full", "delta") for side in ("server_sha256", "trainer_sha256")}
        )
        == 1,
        "the policy does not depend on the head": runs["drift, synced head"]["rewards"]
        == runs["drift, frozen head"]["rewards"],
        "with and without drafts the tokens are the same": all(row["same_tokens"] for row in rows.values()),
        f"the synced head's acceptance is at least {LEAST_GAIN:g} times the frozen one's": rows["synced head"][
            "acceptance"
        ]
        >= LEAST_GAIN * rows["frozen head"]["acceptance"]
        and rows["synced head"]["acceptance"] > 0,
    }


def print_results(results: dict[str, Any]) -> None:
    """The tables."""
    print_table(
        [
            {
                "run": name,
                "reward_first": one["reward_first"],
                "reward_last": one["reward_last"],
                "full": one["transfers"].count("full"),
                "delta": one["transfers"].count("delta"),
                "logprob_gap": f"{one['logprob_gap']:.1e}",
                "seconds": one["seconds"],
                "sha256": one["server_sha256"][:12],
            }
            for name, one in results["runs"].items()
        ]
    )
    print()
    print_table(results["rows"])
    for claim, holds in results["claims"].items():
        print(f"{'yes' if holds else 'NO':3} {claim}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl_rollouts",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=0, help="training steps; 0: the recipes' own")
    add("--prompts", type=int, default=32, help="of the table")
    add("--max-tokens", type=int, default=48, help="length of an answer in the table")
    add("--parallel", type=int, default=1, help="requests at a time in the table")
    add("--rounds", type=int, default=5, help="turns of every server")
    add("--num-threads", type=int, default=1, help="CPU threads of every process")
    add("--start-timeout", type=float, default=300.0, help="seconds until a server must be ready")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """The exit code: 0, or 1 where a claim does not hold or, with the reason on stderr, it cannot go on."""
    args = parse_args(argv)
    try:
        results = run(args)
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    results["claims"] = check_claims(results)
    print_results(results)
    print_json("rl_rollouts", vars(args), results)
    return 0 if all(results["claims"].values()) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # launched servers end with this process
    sys.exit(main(sys.argv[1:]))
