"""New weights while a server serves: are they right, what do they cost? `python -m benchmarks.weight_updates`.

load    30 updates, full and deltas, under 16 streams of samples with `--mtp-step 3`; what becomes of the requests that
        run is chosen in turn (keep, retract, wait, abort). After each update the server's checksum must be the
        trainer's; no request may be lost, every token's version must be right, and its log-probability the trainer's.
times   a random model of a preset's shape, from when the server is asked until it serves the new weights: all of them
        over TCP, a delta of 2 %, a file in shared memory, one on disk. Streams run meanwhile: the longest gap between
        two of their tokens, beside the median one when nothing is updated and the one while weights come in.
        `stall_steps` is the longest gap without the exchange of the weights itself, in such median ones.

The trainer's side is `models/training/rl`, a process of its own. Prints tables, and as the last line one JSON object;
the exit code is 1 where a claim does not hold.
"""

import argparse
import http.client
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.openai_server import RunFailed
from benchmarks.peers.checkpoints import find_checkpoint
from benchmarks.report import print_json, print_table, spread
from benchmarks.serving.launch import launched_servers

PARTS = ("load", "times")
MAX_GAP = 1e-4  # of log-probabilities, in float32
WARM_UP_SECONDS = 3.0
PROMPT_LEN = 8
_STREAM_SECONDS = 600.0


