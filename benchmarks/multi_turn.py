"""What does the prefix cache save? `python -m benchmarks.multi_turn`.

Two questions, each to an engine with the cache and to one without, in turns. How soon does the first token of every
turn of a conversation come (TTFT), and how much of what was there before is reused? And how many tokens are reused by
many requests that share a prefix, first 700 tokens and then 100 more, against a cache of an attention-only model, which
could reuse any whole page? Prints tables, and as the last line one JSON object.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.random_checkpoint import PRESETS, write_random_checkpoint
from benchmarks.report import print_json, print_table, spread
from benchmarks.workload import Prompt, draw_tokens, serve
from server.llm import LLM, SamplingParams

SYSTEM_LEN, MESSAGE_LEN, ANSWER_LEN, SEPARATOR_LEN = 200, 40, 60, 3
SHARED_LENS, UNIQUE_LEN = (700, 800), 30
ROWS = 16

Engines = dict[str, LLM]


class Tokens:
    """Random tokens that never begin a turn of a chat by chance, and the separator that does, if the model has such."""

    def __init__(self, llm: LLM, seed: int):
        self.rng, self.turn_ids = random.Random(seed), llm.engine.runner.turn_ids
        self.vocab_size = llm.engine.ready.vocab_size
        self.separator = [*self.draw(SEPARATOR_LEN - 1), *(sorted(self.turn_ids)[:1] or self.draw(1))]

    def draw(self, count: int) -> list[int]:
        """That many tokens."""
        plain_id = next(token_id for token_id in range(self.vocab_size) if token_id not in self.turn_ids)
        drawn = draw_tokens(self.rng, count, self.vocab_size)
        return [plain_id if token_id in self.turn_ids else token_id for token_id in drawn]


@contextmanager
def checkpoint(name: str) -> Iterator[dict[str, Any]]:
    """The `model` setting for the bundled demo, or for a preset of random_checkpoint."""
    if name == "demo":
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="tandem-") as directory:
        write_random_checkpoint(Path(directory), name)
        yield {"model": directory}


def make_engines(model: dict[str, Any], args: argparse.Namespace) -> Engines:
    """One with a prefix cache and one without."""
    return {
        cache: LLM(
            **model,
            prefix_cache=cache,
            mtp_step=args.mtp_step,
            overlap=args.overlap,
            max_running_requests=ROWS,
            max_model_len=SYSTEM_LEN + args.turns * (MESSAGE_LEN + ANSWER_LEN + SEPARATOR_LEN) + SHARED_LENS[-1],
            num_threads=args.num_threads,
        )
        for cache in ("on", "off")
    }


def converse(engines: Engines, tokens: Tokens, system: list[int], num_turns: int, first: int) -> list[dict[str, Any]]:
    """One conversation, each turn with both engines, which take turns in being first: a sample per turn.

    Both get the answers of the engine with the cache. What is reused is a share of the system prompt at the first turn,
    then of the last prompt and its answer. "is_different": the two gave different answers, which only rounding may do.
    """
    answer_all = SamplingParams(temperature=0, ignore_eos=True, max_tokens=ANSWER_LEN)
    prompt, reusable, samples = system + tokens.draw(MESSAGE_LEN), SYSTEM_LEN, []
    for turn in range(num_turns):
        order = ("on", "off") if (first + turn) % 2 == 0 else ("off", "on")
        served = {cache: serve(engines[cache], [(prompt, answer_all)])[0] for cache in order}
        on, off = served["on"], served["off"]
        samples.append(
            {
                "prompt": len(prompt),
                "on": on.first_seconds,
                "off": off.first_seconds,
                "cached": on.num_cached,
                "reused": on.num_cached / reusable,
                "is_different": on.token_ids != off.token_ids,
            }
        )
        reusable = len(prompt) + len(on.token_ids)
        prompt = prompt + on.token_ids + tokens.separator + tokens.draw(MESSAGE_LEN)
    return samples


def measure_conversations(name: str, engines: Engines, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows per turn over all conversations, which share the system prompt; one with another warms up before them."""
    tokens = Tokens(engines["on"], seed=0)
    converse(engines, tokens, tokens.draw(SYSTEM_LEN), args.turns, 0)
    system, by_turn = tokens.draw(SYSTEM_LEN), defaultdict(list)
    for number in tqdm(range(args.conversations), desc=f"{name}: conversations"):
        for turn, sample in enumerate(converse(engines, tokens, system, args.turns, number), start=1):
            by_turn[turn].append(sample)
    return [describe_turn(name, turn, samples) for turn, samples in by_turn.items()]


