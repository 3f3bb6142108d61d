"""Does adaptive depth cost anything? `python -m benchmarks.adaptive`.

Half of the requests are word problems, which the demo checkpoint's draft head guesses well, half are random tokens with
sampling settings under which it is mostly wrong. The same requests go through one engine with adaptive depth and with
fixed depths in turns, each with a planner of its own: adaptive depth should be as fast as the best of them. (Two
engines of one process differ by 5 % from where their memory happens to lie.) A second engine has no draft head at all
and tells what having one costs. A request that ends is replaced at once, so that the batch is always full. Speeds of
one kind are those of single requests behind their first token. Prints two tables, and as the last line one JSON object.
"""

import argparse
import copy
import gc
import random
import statistics
import sys
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import trange

from benchmarks.report import print_json, print_table, spread
from benchmarks.word_problems import draw_problem
from benchmarks.workload import Prompt, Served, accept_length, draw_tokens, serve_full
from server.llm import LLM, SamplingParams

KINDS = ("predictable", "unpredictable")
RANDOM_PROMPT_LEN = 40


@dataclass
class Contender:
    """One way of planning on an engine, drafts per request at most, and what its rounds gave: tokens per second of all
    and by kind, and every request's course by kind."""

    name: str
    llm: LLM
    planner: Any
    max_draft: int
    speeds: list[dict[str, float]] = field(default_factory=list)
    served: dict[str, list[Served]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    depths_before: tuple[int, ...] = ()

    def run(self, requests: list[Prompt], batch: int, num_tokens: int) -> None:
        """Serve one round; requests of the two kinds take turns."""
        self.llm.engine.scheduler.planner = self.planner
        requests = [(prompt, replace(params, max_draft=self.max_draft)) for prompt, params in requests]
        served, seconds = serve_full(self.llm, requests, batch, num_tokens)
        speeds = {"all": sum(len(one.token_ids) for one in served) / seconds}
        for index, kind in enumerate(KINDS):
            of_kind = [one for one in served[index::2] if len(one.token_ids) > 1]
            self.served[kind] += of_kind
            speeds[kind] = statistics.median(one.tokens_per_second for one in of_kind)
        self.speeds.append(speeds)

    def forget(self) -> None:
        """What was up to now was warm-up."""
        self.speeds.clear()
        self.served = {kind: [] for kind in KINDS}
        self.depths_before = tuple(self.planner.requests_per_depth)

    def speed(self, kind: str) -> float:
        """Median over the rounds."""
        return statistics.median(speeds[kind] for speeds in self.speeds)

    def ratios(self, other: "Contender", kind: str) -> list[float]:
        """This one's speed over the other's in each round."""
        return [mine[kind] / theirs[kind] for mine, theirs in zip(self.speeds, other.speeds, strict=True)]


def draw_requests(llm: LLM, args: argparse.Namespace, count: int, rng: random.Random) -> list[Prompt]:
    """Predictable and unpredictable requests in turns, all of `--output-len` tokens."""
    known = SamplingParams(temperature=0, ignore_eos=True, max_tokens=args.output_len)
    requests = []
    for index in range(count):
        if index % 2 == 0:
            requests.append((llm.tokenizer.encode(draw_problem(rng)), known))
            continue
        random_params = SamplingParams(
            temperature=args.temperature,
            repetition_penalty=args.repetition_penalty,
            seed=rng.getrandbits(32),
            ignore_eos=True,
            max_tokens=args.output_len,
        )
        requests.append((draw_tokens(rng, RANDOM_PROMPT_LEN, llm.engine.ready.vocab_size), random_params))
    return requests


def make_contenders(batch: int, args: argparse.Namespace) -> list[Contender]:
    """The adaptive one first, the one without a head last."""

    def make_llm(mtp_step: int) -> LLM:
        return LLM(
            mtp_step=mtp_step,
            prefix_cache="off",
            overlap=args.overlap,
            max_running_requests=batch,
            max_model_len=512 + args.output_len,
            num_threads=args.num_threads,
        )

    llm, plain = make_llm(args.mtp_step), make_llm(0)
    adaptive = llm.engine.scheduler.planner
    contenders = [Contender("adaptive", llm, adaptive, args.mtp_step)]
    for depth in args.fixed:
        planner = copy.deepcopy(adaptive)
        planner.is_adaptive = False
        contenders.append(Contender(f"always-{depth}", llm, planner, depth))
    return [*contenders, Contender("no-head", plain, plain.engine.scheduler.planner, 0)]


def measure(batch: int, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rounds at one batch size, each with new requests: rows per contender, and rows that compare."""
    contenders, rng = make_contenders(batch, args), random.Random(batch)
    num_tokens = max(2, batch) * args.output_len * args.requests_per_row
    count = 3 * num_tokens // args.output_len + batch  # more than any of them can begin
    for number in trange(args.rounds + 1, desc=f"batch {batch}"):
        requests = draw_requests(contenders[0].llm, args, count, rng)
        first = number % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            contender.run(requests, batch, num_tokens)
            if number == 0:
                contender.forget()
    return [describe(batch, one) for one in contenders], compare(batch, contenders)


def describe(batch: int, contender: Contender) -> dict[str, Any]:
    """One row: speeds, accept lengths, share of the plans per depth in percent, and gains in the planner's eyes."""
    planner, served = contender.planner, contender.served
    depths = [now - then for now, then in zip(planner.requests_per_depth, contender.depths_before, strict=True)]
    return {
        "batch": batch,
        "contender": contender.name,
        "tok_s": contender.speed("all"),
        **{f"{kind}_tok_s": contender.speed(kind) for kind in KINDS},
        **{f"{kind}_accept": accept_length(served[kind]) for kind in KINDS},
        "predicted_gain": planner.predicted_gain,
        "measured_gain": planner.measured_gain,
        "depths_percent": "/".join(f"{100 * count / sum(depths):.0f}" for count in depths),
    }


def compare(batch: int, contenders: list[Contender]) -> list[dict[str, Any]]:
    """Rows of adaptive depth against the best of the fixed ones, for all requests and for each kind."""
    adaptive, *fixed, no_head = contenders
    rows = []
    for kind in ("all", *KINDS):
        best = max(fixed, key=lambda one: one.speed(kind))
        rows.append({"batch": batch, "requests": kind, "adaptive_tok_s": adaptive.speed(kind), "best": best.name})
        rows[-1] |= {"best_tok_s": best.speed(kind), **spread("adaptive_over_best", adaptive.ratios(best, kind))}
        rows[-1] |= spread("adaptive_over_no_head", adaptive.ratios(no_head, kind))
    return rows


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptive", description=__doc__)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16], help="requests that decode together")
    parser.add_argument("--mtp-step", type=int, default=3, help="the most drafts of the adaptive engine")
    parser.add_argument("--fixed", nargs="+", type=int, default=[3, 1, 0], help="depths of the others")
    parser.add_argument("--overlap", choices=["auto", "on", "off"], default="auto", help="for all of them")
    parser.add_argument("--output-len", type=int, default=192, help="tokens of every output")
    parser.add_argument("--requests-per-row", type=int, default=1, help="outputs per round, over the batch size")
    parser.add_argument("--temperature", type=float, default=1.5, help="of the unpredictable requests")
    parser.add_argument("--repetition-penalty", type=float, default=2.0, help="of the unpredictable requests")
    parser.add_argument("--rounds", type=int, default=60, help="rounds, whose contenders take turns in being first")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure and print."""
    args = parse_args(argv)
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for batch in args.batch:
        described, compared = measure(batch, args)
        rows, ratios = rows + described, ratios + compared
        gc.collect()
    print_table(rows)
    print_table(ratios)
    print_json("adaptive", vars(args), {"contenders": rows, "ratios": ratios})


if __name__ == "__main__":
    main(sys.argv[1:])
