"""What happens at ten times more requests than rows? `python -m benchmarks.overload [--minutes 5]`.

A fixed number of requests is always in the engine; one that ends is replaced at once. Each is drawn from a small set
whose tokens were computed before, one by one, without drafts and without a prefix cache: every output can be checked.
Reports lost and wrong outputs, the gaps between two messages of a request (ITL) against those of a full batch that
nobody waits for, and the memory of the process over time. Prints tables, and as the last line one JSON object.
"""

import argparse
import dataclasses
import gc
import itertools
import os
import random
import statistics
import sys
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.report import percentile, print_json, print_table
from benchmarks.word_problems import draw_problem
from benchmarks.workload import draw_tokens, serve
from server.llm import LLM, Generate, SamplingParams
from server.messages import Failed, TokenOutput

SHARED_PREFIX_LEN = 200
MAX_MODEL_LEN = 1024
UNLOADED_PROMPT_LEN, UNLOADED_TOKENS = 64, 300
SILENCE_SECONDS = 60.0  # nobody gets a token for so long: what is left is lost

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy-no-draft": {"temperature": 0, "max_draft": 0},
    "seeded-top-p": {"temperature": 0.8, "top_p": 0.95, "seed": 7},
    "seeded-top-k-one-draft": {"temperature": 1.0, "top_k": 40, "seed": 8, "max_draft": 1},
    "seeded-min-p-penalty": {"temperature": 1.2, "min_p": 0.02, "presence_penalty": 0.5, "seed": 9},
}


@dataclass(frozen=True)
class Case:
    """A request with the tokens that it must get."""

    name: str
    prompt: list[int]
    params: SamplingParams
    expected: list[int]


@dataclass
class Open:
    """A request in the engine: its tokens so far, and when its last message came (0.0: none yet)."""

    case: Case
    token_ids: list[int] = field(default_factory=list)
    last_seen: float = 0.0


class Population:
    """Keeps a number of requests in the engine and checks what they get. Gaps between messages are in milliseconds."""

    def __init__(self, llm: LLM, cases: list[Case], fresh_share: float):
        self.llm, self.cases, self.fresh_share = llm, cases, fresh_share
        self.rng = random.Random(2)
        self.open: dict[str, Open] = {}
        self.gaps = array("f")  # four bytes each: the memory of this process is what is measured
        self.wrong: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.num_added = self.num_finished = self.num_tokens = 0

    def fill(self, size: int) -> None:
        """Add requests until there are `size`."""
        while len(self.open) < size:
            case, request_id = self.rng.choice(self.cases), str(self.num_added)
            self.open[request_id] = Open(case)
            self.num_added += 1
            salt = request_id if self.rng.random() < self.fresh_share else ""  # its own: nothing to reuse
            self.llm.engine.add(Generate(request_id, case.prompt, case.params, cache_salt=salt))

    def step(self) -> int:
        """One engine step; the number of messages that it gave."""
        outputs = self.llm.engine.step()
        now = time.perf_counter()
        for output in outputs:
            self._take(output, now)
        return len(outputs)

    def _take(self, output: TokenOutput | Failed, now: float) -> None:
        request = self.open[output.request_id]
        if isinstance(output, Failed):
            self.failed[f"{output.error}: {output.message}"] += 1
            del self.open[output.request_id]
            return
        if request.last_seen:
            self.gaps.append(1e3 * (now - request.last_seen))
        request.last_seen = now
        request.token_ids += output.token_ids
        self.num_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self.num_finished += 1
            self.wrong[request.case.name] += request.token_ids != request.case.expected
            del self.open[output.request_id]


def make_cases(args: argparse.Namespace) -> list[Case]:
    """Prompts of all kinds with all samplings, and their tokens by an engine that serves them one by one."""
    llm = LLM(**model_settings(args), mtp_step=0, overlap="off", prefix_cache="off", max_running_requests=1)
    rng = random.Random(0)
    shared = draw_tokens(rng, SHARED_PREFIX_LEN, llm.engine.ready.vocab_size)
    cases = []
    for number, (name, sampling) in itertools.product(range(args.variants), SAMPLINGS.items()):
        for kind, prompt in draw_prompts(llm, shared, rng).items():
            params = SamplingParams(**sampling, max_tokens=rng.randint(16, args.max_tokens), ignore_eos=number % 2 == 0)
            cases.append((f"{kind} {name} {number}", prompt, params))
    return [
        Case(name, prompt, params, serve(llm, [(prompt, params)])[0].token_ids)
        for name, prompt, params in tqdm(cases, desc="expected tokens")
    ]