def describe_turn(name: str, turn: int, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One row over all conversations: times are medians, counts are means."""
    return {
        "model": name,
        "turn": turn,
        "prompt": samples[0]["prompt"],
        "ttft_on_ms": 1e3 * statistics.median(sample["on"] for sample in samples),
        "ttft_off_ms": 1e3 * statistics.median(sample["off"] for sample in samples),
        **spread("off_over_on", (sample["off"] / sample["on"] for sample in samples)),
        "cached": statistics.fmean(sample["cached"] for sample in samples),
        "reused_percent": 100 * statistics.fmean(sample["reused"] for sample in samples),
        "different": sum(sample["is_different"] for sample in samples),
    }


def draw_workload(tokens: Tokens, prefix: list[int], args: argparse.Namespace) -> list[list[int]]:
    """Prompts that share the prefix."""
    return [prefix + tokens.draw(UNIQUE_LEN) for _ in range(args.requests)]


def count_reusable(prompts: list[list[int]], page_size: int) -> list[int]:
    """Tokens of each prompt that are in whole pages of some prompt before it: what attention alone could reuse."""
    seen: set[tuple[int, ...]] = set()
    counts = []
    for prompt in prompts:
        ends = range(page_size, len(prompt), page_size)
        counts.append(max((end for end in ends if tuple(prompt[:end]) in seen), default=0))
        seen |= {tuple(prompt[:end]) for end in ends}
    return counts


def run_workload(llm: LLM, prompts: list[list[int]]) -> dict[str, float]:
    """Prompt tokens per second, and how many of them were reused; one output token each."""
    requests: list[Prompt] = [(prompt, SamplingParams(temperature=0, max_tokens=1)) for prompt in prompts]
    start = time.perf_counter()
    served = serve(llm, requests)
    seconds = time.perf_counter() - start
    return {"speed": sum(map(len, prompts)) / seconds, "cached": sum(one.num_cached for one in served)}


def measure_workloads(name: str, engines: Engines, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows per workload, medians over rounds with new prompts and an empty cache; the first round warms up."""
    samples: dict[int, list[dict[str, Any]]] = {shared_len: [] for shared_len in SHARED_LENS}
    for number in tqdm(range(args.rounds + 1), desc=f"{name}: shared prefixes"):
        tokens = Tokens(engines["on"], seed=1 + number)
        prefix = tokens.draw(SHARED_LENS[-1])
        earlier: list[list[int]] = []
        engines["on"].engine.flush_cache()
        for shared_len in SHARED_LENS:
            prompts = draw_workload(tokens, prefix[:shared_len], args)
            reusable = sum(count_reusable(earlier + prompts, engines["on"].config.page_size)[len(earlier) :])
            order = ("on", "off") if number % 2 == 0 else ("off", "on")
            results = {cache: run_workload(engines[cache], prompts) for cache in order}
            samples[shared_len] += [results | {"reusable": reusable}] if number else []
            earlier += prompts
    return [describe_workload(name, shared_len, args, samples[shared_len]) for shared_len in SHARED_LENS]


def describe_workload(
    name: str, shared_len: int, args: argparse.Namespace, samples: list[dict[str, Any]]
) -> dict[str, Any]:
    """One row: medians over the rounds."""
    cached = statistics.median(sample["on"]["cached"] for sample in samples)
    reusable = statistics.median(sample["reusable"] for sample in samples)
    return {
        "model": name,
        "shared_prefix": shared_len,
        "prompt_tokens": args.requests * (shared_len + UNIQUE_LEN),
        "cached": int(cached),
        "attention_could": int(reusable),
        "cached_percent": 100 * cached / reusable,
        "tok_s_on": statistics.median(sample["on"]["speed"] for sample in samples),
        "tok_s_off": statistics.median(sample["off"]["speed"] for sample in samples),
        **spread("on_over_off", (sample["on"]["speed"] / sample["off"]["speed"] for sample in samples)),
    }


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multi_turn", description=__doc__)
    models = ["demo", *PRESETS]
    parser.add_argument("--model", nargs="+", default=["demo", "tiny"], choices=models, help="demo, or random weights")
    parser.add_argument("--mtp-step", type=int, default=1, help="drafts per decode step, at most")
    parser.add_argument("--overlap", choices=["auto", "on", "off"], default="auto", help="for both engines")
    parser.add_argument("--turns", type=int, default=8, help="turns per conversation")
    parser.add_argument("--conversations", type=int, default=8, help="one after the other")
    parser.add_argument("--requests", type=int, default=64, help=f"requests per shared prefix, {ROWS} at a time")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the shared prefixes")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure and print."""
    args = parse_args(argv)
    turns, workloads = [], []
    for name in args.model:
        with checkpoint(name) as model:
            engines = make_engines(model, args)
            turns += measure_conversations(name, engines, args)
            workloads += measure_workloads(name, engines, args)
    print_table(turns)
    print()
    print_table(workloads)
    print_json("multi_turn", vars(args), {"turns": turns, "shared_prefixes": workloads})


if __name__ == "__main__":
    main(sys.argv[1:])
