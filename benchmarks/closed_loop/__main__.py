"""The closed loop of reinforcement learning with a draft head, in one command: `python -m benchmarks.closed_loop`.

A policy that learns moves away from the head that drafts for it. Each step is a process of its own, and servers are
asked over HTTP:

1. The checkpoint (--model) answers word problems, with its own head.
2. The policy is shifted: its trunk learns to write these answers in another style, its head stands still.
3. The shifted policy writes answers of its own, and its head alone is trained on them.
4. Three servers of the shifted policy, "plain" without drafts, "frozen" with the old head and "trained" with the new
   one, take turns in answering problems that nothing was trained on.

Acceptance is accepted over proposed drafts, by the servers' counters. All three must give the same token ids: greedily
and, with --sampled, at temperature 1 under the same seeds. Under different seeds, the first tokens of a text must then
be of the same distribution by a chi-square test. Prints tables, and as the last line one JSON object. The exit code is
1 where that does not hold, or acceptance is not doubled by the trained head.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.closed_loop.distributions import are_alike
from benchmarks.closed_loop.loop import Loop
from benchmarks.openai_server import RunFailed
from benchmarks.report import print_json, print_table

DEMO = str(Path(__file__).resolve().parents[2] / "models" / "demo")
LEAST_GAIN = 2.0  # acceptance with the trained head over that with the frozen one


def check_claims(results: dict[str, Any]) -> dict[str, bool]:
    """What is claimed, and whether it holds."""
    acceptance = {row["server"]: row["acceptance"] or 0.0 for row in results["greedy"]["servers"]}
    shift, training = results["changed_tensors"]["shift"], results["changed_tensors"]["training"]
    claims = {
        "the shift changed the trunk, and no byte of the head": shift["trunk"] > 0 and shift["head"] == 0,
        "the training changed the head, and no byte of the trunk": training["head"] > 0 and training["trunk"] == 0,
        f"the trained head's acceptance is at least {LEAST_GAIN:g} times the frozen one's": acceptance["trained"] > 0
        and acceptance["trained"] >= LEAST_GAIN * acceptance["frozen"],
        "greedy answers have the same tokens": not results["greedy"]["differences"],
    }
    if "sampled" in results:
        claims["sampled answers have the same tokens under the same seeds"] = not results["sampled"]["differences"]
        claims["sampled tokens are of one distribution"] = are_alike(results["distributions"])
    return claims


def print_results(results: dict[str, Any]) -> None:
    """The tables, and every answer that differs."""
    for kind in ("greedy", "sampled"):
        if kind in results:
            print(f"{kind} answers to held-out prompts")
            print_table([_shown(row) for row in results[kind]["servers"]])
            for found in results[kind]["differences"]:
                print(f"{found['server']} differs at token {found['token']}: {json.dumps(found)}")
            print()
    if "distributions" in results:
        print("first tokens against those of the plain server")
        print_table(results["distributions"])
        print()
    print("before the shift: " + ", ".join(f"{name} {value}" for name, value in _shown(results["original"]).items()))
    print("seconds: " + ", ".join(f"{name} {seconds:g}" for name, seconds in results["seconds"].items()))
    for claim, holds in results["claims"].items():
        print(f"{'yes' if holds else 'NO':3} {claim}")


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: "-" if value is None else _rounded(name, value) for name, value in row.items()}


def _rounded(name: str, value: Any) -> Any:
    return f"{value:.3f}" if name in ("acceptance", "accept_length", "in_style") else value


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.closed_loop",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=DEMO, help="checkpoint directory")
    add("--keep", metavar="DIR", help="write texts and checkpoints to this new directory, and leave them there")
    add("--prompts", type=int, default=512, help="problems whose answers are trained on")
    add("--held-out", type=int, default=32, help="problems that are measured on")
    add("--max-tokens", type=int, default=96, help="longest answer")
    add("--shift-steps", type=int, default=160, help="training steps of the trunk")
    add("--head-steps", type=int, default=200, help="training steps of the head")
    add("--batch-tokens", type=int, default=1024, help="tokens of a batch in both trainings")
    add("--target-rate", type=float, default=2e-3, help="peak learning rate of the trunk")
    add("--rate", type=float, default=3e-3, help="peak learning rate of the head")
    add("--speculation", choices=["fixed", "adaptive"], default="fixed", help="adaptive: may stop to draft")
    add("--parallel", type=int, default=1, help="requests at a time in the measurements")
    add("--rounds", type=int, default=5, help="turns of every server")
    add("--sampled", action="store_true", help="measure at temperature 1, too")
    add("--samples", type=int, default=2000, help="texts per server whose first tokens are counted, with --sampled")
    add("--num-threads", type=int, default=1, help="CPU threads of every process")
    add("--start-timeout", type=float, default=300.0, help="seconds until a server must be ready")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raises RunFailed for numbers out of range, and for a folder that is there already."""
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
            raise RunFailed(f"--{name.replace('_', '-')} is {value}, it must be above 0")
    if 2 * args.held_out >= args.prompts:
        raise RunFailed(f"--held-out is {args.held_out}, it must be below half of --prompts {args.prompts}")
    if args.keep and Path(args.keep).exists():
        raise RunFailed(f"--keep {args.keep} is there already: give a new directory")


def measure(args: argparse.Namespace) -> bool:
    """Run the loop and print; whether all claims hold. Raises RunFailed."""
    check_args(args)
    with tempfile.TemporaryDirectory(prefix="tandem-") as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = Loop(args, folder).run()
    results["claims"] = check_claims(results)
    print_results(results)
    print_json("closed_loop", vars(args), results)
    return all(results["claims"].values())


def main(argv: list[str]) -> int:
    """The exit code: 0, or 1 where a claim does not hold or, with the reason on stderr, the loop cannot go on."""
    try:
        return 0 if measure(parse_args(argv)) else 1
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # launched servers end with this process
    sys.exit(main(sys.argv[1:]))
