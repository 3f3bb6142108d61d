"""Does a long prompt block the others? `python -m benchmarks.long_prompt [--model DIR]`.

Some requests decode; in every second round a long prompt arrives in the middle. Reports the gap between two messages of
a decoding request (ITL) with and without it, beside the time of one prefill chunk alone: no gap should exceed a decode
step plus one chunk. A small `--stream-slowdown` cuts the chunks while others decode. Prints a table, and as the last
line one JSON object.
"""

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import trange

from benchmarks.report import percentile, print_json, print_table, spread
from server.llm import LLM, Generate, SamplingParams, TandemError


def serve_round(llm: LLM, args: argparse.Namespace, has_long_prompt: bool) -> dict[str, list[float]]:
    """Decode `--batch` requests for `--steps` steps.

    In milliseconds: "gaps" between messages of each decoding request, "chunk_steps" that ran a prefill chunk.
    """
    engine, rng = llm.engine, random.Random(0)
    endless = SamplingParams(temperature=0, ignore_eos=True)
    for index in range(args.batch):
        engine.add(Generate(str(index), _draw(rng, 32), endless))
    while not all(request.is_decoding for request in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    last_seen: dict[str, float] = {}
    gaps, chunk_steps = [], []
    for number in range(args.steps):
        if has_long_prompt and number == args.steps // 4:
            engine.add(Generate("long", _draw(rng, args.long_prompt_len), SamplingParams(temperature=0, max_tokens=1)))
        start, prompt_tokens = time.perf_counter(), engine.stats().num_prompt_tokens
        outputs = engine.step()
        now = time.perf_counter()
        if engine.stats().num_prompt_tokens > prompt_tokens:
            chunk_steps.append(1e3 * (now - start))
        for output in outputs:
            if output.request_id in last_seen:
                gaps.append(1e3 * (now - last_seen[output.request_id]))
            last_seen[output.request_id] = now
    for index in range(args.batch):
        engine.abort(str(index))
    engine.abort("long")
    return {"gaps": gaps, "chunk_steps": chunk_steps}


def _draw(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(256) for _ in range(count)]


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per chunk size and case."""
    for chunk_size, stream_slowdown in itertools.product(args.chunked_prefill_size, args.stream_slowdown):
        llm = LLM(
            **({"model": args.model} if args.model else {}),
            mtp_step=args.mtp_step,
            speculation="fixed",
            overlap="off",
            prefix_cache="off",  # every round has the same prompts
            chunked_prefill_size=chunk_size,
            stream_slowdown=stream_slowdown,
            max_running_requests=args.batch + 1,
            max_model_len=4096,
            num_threads=args.num_threads,
        )
        serve_round(llm, args, has_long_prompt=True)
        rounds: dict[bool, list[dict[str, list[float]]]] = {False: [], True: []}
        for number in trange(2 * args.rounds, desc=f"chunk {chunk_size}, slowdown {stream_slowdown:g}"):
            case = number % 2 == 1
            rounds[case].append(serve_round(llm, args, case))
        for case, samples in rounds.items():
            yield {
                "chunk_size": chunk_size,
                "stream_slowdown": stream_slowdown,
                "long_prompt": args.long_prompt_len if case else 0,
                **spread("itl_p50_ms", (percentile(sample["gaps"], 50) for sample in samples)),
                **spread("itl_p99_ms", (percentile(sample["gaps"], 99) for sample in samples)),
                **spread("longest_chunk_step_ms", (max(sample["chunk_steps"], default=0.0) for sample in samples)),
                "steps_with_chunk": sum(len(sample["chunk_steps"]) for sample in samples) / len(samples),
            }


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_prompt", description=__doc__)
    parser.add_argument("--model", help="checkpoint directory; the bundled demo when not given")
    parser.add_argument("--mtp-step", type=int, default=1, help="drafts per decode step")
    parser.add_argument("--batch", type=int, default=8, help="requests that decode")
    parser.add_argument("--long-prompt-len", type=int, default=2000, help="tokens of the prompt that arrives")
    parser.add_argument("--chunked-prefill-size", nargs="+", type=int, default=[128, 512, 2048], help="chunk sizes")
    parser.add_argument("--stream-slowdown", nargs="+", type=float, default=[100, 2], help="100: chunks are not cut")
    parser.add_argument("--steps", type=int, default=80, help="engine steps per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each case, interleaved")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Measure and print; the exit code is 2, with the reason on stderr, where the engine refuses something."""
    args = parse_args(argv)
    rows: list[dict[str, Any]] = []
    status = 0
    try:
        for row in measure(args):
            rows.append(row)
    except TandemError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    if rows:
        print_table(rows)
        print_json("long_prompt", vars(args), rows)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
