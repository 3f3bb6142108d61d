"""Weight updates under load: `python -m models.training.rl.drill --server URL --model DIR [--updates 30]`.

While streams of samples keep the server busy, its weights are changed again and again, full and as deltas, and what
becomes of the requests that run is chosen in turn. Nothing is trained: the weights are random steps from the
checkpoint's. Afterwards every sample is examined: it ended, its spans of versions cover its tokens, and each
log-probability is the one that the version's weights give, computed here.

What follows an update in a request that was kept, was computed on the cache of the weights before it, so its numbers
are no version's; such tokens are left out of the comparison. The last line printed is one JSON object.
"""

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from models.errors import CheckpointError
from models.training.demo_batches import collate
from models.training.mtp_settings import TrainingError
from models.training.publisher import Publisher, Version
from models.training.rl.grpo import score
from models.training.rl.perturbation import perturb
from models.training.rl.policy import Policy
from models.training.rl.recipe import DEMO, Actor, Mtp
from models.training.rollout_server import Rollout, RolloutServer, ServerRefused

MODES = ("keep", "retract", "wait", "abort")
SMALL_SHARE, FULL_EVERY = 0.02, 7  # of the numbers, in most updates; in every seventh all of them change
PROMPT_LEN = 6
SAMPLES_BETWEEN = 4  # samples that end between two updates
WAIT_SECONDS = 60.0
ROWS_AT_ONCE = 64


class Server(Protocol):
    """What the drill needs of a rollout server."""

    def generate(self, prompt_ids: Sequence[int], sampling: dict[str, Any], n: int, seed: int) -> list[Rollout]:
        """n samples of a prompt."""

    def pull_weights(self, publisher_url: str, num_streams: int, in_flight: str) -> dict[str, Any]:
        """Fetch the newest version."""

    def checksum(self) -> str:
        """Of all weights that serve."""


@dataclass(frozen=True)
class Sample:
    """A sample, and the version that served for certain when it was asked for."""

    started: int
    rollout: Rollout


