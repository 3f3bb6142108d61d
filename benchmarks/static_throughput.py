"""Decode speed of the engine without HTTP: `python -m benchmarks.static_throughput [--compare transformers overlap]`.

One question: how long does a decode step take for a batch of B requests that all decode, at each mtp_step? The weights
are random, so drafts are hardly ever accepted; what is measured is the cost of a step, its verify part and its draft
part, so depths are fixed, nothing is cached, and the host's work is not hidden.

More contestants, whose rounds are interleaved: `--compare transformers` runs the same checkpoint under
`transformers.generate`, `--compare overlap` the engine with and without overlap of host and device, `--baseline DIR`
another checkout of this project and this one, both with their default settings. `--trace FILE` writes a timeline with
overlap for chrome://tracing or Perfetto and says how much of the host's work was hidden behind the device's. Prints
tables, and as the last line one JSON object.
"""

import argparse
import gc
import json
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
from benchmarks.versions import compare_versions
from server.llm import LLM, Generate, SamplingParams
from server.messages import TokenOutput

PROMPT_LEN = 64
EOS_FREE = SamplingParams(temperature=0, ignore_eos=True)


class DecodeBench:
    """B requests past their prompts; `measure` times decode steps of all of them together.

    With overlap a step returns the tokens of the one before it, and the draft part is timed on another thread: sums of
    many steps are right, single ones are not.
    """

    def __init__(self, checkpoint: Path, batch: int, mtp_step: int, num_threads: int, room: int, overlap: str = "off"):
        lookahead = 2 * mtp_step + 1
        self.engine = LLM(
            model=str(checkpoint),
            mtp_step=mtp_step,
            speculation="fixed",
            overlap=overlap,
            prefix_cache="off",
            chunked_prefill_size=batch * PROMPT_LEN,  # one step: nobody decodes while others are in their prompts
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
            tokens = sum(len(output.token_ids) for output in outputs if isinstance(output, TokenOutput))
            samples.append({"step": seconds, "draft": self.draft_seconds, "tokens": tokens})
        return samples

    def speed(self, num_steps: int) -> float:
        """Tokens per second over that many steps."""
        samples = self.measure(num_steps)
        return sum(sample["tokens"] for sample in samples) / sum(sample["step"] for sample in samples)


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


def compare_overlap(checkpoint: Path, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows per mtp_step: tokens per second with and without overlap, medians of interleaved rounds."""
    room = (args.rounds + 1) * args.steps * (max(args.mtp_steps) + 1) + 8
    rows = []
    for k in args.mtp_steps:
        off, on = (DecodeBench(checkpoint, batch, k, args.num_threads, room, overlap) for overlap in ("off", "on"))
        rounds = [(off.speed(args.steps), on.speed(args.steps)) for _ in range(args.rounds + 1)][1:]
        rows.append(
            {
                "batch": batch,
                "mtp_step": k,
                "overlap_off_tok_s": statistics.median(plain for plain, _ in rounds),
                "overlap_on_tok_s": statistics.median(overlapped for _, overlapped in rounds),
                "on_over_off": statistics.median(overlapped / plain for plain, overlapped in rounds),
            }
        )
    return rows


def compare_baseline(checkpoint: Path, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows per mtp_step: tokens per second of the checkout at --baseline and of this one."""
    rows = []
    for k in args.mtp_steps:
        room = (args.rounds + 2) * (args.steps + PROMPT_LEN) * (k + 1)
        settings = {
            "model": str(checkpoint),
            "mtp_step": k,
            "max_running_requests": batch,
            "max_model_len": PROMPT_LEN + room,
            "num_threads": args.num_threads,
        }
        task = {"settings": settings, "batch": batch, "prompt_len": PROMPT_LEN}
        speeds = compare_versions(args.baseline, task, args.steps, args.rounds)
        rows.append({"batch": batch, "mtp_step": k, **speeds})
    return rows


def trace_steps(checkpoint: Path, args: argparse.Namespace) -> float:
    """Write a timeline of decode steps with overlap, of the largest batch and mtp_step; the hidden share of the host's
    work."""
    bench = DecodeBench(
        checkpoint, max(args.batch), max(args.mtp_steps), args.num_threads, room=args.steps * 20, overlap="on"
    )
    bench.measure(args.steps)
    trace = bench.engine.start_trace()
    bench.measure(args.steps)
    events = list(trace.events)
    args.trace.write_text(json.dumps({"traceEvents": events}))
    return hidden_share(events)


def hidden_share(events: list[dict[str, Any]]) -> float:
    """Share of the time of planning and booking, on the host, that lies inside steps of the device; spans of one kind
    do not overlap each other."""
    spans = [(event["tid"], event["name"], event["ts"], event["ts"] + event["dur"]) for event in events]
    steps = [(start, end) for track, name, start, end in spans if (track, name) == ("device", "step")]
    work = [span[2:] for span in spans if span[0] == "host" and span[1] in ("schedule", "collect")]
    hidden = sum(max(0.0, min(end, until) - max(start, since)) for start, end in work for since, until in steps)
    return hidden / sum(end - start for start, end in work)


def run_preset(preset: str, args: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one preset."""
    with tempfile.TemporaryDirectory(prefix="tandem-") as name:
        checkpoint = Path(name)
        write_random_checkpoint(checkpoint, preset)
        tables: dict[str, list[dict[str, Any]]] = {"rows": [], "transformers": [], "overlap": [], "baseline": []}
        for batch in tqdm(args.batch, desc=preset):
            tables["rows"] += measure_rows(checkpoint, batch, args)
            gc.collect()
            if "transformers" in args.compare:
                tables["transformers"].append(compare(checkpoint, batch, PRESETS[preset]["dtype"], args))
                gc.collect()
            if "overlap" in args.compare:
                tables["overlap"] += compare_overlap(checkpoint, batch, args)
                gc.collect()
            if args.baseline is not None:
                tables["baseline"] += compare_baseline(checkpoint, batch, args)
        hidden = None if args.trace is None else trace_steps(checkpoint, args)
    return {"preset": preset, "dtype": PRESETS[preset]["dtype"], **tables, "hidden_host_share": hidden}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_throughput", description=__doc__)
    parser.add_argument("--preset", nargs="+", default=["tiny"], choices=list(PRESETS), help="model dimensions")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16], help="decoding requests")
    parser.add_argument("--mtp-steps", nargs="+", type=int, default=[0, 1, 3], help="drafts per step; 0 first")
    parser.add_argument("--steps", type=int, default=32, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; contestants take turns")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads, for both contestants")
    peers = ["transformers", "overlap"]
    parser.add_argument("--compare", nargs="+", default=[], choices=peers, help="run a peer in the same rounds")
    parser.add_argument("--baseline", type=Path, help="another checkout of this project to compare with")
    parser.add_argument("--trace", type=Path, help="file for a timeline of --steps decode steps (the last preset's)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure and print."""
    args = parse_args(argv)
    torch.set_num_threads(args.num_threads)
    results = [run_preset(preset, args) for preset in args.preset]
    for result in results:
        print(f"\n{result['preset']} ({result['dtype']}), prompt {PROMPT_LEN}, {args.num_threads} threads")
        for name in ("rows", "transformers", "overlap", "baseline"):
            print_table(result[name])
        if result["hidden_host_share"] is not None:
            print(f"host work hidden: {100 * result['hidden_host_share']:.0f} %")
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print_json("static_throughput", config, results)


if __name__ == "__main__":
    main(sys.argv[1:])
