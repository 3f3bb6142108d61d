"""Engines without HTTP, side by side: decode steps of several batches, and prompts of a long one.

Contestants take turns in every round and get the same prompts. Each peer is held against the Tandem whose weights have
as many bits, or nearly: llama.cpp's own Q4_0 keeps the head in Q6_K. `same_tokens` is the share of greedy tokens before
the first that differs from those of the first contestant: near 1 for the same weights, where they are trained; rounding
decides between random ones.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from benchmarks.openai_server import RunFailed
from benchmarks.peers.checkpoints import DEMO, Checkpoint, find_checkpoint
from benchmarks.peers.child import Tokens
from benchmarks.peers.contestant import Contestant, start
from benchmarks.report import print_json, print_table, spread
from benchmarks.word_problems import draw_problem

# Each with the Tandem that its ratios are of.
RIVALS = {
    "tandem": "tandem",
    "tandem-int8": "tandem-int8",
    "tandem-int4": "tandem-int4",
    "transformers": "tandem",
    "llama.cpp": "tandem",
    "llama.cpp-Q8_0": "tandem-int8",
    "llama.cpp-Q4_0": "tandem-int4",
}
PREFILL, DECODE = "prefill", "decode"


@dataclass
class Work:
    """Prompts to ask all contestants, the steps behind them, and what came of it: an answer per round."""

    kind: str
    prompts: list[Tokens]
    num_steps: int
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def seconds(self, name: str) -> list[float]:
        """Of a prefill, or of a decode step, in each round."""
        if self.kind == PREFILL:
            return [answer["prefill_seconds"] for answer in self.answers[name]]
        return [answer["decode_seconds"] / self.num_steps for answer in self.answers[name]]


def draw_works(checkpoint: Checkpoint, args: argparse.Namespace) -> list[Work]:
    """The same for the same seed: word problems for the demo, else tokens that mean nothing."""
    rng = random.Random(args.seed)

    is_demo = checkpoint.directory == DEMO
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))

    def draw(length: int) -> Tokens:
        if not is_demo:
            return [rng.randrange(1, checkpoint.config["vocab_size"]) for _ in range(length)]
        tokens: Tokens = []
        while len(tokens) < length:
            tokens = tokenizer.encode(draw_problem(rng)).ids + tokens
        return tokens[-length:]

    works = [Work(DECODE, [draw(args.prompt_len) for _ in range(batch)], args.steps) for batch in args.batch]
    return works + [Work(PREFILL, [draw(length)], 0) for length in args.prefill]


def measure(contestants: Sequence[Contestant], works: Sequence[Work], num_rounds: int) -> dict[str, str]:
    """Fill in the answers; the first round warms up. Contestants that end are left out from then on: why, by name.
    After Ctrl-C there is what there is."""
    failures: dict[str, str] = {}
    for work in works:
        work.answers = {one.name: [] for one in contestants}
    turns = [
        (number, work, place) for number in range(num_rounds + 1) for work in works for place in range(len(contestants))
    ]
    try:
        for number, work, place in tqdm(turns, desc="rounds"):
            one = contestants[(place + number) % len(contestants)]
            if one.name in failures:
                continue
            try:
                answer = one.ask({"prompts": work.prompts, "num_steps": work.num_steps})
            except RunFailed as failure:
                failures[one.name] = str(failure)
                continue
            if number:
                work.answers[one.name].append(answer)
    except KeyboardInterrupt:
        print("interrupted: the tables have the rounds until here", file=sys.stderr)
    return failures


def describe(works: Sequence[Work]) -> dict[str, list[dict[str, Any]]]:
    """Rows per kind of work: milliseconds with their spread, and the ratio to Tandem's of the same round."""
    tables: dict[str, list[dict[str, Any]]] = {DECODE: [], PREFILL: []}
    for work in works:
        names = [name for name, answers in work.answers.items() if answers]
        for name in names:
            tables[work.kind].append(
                _describe(work, name, RIVALS[name] if RIVALS[name] in names else names[0], names[0])
            )
    return tables


def _describe(work: Work, name: str, rival: str, first: str) -> dict[str, Any]:
    seconds, num_tokens = work.seconds(name), sum(map(len, work.prompts)) if work.kind == PREFILL else len(work.prompts)
    ratios = [own / base for own, base in zip(seconds, work.seconds(rival), strict=False)]
    is_prefill = work.kind == PREFILL
    return {
        **({"prompt": len(work.prompts[0])} if is_prefill else {"batch": len(work.prompts)}),
        **spread("prefill_ms" if is_prefill else "step_ms", (1e3 * one for one in seconds)),
        "tok_s": num_tokens / statistics.median(seconds),
        **spread("ratio", ratios),
        "ratio_to": rival,
        "same_tokens": same_share(work.answers[first][0], work.answers[name][0]),
        "contestant": name,
    }


def same_share(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Share of tokens before the first difference, over all prompts."""
    same = total = 0
    for own, theirs in zip(one["tokens"], other["tokens"], strict=True):
        equal = [a == b for a, b in zip(own, theirs, strict=True)]
        same += equal.index(False) if False in equal else len(equal)
        total += len(equal)
    return same / total


def run(args: argparse.Namespace) -> int:
    """Measure and print; the exit code. Raises RunFailed where nothing can be measured."""
    checkpoint = find_checkpoint(args.checkpoint, args.directory, args.contestants)
    works = draw_works(checkpoint, args)
    longest = max(len(work.prompts[0]) + work.num_steps + 1 for work in works)
    task = {"max_batch": max(len(work.prompts) for work in works), "max_len": longest}
    failures, contestants = {}, []
    with ExitStack() as stack:
        for name in tqdm(args.contestants, desc="starting"):
            try:
                contestants.append(stack.enter_context(start(name, checkpoint, args.directory, args.num_threads, task)))
            except RunFailed as failure:
                failures[name] = str(failure)
        failures |= measure(contestants, works, args.rounds)
    tables = describe(works)
    for rows in tables.values():
        print_table(rows)
        print()
    versions = {one.name: one.version for one in contestants}
    return finish(args, tables | {"versions": versions}, failures, any(tables.values()))


def finish(args: argparse.Namespace, results: dict[str, Any], missing: dict[str, str], is_good: bool) -> int:
    """Say who is missing, print and write the JSON object; the exit code."""
    for name, reason in missing.items():
        print(f"{name} is missing: {reason}")
    line = print_json("peers", args.shown, results | {"missing": missing})
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")
    return 0 if is_good else 1
