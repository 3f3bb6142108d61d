"""Decode speed of the engine without HTTP: `python -m benchmarks.static_throughput [--compare transformers]`.

One question: how long does a decode step take for a batch of B requests that all decode, at each mtp_step? The weights
are random, so drafts are hardly ever accepted; what is measured is the cost of a step, its verify part and its draft
part. With `--compare transformers` the same checkpoint also runs under `transformers.generate`, the rounds of both
interleaved. Prints a table, and as the last line one JSON object.
"""

import argparse
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.random_checkpoint import PRESETS, write_random_checkpoint
from benchmarks.report import print_json, print_table
from server.llm import LLM, Generate, SamplingParams

PROMPT_LEN = 64
EOS_FREE = SamplingParams(temperature=0, ignore_eos=True)


class DecodeBench:
    """B requests past their prompts; `measure` times decode steps of all of them together."""

    def __init__(self, checkpoint: Path, batch: int, mtp_step: int, num_threads: int, room: int):
        lookahead = 2 * mtp_step + 1
        self.engine = LLM(
            model=str(checkpoint),
            mtp_step=mtp_step,
            max_running_requests=batch,
            max_model_len=PROMPT_LEN + room,
            max_total_tokens=batch * (PROMPT_LEN + room + lookahead + 16),
            num_threads=num_threads,
        ).engine
        self.draft_seconds = 0.0
        if self.engine.runner.drafter is not None:
            self.engine.runner.drafter.propose = self._timed(self.engine.runner.drafter.propose)  # type: ignore[method-assign]
        rng = random.Random(0)
        for index in range(batch):
            prompt = [rng.randrange(1, self.engine.ready.vocab_size) for _ in range(PROMPT_LEN)]
            self.engine.add(Generate(str(index), prompt, EOS_FREE))
        scheduler = self.engine.scheduler
        while scheduler.waiting or not all(request.is_decoding for request in scheduler.running):
            self.engine.step()

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            self.draft_seconds += time.perf_counter() - start
            return result

        return timed

    def measure(self, num_steps: int) -> list[dict[str, float]]:
        """Per step: seconds in all, seconds of the draft part, tokens emitted."""
        samples = []
        for _ in range(num_steps):
            self.draft_seconds, start = 0.0, time.perf_counter()
            outputs = self.engine.step()
            seconds = time.perf_counter() - start
            tokens = sum(len(output.token_ids) for output in outputs)
            samples.append({"step": seconds, "draft": self.draft_seconds, "tokens": tokens})
        return samples


class TransformersBench:
    """`transformers.generate` on the same files, greedy, with its cache; prefill is timed apart and subtracted."""

    def __init__(self, checkpoint: Path, batch: int, dtype: str):
        from transformers import Qwen3_5ForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        self.model = Qwen3_5ForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None
        self.prompts = torch.randint(1, self.model.config.vocab_size, (batch, PROMPT_LEN))
        self._generate(2)

    def _generate(self, num_tokens: int) -> float:
        start = time.perf_counter()
        self.model.generate(self.prompts, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
        return time.perf_counter() - start

    def measure(self, num_steps: int) -> float:
        """Seconds per decode step."""
        return (self._generate(num_steps + 1) - self._generate(1)) / num_steps


def compare(checkpoint: Path, batch: int, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    """Interleaved rounds of both at mtp_step 0: median step milliseconds, tokens per second, ratio."""
    ours = DecodeBench(checkpoint, batch, 0, args.num_threads, (args.rounds + 1) * args.steps + 8)
    theirs = TransformersBench(checkpoint, batch, dtype)
    ours.measure(args.steps)
    mine, peer = [], []
    for _ in range(args.rounds):
        mine += [sample["step"] for sample in ours.measure(args.steps)]
        peer.append(theirs.measure(args.steps))
    step, peer_step = statistics.median(mine), statistics.median(peer)
    return {
        "batch": batch,
        "tandem_step_ms": 1e3 * step,
        "transformers_step_ms": 1e3 * peer_step,
        "tandem_tok_s": batch / step,
        "transformers_tok_s": batch / peer_step,
        "ratio": peer_step / step,
    }


def measure_rows(checkpoint: Path, batch: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """Verify and draft cost for every mtp_step of --mtp-steps, rounds interleaved; ratios are against mtp_step 0."""
    room = (args.rounds + 1) * args.steps * (max(args.mtp_steps) + 1) + 8
    benches = {k: DecodeBench(checkpoint, batch, k, args.num_threads, room) for k in args.mtp_steps}
    samples: dict[int, list[dict[str, float]]] = {k: [] for k in benches}
    for number in range(args.rounds + 1):
        for k, bench in benches.items():
            measured = bench.measure(args.steps)
            samples[k] += measured if number else []
    rows: list[dict[str, float]] = []
    for k, bench in benches.items():
        verify = statistics.median(sample["step"] - sample["draft"] for sample in samples[k])
        gdn = bench.engine.runner.table.cache.gdn
        rows.append(
            {
                "batch": batch,
                "mtp_step": k,
                "verify_rows": k + 1,
                "verify_ms": 1e3 * verify,
                "verify_ratio": 1e3 * verify / rows[0]["verify_ms"] if rows else 1.0,
                "draft_ms": 1e3 * statistics.median(sample["draft"] for sample in samples[k]),
                "gdn_state_bytes_per_request": gdn.state_bytes_per_row,
                "ring_bytes_per_request": gdn.ring_bytes_per_row,
            }
        )
    return rows


def run_preset(preset: str, args: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one preset."""
    with tempfile.TemporaryDirectory(prefix="tandem-") as name:
        checkpoint = Path(name)
        write_random_checkpoint(checkpoint, preset)
        rows, versus = [], []
        for batch in tqdm(args.batch, desc=preset):
            rows += measure_rows(checkpoint, batch, args)
            gc.collect()
            if args.compare == "transformers":
                versus.append(compare(checkpoint, batch, PRESETS[preset]["dtype"], args))
                gc.collect()
    return {"preset": preset, "dtype": PRESETS[preset]["dtype"], "rows": rows, "transformers": versus}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_throughput", description=__doc__)
    parser.add_argument("--preset", nargs="+", default=["tiny"], choices=list(PRESETS), help="model dimensions")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16], help="decoding requests")
    parser.add_argument("--mtp-steps", nargs="+", type=int, default=[0, 1, 3], help="drafts per step; 0 first")
    parser.add_argument("--steps", type=int, default=32, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; contestants take turns")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads, for both contestants")
    parser.add_argument("--compare", choices=["transformers"], help="run a peer in the same rounds")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure and print."""
    args = parse_args(argv)
    torch.set_num_threads(args.num_threads)
    results = [run_preset(preset, args) for preset in args.preset]
    for result in results:
        print(f"\n{result['preset']} ({result['dtype']}), prompt {PROMPT_LEN}, {args.num_threads} threads")
        print_table(result["rows"])
        print_table(result["transformers"])
    print_json("static_throughput", vars(args), results)


if __name__ == "__main__":
    main(sys.argv[1:])