class Streams:
    """Completions one after another on some connections, and when each of their tokens came, by the machine's clock."""

    def __init__(self, url: str, vocab_size: int, max_tokens: int):
        place = urlsplit(url)
        self._host, self._port = place.hostname or "", place.port
        self._vocab_size, self._max_tokens = vocab_size, max_tokens
        self._is_over = threading.Event()
        self.gaps: list[tuple[float, float]] = []
        self.failures: list[str] = []

    @contextmanager
    def running(self, count: int) -> Iterator[None]:
        """Inside, `count` of them run."""
        threads = [threading.Thread(target=self._run, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join()

    def within(self, begin: float, end: float) -> list[float]:
        """Seconds between two tokens of one stream, where some of them are within."""
        return [last - first for first, last in self.gaps if first < end and last > begin]

    def outside(self, windows: Sequence[tuple[float, float]]) -> list[float]:
        """The same where none of them are."""
        return [
            last - first for first, last in self.gaps if not any(first < end and last > begin for begin, end in windows)
        ]

    def _run(self, index: int) -> None:
        rng = random.Random(index)
        while not self._is_over.is_set():
            prompt = rng.choices(range(self._vocab_size), k=PROMPT_LEN)
            body = {"prompt": prompt, "max_tokens": self._max_tokens, "stream": True, "ignore_eos": True}
            try:
                self.gaps += pairwise(self._stream(json.dumps(body)))
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(str(error))
                return

    def _stream(self, body: str) -> list[float]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_STREAM_SECONDS)
        times = []
        try:
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise http.client.HTTPException(f"{response.status} {response.read(300)!r}")
            for line in response:
                if line.startswith(b"data: {"):
                    times.append(time.time())
                if self._is_over.is_set():
                    break
        finally:
            connection.close()
        return times


def run_trainer(module: str, arguments: Sequence[str], num_threads: int) -> list[dict[str, Any]]:
    """The JSON lines that `python -m models.training.rl.MODULE` prints. Raises RunFailed."""
    command = [sys.executable, "-m", f"models.training.rl.{module}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RunFailed(f"{shlex.join(command)} ended with status {done.returncode}; the reason stands above")
    return [json.loads(line) for line in done.stdout.splitlines()]


def measure_load(args: argparse.Namespace) -> dict[str, Any]:
    """What the drill found on a server of `--model`."""
    flags = ["--model", args.model, "--dtype", "float32", "--mtp-step", "3", "--speculation", "fixed"]
    server = [*flags, "--enable-rl", "--num-threads", str(args.num_threads)]
    with launched_servers([shlex.join(server)], args.start_timeout) as (url,):
        sizes = ["--updates", str(args.updates), "--streams", str(args.streams)]
        return run_trainer("drill", ["--server", url, "--model", args.model, *sizes], args.num_threads)[-1]


def measure_times(args: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """A row per way in which weights come, to a server of `--preset`."""
    directory = find_checkpoint(args.preset, root, ["server", "trainer"]).directory
    vocab_size = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    server = ["--model", str(directory), "--mtp-step", "1", "--enable-rl", "--max-model-len", "2048"]
    server += ["--num-threads", str(args.num_threads), "--max-running-requests", "8"]
    with launched_servers([shlex.join(server)], args.start_timeout) as (url,):
        streams = Streams(url, vocab_size, max_tokens=1024)
        with streams.running(args.time_streams):
            time.sleep(WARM_UP_SECONDS)
            arguments = ["--server", url, "--model", str(directory), "--rounds", str(args.rounds)]
            updates = run_trainer("commit_times", arguments, args.num_threads)
    if streams.failures:
        raise RunFailed(f"a stream was lost: {streams.failures[0]}")
    return [describe(way, updates, streams) for way in dict.fromkeys(one["way"] for one in updates)]


def describe(way: str, updates: list[dict[str, Any]], streams: Streams) -> dict[str, Any]:
    """One row: medians over the rounds, those that matter with their spread; gaps in milliseconds."""
    mine = [one for one in updates if one["way"] == way]
    during = [streams.within(one["begin"], one["end"]) for one in mine]
    usual = statistics.median(gap for gaps in during for gap in gaps)
    beyond = [max(gaps) - one["commit_seconds"] for one, gaps in zip(mine, during, strict=True)]
    quiet = statistics.median(streams.outside([(one["begin"], one["end"]) for one in updates]))
    return {
        "way": way,
        "mode": "/".join(dict.fromkeys(one["mode"] for one in mine)),
        **spread("update_seconds", (one["update_seconds"] for one in mine)),
        "publish_seconds": statistics.median(one["publish_seconds"] for one in mine),
        "write_seconds": statistics.median(one["write_seconds"] for one in mine),
        "quiet_gap_ms": 1e3 * quiet,
        "gap_ms": 1e3 * usual,
        **spread("commit_ms", (1e3 * one["commit_seconds"] for one in mine)),
        "longest_gap_ms": 1e3 * statistics.median(max(gaps) for gaps in during),
        **spread("stall_steps", (seconds / usual for seconds in beyond)),
    }


def check_claims(results: dict[str, Any], args: argparse.Namespace) -> dict[str, bool]:
    """What is claimed, and whether it holds."""
    claims: dict[str, bool] = {}
    if "load" in results:
        load = results["load"]
        claims |= {
            f"{args.updates} updates were made, full and deltas": load["updates"] == args.updates
            and {"full", "delta"} <= load["transfers"].keys(),
            "the server's checksum was the trainer's after each": not load["wrong_checksums"],
            "no request was lost": not load["lost"] and load["finish_reasons"].keys() <= {"length", "abort"},
            "every token's version was right": load["samples"] > 0 and load["wrong_spans"] == 0,
            f"log-probabilities differ by at most {MAX_GAP:g}": load["compared_tokens"] > 0
            and load["logprob_gap"] <= MAX_GAP,
        }
    if "times" in results:
        modes = {row["way"]: row["mode"] for row in results["times"]}
        claims["deltas came as deltas"] = modes["delta"] == "delta"
    return claims


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weight_updates",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to do")
    add("--model", default=str(Path(__file__).resolve().parent.parent / "models" / "demo"), help="checkpoint of load")
    add("--updates", type=int, default=30, help="of load")
    add("--streams", type=int, default=16, help="of load")
    add("--preset", default="0.8B", help="shape of times")
    add("--rounds", type=int, default=5, help="updates of each kind in times")
    add("--time-streams", type=int, default=2, help="streams of times")
    add("--num-threads", type=int, default=1, help="CPU threads of every process")
    add("--start-timeout", type=float, default=300.0, help="seconds until a server must be ready")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> bool:
    """Run and print; whether all claims hold. Raises RunFailed."""
    results: dict[str, Any] = {}
    if "load" in args.parts:
        results["load"] = measure_load(args)
        print(json.dumps(results["load"], indent=1))
    if "times" in args.parts:
        with tempfile.TemporaryDirectory(prefix="tandem-") as root:
            results["times"] = measure_times(args, Path(root))
        print_table(results["times"])
    claims = check_claims(results, args)
    for claim, holds in claims.items():
        print(f"{'yes' if holds else 'NO':3} {claim}")
    print_json("weight_updates", vars(args), {**results, "claims": claims})
    return all(claims.values())


def main(argv: list[str]) -> int:
    """The exit code: 0, or 1 where a claim does not hold or, with the reason on stderr, it cannot go on."""
    try:
        return 0 if measure(parse_args(argv)) else 1
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # launched servers end with this process
    sys.exit(main(sys.argv[1:]))
