"""The steps of the loop: original answers, shift of the policy, its own answers, training of the head, measurements."""

import argparse
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.closed_loop.answers import (
    Contestant,
    describe,
    describe_drafts,
    find_differences,
    share_in_style,
    take_turns,
)
from benchmarks.closed_loop.distributions import compare_distributions
from benchmarks.openai_server import RunFailed, Server
from benchmarks.serving.launch import launched_servers
from benchmarks.word_problems import draw_problem

PARALLEL = 16  # requests at a time where nothing is timed
TIMEOUT_SECONDS = 600.0

_ANNOTATION = re.compile("<<.*?>>")


class Loop:
    """One run: its settings, a folder for texts and checkpoints, and the seconds that every step took."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.seconds: dict[str, float] = {}
        self.prompts, self.held_out = draw_prompts(args.prompts, args.held_out)

    def run(self) -> dict[str, Any]:
        """All steps, and what was found. Raises RunFailed."""
        args, folder = self.args, self.folder
        with self._step("original answers"), self._serve((args.model, 1)) as (server,):
            own, original = self._collect(server)
        with self._step("shift of the policy"):
            texts = write_texts(folder / "shift.jsonl", self.prompts, [restyle(text) for text in own])
            shifted = shift_policy(texts, folder / "shifted", args)
        with self._step("shifted answers"), self._serve((shifted, 1)) as (server,):
            own, _ = self._collect(server)
        with self._step("training of the head"):
            texts = write_texts(folder / "own.jsonl", self.prompts, own)
            trained = train_head(shifted, texts, folder / "trained", args)
        with self._step("measurements"), self._serve((shifted, 0), (shifted, 1), (trained, 1)) as servers:
            measured = self._measure(dict(zip(("plain", "frozen", "trained"), servers, strict=True)))
        changes = {"shift": count_changes(args.model, shifted), "training": count_changes(shifted, trained)}
        return {"original": original, **measured, "changed_tensors": changes, "seconds": self.seconds}

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)

    @contextmanager
    def _serve(self, *models: tuple[str, int]) -> Iterator[list[Server]]:
        """Servers of (checkpoint, mtp_step), all at once."""
        shared = ["--num-threads", str(self.args.num_threads), "--speculation", self.args.speculation]
        commands = [shlex.join(["--model", model, "--mtp-step", str(step), *shared]) for model, step in models]
        with launched_servers(commands, self.args.start_timeout) as urls:
            yield [Server(url, TIMEOUT_SECONDS) for url in urls]

    def _collect(self, server: Server) -> tuple[list[str], dict[str, Any]]:
        """Greedy answers to the prompts to train on, and how the server does on those held out."""
        contestant = Contestant(server, self.args.max_tokens)
        own = contestant.answer_all(self.prompts, 0, PARALLEL)
        asked = [contestant.answer_all(self.held_out, 0, PARALLEL)]
        found = {**describe_drafts(asked), "in_style": share_in_style(asked, restyle)}
        return [answer.text for answer in own.answers], found

    def _measure(self, servers: dict[str, Server]) -> dict[str, Any]:
        args = self.args
        temperatures = {"greedy": 0.0} | ({"sampled": 1.0} if args.sampled else {})
        found: dict[str, Any] = {}
        for kind, temperature in temperatures.items():
            asked = {name: Contestant(server, args.max_tokens, temperature) for name, server in servers.items()}
            passes = take_turns(asked, self.held_out, args.rounds, args.parallel)
            differences = find_differences(passes, self.held_out)
            found[kind] = {"servers": describe(passes, differences, restyle), "differences": differences}
        if args.sampled:
            found["distributions"] = compare_distributions(servers, args.samples)
        return found


def restyle(text: str) -> str:
    """The style that the policy is made to learn: capital letters, and no `<<3*4=12>>` in calculations."""
    return _ANNOTATION.sub("", text).upper()


def draw_prompts(num_train: int, num_held_out: int) -> tuple[list[str], list[str]]:
    """Different word problems to train on, and others that are measured on. Raises RunFailed for too many."""
    rng, size = random.Random(0), num_train + num_held_out
    prompts = list(dict.fromkeys(draw_problem(rng) for _ in range(20 * size)))
    if len(prompts) < size:
        raise RunFailed(f"{size} different problems are too many: lower --prompts {num_train} to {len(prompts) // 2}")
    return prompts[num_held_out:size], prompts[:num_held_out]


def write_texts(path: Path, prompts: Sequence[str], completions: Sequence[str]) -> Path:
    """JSON lines to train on; empty answers are left out. Raises RunFailed when most of them are."""
    rows = [pair for pair in zip(prompts, completions, strict=True) if pair[1]]
    if 2 * len(rows) <= len(prompts):
        raise RunFailed(f"{len(prompts) - len(rows)} of {len(prompts)} answers are empty, half of them may be")
    lines = [json.dumps({"prompt": prompt, "completion": text}) + "\n" for prompt, text in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def shift_policy(texts: Path, out: Path, args: argparse.Namespace) -> str:
    """Train the trunk on texts in another style. The head takes no gradients: its loss has no weight."""
    flags = ["--joint", "--mtp-loss-scaling-factor", "0", "--target-rate", str(args.target_rate)]
    return train(args.model, texts, out, args.shift_steps, args, flags)


def train_head(model: str, texts: Path, out: Path, args: argparse.Namespace) -> str:
    """Train the head alone on what the policy itself wrote: there the text is what the target agrees with."""
    flags = ["--loss", "ce", "--mtp-loss-scaling-factor", "1", "--rate", str(args.rate)]
    return train(model, texts, out, args.head_steps, args, flags)


def train(model: str, texts: Path, out: Path, num_steps: int, args: argparse.Namespace, flags: Sequence[str]) -> str:
    """Run `python -m models.training`; the path of the checkpoint that it wrote. Raises RunFailed."""
    sizes = {
        "--steps": num_steps,
        "--every": num_steps,
        "--batch-tokens": args.batch_tokens,
        "--held-out": args.held_out,
    }
    places = {"--model": model, "--data": texts, "--out": out}
    words = [str(word) for pair in (places | sizes).items() for word in pair]
    command = [sys.executable, "-m", "models.training", *words, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.num_threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise RunFailed(f"{shlex.join(command)} ended with status {done.returncode}; the reason stands above")
    return str(out)


def count_changes(before: str, after: str) -> dict[str, int]:
    """How many tensors of the trunk and of the head have other bytes in a checkpoint that was made from another."""
    changed = {"trunk": 0, "head": 0}
    for path in sorted(Path(before).glob("*.safetensors")):
        with safe_open(path, "pt") as old, safe_open(Path(after, path.name), "pt") as new:
            for name in old.keys():  # noqa: SIM118, it is no dictionary
                is_same = torch.equal(_bytes_of(old.get_tensor(name)), _bytes_of(new.get_tensor(name)))
                changed["head" if name.startswith("mtp.") else "trunk"] += not is_same
    return changed


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)
