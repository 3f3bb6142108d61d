"""Does speculation change anything in the precision you serve? `python -m benchmarks.lossless [--model DIR]`.

Greedy outputs of the same prompts, served concurrently, at every mtp_step, against those at mtp_step 0. In float64 any
difference is a bug (the tests demand none). In float32 and bfloat16 a prompt's prefill may round differently in another
company of prompts, and a near tie between two tokens can then fall the other way; decode steps of up to 64 rows are bit
for bit the same wherever the C++ kernels run. Prints a table, and as the last line one JSON object.
"""

import argparse
import random
import sys
from typing import Any

from benchmarks.report import print_json, print_table
from server.llm import LLM, Output, SamplingParams


def generate(args: argparse.Namespace, dtype: str, mtp_step: int) -> list[Output]:
    """All outputs at one setting."""
    settings: dict[str, Any] = {"model": args.model} if args.model else {}
    settings |= {"speculation": "fixed", "num_threads": args.num_threads}  # a planner would rather not draft here
    llm = LLM(dtype=dtype, mtp_step=mtp_step, max_model_len=1024, **settings)
    rng, vocab_size = random.Random(0), llm.engine.ready.vocab_size
    prompts = [[rng.randrange(vocab_size) for _ in range(rng.randint(1, 130))] for _ in range(args.num_prompts)]
    return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True))


def compare(args: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """One row per mtp_step: outputs that differ from those at 0, and the mean accept length."""
    rows = []
    plain = generate(args, dtype, 0)
    for mtp_step in args.mtp_steps:
        outputs = generate(args, dtype, mtp_step)
        num_different = sum(a.token_ids != b.token_ids for a, b in zip(outputs, plain, strict=True))
        accept_length = sum(output.accept_length for output in outputs) / len(outputs)
        rows.append(
            {
                "dtype": dtype,
                "mtp_step": mtp_step,
                "outputs": len(outputs),
                "different": num_different,
                "accept_length": accept_length,
            }
        )
    return rows


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lossless", description=__doc__)
    parser.add_argument("--model", help="checkpoint directory; the bundled demo when not given")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32", "float64"], help="precisions to try")
    parser.add_argument("--mtp-steps", nargs="+", type=int, default=[1, 2, 3, 4], help="drafts per step")
    parser.add_argument("--num-prompts", type=int, default=200, help="prompts of 1..130 random tokens")
    parser.add_argument("--max-tokens", type=int, default=48, help="output tokens each")
    parser.add_argument("--num-threads", type=int, default=None, help="CPU threads; default: the cores there are")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure and print."""
    args = parse_args(argv)
    rows = [row for dtype in args.dtype for row in compare(args, dtype)]
    print_table(rows)
    print_json("lossless", vars(args), rows)


if __name__ == "__main__":
    main(sys.argv[1:])