class Load:
    """Streams of samples, each asked for when the one before it has ended. `version` is what serves for certain."""

    def __init__(self, server: Server, vocab_size: int, max_tokens: int):
        self.samples: list[Sample] = []
        self.failures: list[str] = []
        self.version = 0
        self._server, self._vocab_size, self._max_tokens = server, vocab_size, max_tokens
        self._is_over = threading.Event()
        self._ended = threading.Condition()

    @contextmanager
    def running(self, num_streams: int) -> Iterator[None]:
        """Inside, so many streams run; after it all have ended."""
        threads = [threading.Thread(target=self._run, args=(index,)) for index in range(num_streams)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join()

    def wait_for(self, count: int) -> None:
        """Until so many more samples have ended. Raises TrainingError when they do not."""
        with self._ended:
            goal = len(self.samples) + count
            if not self._ended.wait_for(lambda: len(self.samples) >= goal or self.failures, WAIT_SECONDS):
                raise TrainingError(f"fewer than {count} samples ended in {WAIT_SECONDS:g} s: the server stands still")

    def _run(self, stream: int) -> None:
        rng = random.Random(stream)
        sampling = {"temperature": 1.0, "max_new_tokens": self._max_tokens, "ignore_eos": True}
        while not self._is_over.is_set():
            started, prompt = self.version, rng.choices(range(self._vocab_size), k=PROMPT_LEN)
            try:
                [rollout] = self._server.generate(prompt, sampling, 1, rng.randrange(2**31))
            except ServerRefused as error:
                with self._ended:
                    self.failures.append(str(error))
                    self._ended.notify_all()
                return
            with self._ended:
                self.samples.append(Sample(started, rollout))
                self._ended.notify_all()


class Drill:
    """One run. `updates` are the ways in which requests that run are treated, by version; 0 is the checkpoint."""

    def __init__(self, policy: Policy, server: Server, publisher: Publisher, modes: Sequence[str] = MODES):
        self.policy, self.server, self.publisher, self.modes = policy, server, publisher, modes
        self.versions: list[Version] = []
        self.in_flight: list[str] = []
        self.wrong_checksums: list[str] = []

    def run(self, num_updates: int, num_streams: int, max_tokens: int) -> dict[str, Any]:
        """What was done and found. Raises TrainingError."""
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        first = self.policy.tensors
        self._update(first, "abort")
        load = Load(self.server, self.policy.target.config.vocab_size, max_tokens)
        with load.running(num_streams):
            for step in range(1, num_updates + 1):
                load.wait_for(SAMPLES_BETWEEN)
                share = 1.0 if step % FULL_EVERY == 0 else SMALL_SHARE
                self._update(perturb(self.versions[-1].tensors, share, generator), self.modes[step % len(self.modes)])
                load.version = step
            load.wait_for(num_streams)
        return {**self._count(load), **self.examine(load.samples), "seconds": round(time.perf_counter() - start, 1)}

    def examine(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Spans and log-probabilities of all samples."""
        right = [sample for sample in samples if has_right_spans(sample, len(self.versions))]
        gaps = [self._compare(version, right) for version in range(len(self.versions))]
        return {
            "wrong_spans": len(samples) - len(right),
            "samples_of_several_versions": sum(len(sample.rollout.versions) > 1 for sample in samples),
            "compared_tokens": sum(count for count, _ in gaps),
            "logprob_gap": max(gap for _, gap in gaps),
        }

    def _update(self, tensors: dict[str, Tensor], in_flight: str) -> None:
        version = self.publisher.publish(tensors)
        self.server.pull_weights(self.publisher.url, 4, in_flight)
        self.versions.append(version)
        self.in_flight.append(in_flight)
        if version.result_sha256 not in ("", self.server.checksum()):
            self.wrong_checksums.append(version.name)

    def _count(self, load: Load) -> dict[str, Any]:
        reasons = Counter(sample.rollout.finish_reason for sample in load.samples)
        return {
            "updates": len(self.versions) - 1,
            "transfers": dict(Counter(self.publisher.modes)),
            "in_flight": dict(Counter(self.in_flight[1:])),
            "wrong_checksums": self.wrong_checksums,
            "samples": len(load.samples),
            "tokens": sum(len(sample.rollout.output_ids) for sample in load.samples),
            "finish_reasons": dict(reasons),
            "lost": load.failures,
        }

    @torch.no_grad()
    def _compare(self, version: int, samples: Sequence[Sample]) -> tuple[int, float]:
        """How many tokens of a version can be compared, and the largest difference of their log-probabilities."""
        rows = [(sample.rollout, span) for sample in samples for span in self._comparable_spans(sample, version)]
        target, largest, count = self.policy.target, 0.0, 0
        for slot in target.weight_slots() if rows else ():
            if slot.name in self.versions[version].tensors:
                slot.load(self.versions[version].tensors[slot.name])
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            batch = collate([(rollout.prompt_ids, rollout.output_ids) for rollout, _ in part])
            hidden = target.forward_sequence(batch.token_ids)
            found = score(target, hidden, batch.token_ids, batch.is_target)
            per_row = found.split(batch.is_target.sum(1).tolist())
            for (rollout, (first, last)), logprobs in zip(part, per_row, strict=True):
                gaps = (logprobs - torch.tensor(rollout.logprobs))[first:last].abs()
                largest, count = max(largest, float(gaps.max())), count + last - first
        return count, largest

    def _comparable_spans(self, sample: Sample, version: int) -> list[tuple[int, int]]:
        """Tokens that were drawn by this version, on a cache that it had computed by itself: since the sample was asked
        for, no other update than such as compute anew, or wait for the end, has come before."""
        crossed = self.in_flight[sample.started + 1 : version + 1]
        spans = [(start, end) for name, start, end in sample.rollout.versions if name == str(version) and end > start]
        return spans if "keep" not in crossed else []


def has_right_spans(sample: Sample, num_versions: int) -> bool:
    """Whether the spans of a sample follow each other over all its tokens, in versions that go up from the one it was
    asked under."""
    rollout, place, before = sample.rollout, 0, sample.started - 1
    for name, start, end in rollout.versions:
        is_known = name.isdigit() and before < int(name) < num_versions
        if not is_known or start != place or end <= start:
            return False
        place, before = end, int(name)
    return place == len(rollout.output_ids) == len(rollout.logprobs)


def main(arguments: list[str] | None = None) -> None:
    """Run as the command line says. Exits with 2 where the drill cannot go on."""
    parser = argparse.ArgumentParser(
        prog="python -m models.training.rl.drill",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--server", required=True, help="URL of a server of --model with --enable-rl and --dtype float32")
    add("--model", type=Path, default=DEMO, help="checkpoint directory")
    add("--admin-key", default="", help="the server's --admin-api-key")
    add("--updates", type=int, default=30, help="weight updates")
    add("--streams", type=int, default=16, help="samples at a time")
    add("--max-tokens", type=int, default=48, help="length of a sample")
    add("--modes", nargs="+", choices=MODES, default=MODES, help="what becomes of requests that run, in turn")
    options = parser.parse_args(arguments)
    try:
        with Publisher() as publisher:
            policy = Policy(options.model, Actor(), Mtp())
            drill = Drill(policy, RolloutServer(options.server, options.admin_key), publisher, options.modes)
            print(json.dumps(drill.run(options.updates, options.streams, options.max_tokens)))
    except (TrainingError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
