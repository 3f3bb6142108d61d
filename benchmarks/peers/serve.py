"""Servers side by side under the load of `benchmarks.serving`: Tandem, llama.cpp's llama-server, and vLLM.

All are started, those that do not answer are left out, and the load generator asks the others in turns.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.openai_server import RunFailed, Server
from benchmarks.peers.checkpoints import DEMO, Checkpoint, find_checkpoint
from benchmarks.peers.decode import finish
from benchmarks.peers.environments import Environment
from benchmarks.report import print_table
from benchmarks.serving.__main__ import main as generate_load
from benchmarks.serving.launch import running

MTP = "mtp"
# With the flags of benchmarks.serving: the demo's answers are as long as they are, and the same for all.
DEMO_LOAD = ("--dataset", "word-problems")
RANDOM_LOAD = ("--dataset", "random", "--ignore-eos", "--input-len", "128", "--output-len", "64")
_PROBE = {"prompt": "one two three", "max_tokens": 8, "temperature": 0}
_PROBE_SECONDS = 300.0
_VLLM_VALUE_DIM = 32


def command_line(name: str, port: int, checkpoint: Checkpoint, args: argparse.Namespace) -> list[str]:
    """Starts a server of that name: PEER, PEER-FORMAT, and each with -mtp behind. Raises RunFailed."""
    peer, *options = name.split("-")
    weights, depth = "".join(word for word in options if word != MTP), args.mtp_step if MTP in options else 0
    own, slots, model = Environment(args.directory, peer), str(max(args.concurrency)), str(checkpoint.directory)
    if peer == "tandem":
        command = [sys.executable, "-m", "server", "--model", model, "--max-model-len", str(args.max_len)]
        command += ["--num-threads", str(args.num_threads), "--max-running-requests", slots, "--mtp-step", str(depth)]
        return command + (["--quantization", weights] if weights else []) + ["--port", str(port)]
    if peer == "llama.cpp":
        command = [str(own.program("llama-server")), "-m", str(checkpoint.gguf(own, weights)), "--port", str(port)]
        command += ["-np", slots, "-c", str(args.max_len * max(args.concurrency)), "--no-webui"]
        command += ["-t", str(args.num_threads), "-tb", str(args.num_threads)]
        return command + (["--spec-type", "draft-mtp", "--spec-draft-n-max", str(depth)] if depth else [])
    if checkpoint.config["linear_value_head_dim"] % _VLLM_VALUE_DIM:
        raise RunFailed(f"its delta net on CPUs takes value heads in multiples of {_VLLM_VALUE_DIM} alone")
    command = [str(own.python), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--max-num-seqs", slots, "--max-model-len", str(args.max_len)]
    speculation = json.dumps({"method": MTP, "num_speculative_tokens": depth})
    return command + (["--speculative-config", speculation] if depth else [])


@contextlib.contextmanager
def _server(name: str, checkpoint: Checkpoint, args: argparse.Namespace) -> Iterator[str]:
    """Its URL, once it has answered. Raises RunFailed."""
    peer = name.partition("-")[0]
    variables = Environment(args.directory, peer).variables(args.num_threads)
    if peer == "vllm":
        del variables["PYTHONPATH"]  # it is no code of ours
        variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with running(lambda port: command_line(name, port, checkpoint, args), name, args.start_timeout, variables) as url:
        server = Server(url, _PROBE_SECONDS)
        server.send("/v1/completions", _PROBE | {"model": server.model})
        yield url


def describe(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each load and server: speed and latencies, with ratios to the first server of the same round."""
    rows = []
    for load in results["loads"]:
        for row in load["servers"]:
            speed, ttft, *_ = row.get("comparison", ({}, {}))
            rows.append(
                {
                    load["kind"]: load["value"],
                    "tok_s": row["output_tok_s"],
                    **{f"tok_s_ratio{end}": speed.get(f"ratio_{kind}") for end, kind in _SPREAD.items()},
                    "ttft_p50": _percentile(row["ttft_ms"], "p50"),
                    "ttft_p99": _percentile(row["ttft_ms"], "p99"),
                    "ttft_ratio": ttft.get("ratio_median"),
                    "itl_p50": _percentile(row["itl_event_ms"], "p50"),
                    "itl_p99": _percentile(row["itl_event_ms"], "p99"),
                    "accept_length": row["accept_length"],
                    "failed": row["failed"],
                    "server": row["server"],
                }
            )
    return rows


_SPREAD = {"": "median", "_min": "min", "_max": "max"}


def _percentile(latency: dict[str, float] | None, name: str) -> float | None:
    return None if latency is None else latency[name]


def run(args: argparse.Namespace) -> int:
    """Start, measure and print; the exit code. Raises RunFailed where no server answers."""
    checkpoint = find_checkpoint(args.checkpoint, args.directory, args.contestants)
    missing: dict[str, str] = {}
    urls: dict[str, str] = {}
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as directory:
        for name in args.contestants:
            print(f"starting {name}", file=sys.stderr)
            try:
                urls[name] = stack.enter_context(_server(name, checkpoint, args))
            except RunFailed as failure:
                missing[name] = str(failure)
                print(f"{name} is missing: {failure}", file=sys.stderr)
        if not urls:
            raise RunFailed("no server answers; the reasons stand above")
        first, *others = urls.values()
        file = Path(directory) / "results.json"
        load = DEMO_LOAD if checkpoint.directory == DEMO else RANDOM_LOAD
        flags = ["--base-url", first, *(["--compare", *others] if others else []), "--names", ",".join(urls)]
        flags += ["--concurrency", *map(str, args.concurrency), "--rounds", str(args.rounds), "--json", str(file)]
        code = generate_load([*flags, *load, *args.load])
        if not file.exists():
            return code
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
    rows = describe(results)
    print_table([{key: "-" if value is None else value for key, value in row.items()} for row in rows])
    return finish(args, {"serve": rows, "serving": results}, missing, code == 0)