def draw_prompts(llm: LLM, shared: list[int], rng: random.Random) -> dict[str, list[int]]:
    """One prompt of each kind."""
    vocab_size = llm.engine.ready.vocab_size
    return {
        "problem": llm.tokenizer.encode(draw_problem(rng)),
        "short": draw_tokens(rng, rng.randint(1, 60), vocab_size),
        "long": draw_tokens(rng, rng.randint(300, 600), vocab_size),
        "shared": shared + draw_tokens(rng, rng.randint(5, 60), vocab_size),
    }


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What both engines have in common."""
    return {"dtype": args.dtype, "max_model_len": MAX_MODEL_LEN, "num_threads": args.num_threads}


def measure_unloaded(llm: LLM, cases: list[Case], args: argparse.Namespace) -> "array[float]":
    """Gaps between messages, in milliseconds, while as many requests decode as there are rows and nobody waits."""
    engine, gaps, rng = llm.engine, array("f"), random.Random(1)
    end = time.perf_counter() + args.unloaded_seconds
    while time.perf_counter() < end:
        for index, case in enumerate(rng.sample(cases, args.rows)):
            endless = dataclasses.replace(case.params, max_tokens=UNLOADED_TOKENS, ignore_eos=True)
            engine.add(Generate(f"unloaded-{index}", case.prompt[:UNLOADED_PROMPT_LEN], endless))
        while engine.scheduler.waiting or not all(request.is_decoding for request in engine.scheduler.running):
            engine.step()
        gaps.extend(_time_until_one_ends(llm))
        for index in range(args.rows):
            engine.abort(f"unloaded-{index}")
        while engine.has_work():
            engine.step()
    return gaps


def _time_until_one_ends(llm: LLM) -> list[float]:
    gaps: list[float] = []
    last_seen: dict[str, float] = {}
    while True:
        outputs, now = llm.engine.step(), time.perf_counter()
        for output in outputs:
            if output.request_id in last_seen:
                gaps.append(1e3 * (now - last_seen[output.request_id]))
            last_seen[output.request_id] = now
        if any(isinstance(output, Failed) or output.finish_reason is not None for output in outputs):
            return gaps


def run_load(population: Population, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Keep the population up for `--minutes`, then let it end: (second, MiB of memory) of every second under load."""
    memory: list[tuple[float, float]] = []
    start = time.perf_counter()
    with tqdm(total=round(60 * args.minutes), desc="load", unit="s") as bar:
        while (seconds := time.perf_counter() - start) < 60 * args.minutes:
            population.fill(args.rows * args.factor)
            population.step()
            if seconds >= len(memory):
                memory.append((seconds, _resident_mib()))
                bar.update(int(seconds) - bar.n)
                bar.set_postfix(finished=population.num_finished, wrong=population.wrong.total())
    return memory


def drain(population: Population) -> None:
    """Step until all have ended, or the engine is silent for too long. What is open then is lost."""
    last_message = time.perf_counter()
    while population.llm.engine.has_work() and time.perf_counter() - last_message < SILENCE_SECONDS:
        if population.step():
            last_message = time.perf_counter()


