"""How fast training is beside transformers: `python -m models.training.speed [--shapes demo wide] [--rounds N]`.

One model in two programs, ours and transformers' Qwen3_5ForCausalLM with what it takes on this machine: same weights,
same tokens, float32. They take turns, forward and backward without an optimiser; every token counts in the losses,
which must agree. Rows:

    model           the whole model with its own cross entropy
    model and head  the same, and the MTP loss of a draft head, which is trained, too
    head alone      the MTP loss of the head on a trunk that stands still

transformers has no draft head: its column has our head over its hidden states. A ratio is the median over rounds of the
two times in one round. The last line printed is one JSON object.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.config import parse_config, read_json
from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from models.training.demo_trainer import initialize
from models.training.mtp_loss import compute_mtp_loss
from models.training.mtp_settings import MTPSettings
from models.training.transformers_mtp import keep_hidden

_DEMO = Path(__file__).resolve().parent.parent / "demo" / "config.json"
_WIDE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "head_dim": 64,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 128,
}
# What differs from the demo checkpoint's config.json, and the batches as (rows, tokens of each).
SHAPES: dict[str, tuple[dict[str, Any], tuple[tuple[int, int], ...]]] = {
    "demo": ({}, ((16, 64), (8, 256), (2, 512), (1, 1024))),
    "wide": (_WIDE, ((16, 64), (4, 256), (1, 1024))),
}
TASKS = ("model", "model and head", "head alone")
_MTP = MTPSettings(enabled=True)


class Tandem:
    """Our model and its head, randomly initialised."""

    def __init__(self, fields: dict[str, Any]):
        config = parse_config(fields)
        self.target = Qwen35(config, torch.float32)
        self.draft = Qwen35MTP(config, torch.float32, self.target)
        self.modules: tuple[nn.Module, ...] = (self.target, self.draft)
        for module in self.modules:
            initialize(module)

    def compute_loss(self, task: str, token_ids: Tensor) -> Tensor:
        """The loss of one of TASKS on token_ids [B, T]."""
        self.target.requires_grad_(task != "head alone")
        hidden = self.target.forward_sequence(token_ids)
        if task == "head alone":
            return _head_loss(self.draft, token_ids, hidden)
        logits = self.target.compute_logits(hidden[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten())
        return loss if task == "model" else loss + _head_loss(self.draft, token_ids, hidden)


class Transformers:
    """transformers' model with the weights of ours, and a copy of our head."""

    def __init__(self, fields: dict[str, Any], ours: Tandem):
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig
        from transformers.utils import logging

        logging.set_verbosity_error()
        self.model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**fields)).float()
        weights = {slot.name: slot.export() for slot in ours.target.weight_slots()}
        found = self.model.load_state_dict(weights, strict=False)
        assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}
        self.draft = copy.deepcopy(ours.draft)
        self.modules: tuple[nn.Module, ...] = (self.model, self.draft)

    def compute_loss(self, task: str, token_ids: Tensor) -> Tensor:
        """As ours; the model's own loss is the one it computes of labels."""
        if task == "head alone":
            with torch.no_grad():
                hidden = self.model.get_decoder()(input_ids=token_ids, use_cache=False).last_hidden_state
            return _head_loss(self.draft, token_ids, hidden)
        with keep_hidden(self.model) as kept:
            loss = self.model(input_ids=token_ids, labels=token_ids, use_cache=False).loss
        return loss if task == "model" else loss + _head_loss(self.draft, token_ids, kept[0])


def measure(
    contestants: tuple[Tandem, Transformers], task: str, token_ids: Tensor, rounds: int, time_of: Callable[[], float]
) -> dict[str, float]:
    """Tokens per second of both, medians, and how often our seconds go into theirs, with the least and the most of the
    rounds. The first round only warms up."""
    seconds: list[list[float]] = []
    for number in range(rounds + 1):
        steps = [_time_step(contestant, task, token_ids, time_of) for contestant in contestants]
        (_, our_loss), (_, their_loss) = steps
        assert abs(our_loss - their_loss) <= 1e-4 * abs(their_loss), f"losses {our_loss} and {their_loss}"
        seconds += [[step[0] for step in steps]] if number else []
    ours, theirs = (token_ids.numel() / statistics.median(column) for column in zip(*seconds, strict=True))
    ratios = sorted(their_time / our_time for our_time, their_time in seconds)
    found = {"ratio": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1]}
    speeds = {"transformers_tok_s": round(theirs, 1), "tandem_tok_s": round(ours, 1)}
    return speeds | {name: round(ratio, 3) for name, ratio in found.items()}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every shape, batch and task."""
    torch.set_num_threads(options.threads)
    time_of = time.process_time if options.cpu_time else time.perf_counter
    rows = []
    plan = [(name, batch) for name in options.shapes for batch in SHAPES[name][1]]
    contestants: dict[str, tuple[Tandem, Transformers]] = {}
    for name, (batch, length) in tqdm(plan, disable=None):
        if name not in contestants:
            torch.manual_seed(0)
            fields = shape_fields(name)
            ours = Tandem(fields)
            contestants = {name: (ours, Transformers(fields, ours))}
        token_ids = torch.randint(fields["vocab_size"], (batch, length))
        for task in TASKS:
            found = measure(contestants[name], task, token_ids, options.rounds, time_of)
            rows.append({"shape": name, "task": task, "batch": batch, "length": length, **found})
    return rows


def shape_fields(name: str) -> dict[str, Any]:
    """The config.json of one of SHAPES. No token is padding: transformers would not train its embedding."""
    return read_json(_DEMO) | {"dtype": "float32", "pad_token_id": None} | SHAPES[name][0]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m models.training.speed", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="which models")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each row, beside one that warms up")
    parser.add_argument("--threads", type=int, default=2, help="threads of each")
    parser.add_argument("--cpu-time", action="store_true", help="processor time: for a busy machine, with --threads 1")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Print the table and, as the last line, one JSON object."""
    options = build_parser().parse_args(arguments)
    rows = run(options)
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]}
    for row in ({name: name for name in widths}, *rows):
        print("  ".join(f"{row[name]!s:>{width}}" for name, width in widths.items()))
    print(json.dumps({"benchmark": "training_speed", "config": vars(options), **_describe_machine(), "results": rows}))


def _describe_machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "device": names[0] if names else platform.machine(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def _head_loss(draft: Qwen35MTP, token_ids: Tensor, hidden: Tensor) -> Tensor:
    return compute_mtp_loss(draft, token_ids, hidden, token_ids, _MTP).mtp_loss


def _time_step(
    contestant: Tandem | Transformers, task: str, token_ids: Tensor, time_of: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of one forward and backward, and the loss."""
    for module in contestant.modules:
        module.zero_grad(set_to_none=True)
    start = time_of()
    loss = contestant.compute_loss(task, token_ids)
    loss.backward()
    return time_of() - start, loss.item()


if __name__ == "__main__":
    main()