def _resident_mib() -> float:
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def describe_memory(memory: list[tuple[float, float]]) -> dict[str, float]:
    """Means of the first and the last quarter, and how fast it grew: in all, and in the second half alone."""
    sizes, quarter = [size for _, size in memory], max(1, len(memory) // 4)
    half = memory[len(memory) // 2 :]
    return {
        "first_quarter_mib": statistics.fmean(sizes[:quarter]),
        "last_quarter_mib": statistics.fmean(sizes[-quarter:]),
        "mib_per_minute": 60 * _slope(memory),
        "mib_per_minute_in_second_half": 60 * _slope(half),
    }


def _slope(points: list[tuple[float, float]]) -> float:
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else 0.0


def describe_gaps(unloaded: "array[float]", loaded: "array[float]") -> list[dict[str, Any]]:
    """Rows of 50 and 99 percent: ITL without and with load, and their ratio; least and most of it in a fifth of the
    gaps under load, which are in the order of time."""
    rows = []
    parts = [loaded[len(loaded) * part // 5 : len(loaded) * (part + 1) // 5] for part in range(5)]
    for percent in (50, 99):
        quiet, busy = percentile(unloaded, percent), percentile(loaded, percent)
        ratios = [percentile(part, percent) / quiet for part in parts if part] or [busy / quiet]
        rows.append({"itl": f"p{percent}", "unloaded_ms": quiet, "loaded_ms": busy, "ratio": busy / quiet})
        rows[-1] |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
    return rows


def describe_outputs(population: Population, seconds: float) -> dict[str, Any]:
    """What came of the requests."""
    return {
        "added": population.num_added,
        "finished": population.num_finished,
        "lost": len(population.open),
        "failed": population.failed.total(),
        "wrong": population.wrong.total(),
        "output_tok_s": population.num_tokens / seconds,
    }


def describe_engine(llm: LLM) -> dict[str, Any]:
    """Counts since the start of the engine, the unloaded part included."""
    stats = llm.engine.stats()
    return {
        "preemptions": stats.num_preemptions,
        "prompt_tokens": stats.num_prompt_tokens,
        "cached_tokens": stats.num_cached_tokens,
        "evicted_pages": stats.num_evicted_pages,
        "evicted_checkpoints": stats.num_evicted_checkpoints,
        "host_hits": stats.num_host_hits,
        "faults": sum(stats.faults.values()),
    }


def describe_cache(llm: LLM) -> dict[str, int]:
    """Admitted requests that found something to reuse, and those that did not by reason, since the engine's start."""
    stats = llm.engine.stats()
    misses = {f"missed, {reason}": count for reason, count in sorted(stats.cache_misses.items()) if count}
    return {"hits": stats.num_cache_hits, **misses}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="time under load")
    parser.add_argument("--rows", type=int, default=8, help="requests that decode at the same time")
    parser.add_argument("--factor", type=int, default=10, help="requests in the engine, over the rows")
    parser.add_argument("--mtp-step", type=int, default=3, help="drafts per decode step, at most")
    parser.add_argument("--overlap", choices=["auto", "on", "off"], default="auto", help="as of the server")
    parser.add_argument("--stream-slowdown", type=float, default=2.0, help="as of the server")
    parser.add_argument("--dtype", default="float32", help="of weights and activations, for expected tokens too")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest output")
    parser.add_argument("--max-total-tokens", type=int, default=2400, help="KV cache: few, so that some are preempted")
    parser.add_argument("--host-cache-bytes", type=int, default=0, help="as of the server")
    parser.add_argument("--fresh-share", type=float, default=0.25, help="share of requests that can reuse no prefix")
    parser.add_argument("--variants", type=int, default=2, help="requests of every kind of prompt and sampling")
    parser.add_argument("--unloaded-seconds", type=float, default=20.0, help="time to measure the unloaded engine")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads")
    return parser.parse_args(argv)


def make_engine(args: argparse.Namespace) -> LLM:
    """The engine under load, as it would serve, with a small KV cache."""
    return LLM(
        **model_settings(args),
        mtp_step=args.mtp_step,
        overlap=args.overlap,
        stream_slowdown=args.stream_slowdown,
        max_running_requests=args.rows,
        max_total_tokens=args.max_total_tokens,
        host_cache_bytes=args.host_cache_bytes,
    )


def main(argv: list[str]) -> None:
    """Measure and print."""
    args = parse_args(argv)
    cases = make_cases(args)
    gc.collect()
    llm = make_engine(args)
    unloaded = measure_unloaded(llm, cases, args)
    population, start = Population(llm, cases, args.fresh_share), time.perf_counter()
    memory = run_load(population, args)
    drain(population)
    outputs = describe_outputs(population, time.perf_counter() - start)
    gaps, engine, cache = describe_gaps(unloaded, population.gaps), describe_engine(llm), describe_cache(llm)
    sizes = describe_memory(memory)
    for table in ([outputs], gaps, [engine], [cache], [sizes]):
        print_table(table)
        print()
    results: dict[str, Any] = {"outputs": outputs, "itl": gaps, "engine": engine, "cache": cache, "memory": sizes}
    results |= {"wrong": dict(+population.wrong), "failed": dict(population.failed)}
    print_json("overload", vars(args), results)


if __name__ == "__main__":
    main(sys.argv[1:])
