"""Trains a draft head on a target that stands still, or both together; stops and goes on without a trace.

loss = mtp_loss                                   target frozen
loss = CE(target, t_{p+1}) + mtp_loss             jointly, each clipped by its own norm

Everything a step depends on is its number, the weights and the optimiser's moments: batches come from the seed and the
step. Knows batches and tensors, never text.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from models.training.demo_batches import Batch
from models.training.mtp_loss import MTPOutput, clip_separately, compute_mtp_loss
from models.training.mtp_settings import MTPSettings, TrainingError
from models.training.packing import IGNORED

KEPT_STATES = 2


@dataclass(frozen=True)
class TrainerSettings:
    """How to train.

    Attributes:
        num_steps: length of the training, over which the learning rate is planned.
        joint: whether the target is trained, too.
        rate: peak learning rate of the head.
        target_rate: peak learning rate of the target, when it is trained.
        warmup: share of the steps with a rising rate; it falls linearly to zero after them.
        max_grad_norm: the gradients of head and target are each scaled down to this norm.
        seed: of the batches and of a new head.
        data: what the batches are drawn from, in words: a training only continues on the same.
        model: which checkpoint is trained, and how it computes, in words: the same.
    """

    num_steps: int
    joint: bool = False
    rate: float = 1e-3
    target_rate: float = 1e-5
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    seed: int = 0
    data: str = ""
    model: str = ""

    def rate_factor(self, step: int) -> float:
        """The share of the peak rates at a step."""
        progress = (step + 1) / (self.num_steps + 1)
        return min(1.0, progress / max(self.warmup, 1e-9), (1.0 - progress) / max(1.0 - self.warmup, 1e-9))


class HeadTrainer:
    """The models, their optimisers and how many steps they have made."""

    def __init__(self, target: Qwen35, draft: Qwen35MTP, loss: MTPSettings, settings: TrainerSettings):
        self.target, self.draft, self.loss, self.settings = target, draft, loss, settings
        self.step = 0
        self.modules: dict[str, nn.Module] = {"head": draft} | ({"target": target} if settings.joint else {})
        target.requires_grad_(settings.joint)
        rates = {"head": settings.rate, "target": settings.target_rate}
        self.optimizers = {
            name: torch.optim.AdamW(module.parameters(), lr=rates[name], betas=(0.9, 0.95), weight_decay=0.0)
            for name, module in self.modules.items()
        }

    def train(
        self,
        batches: Iterator[Batch],
        every: int,
        report: Callable[[], dict[str, Any]],
        folder: Path,
        last_step: int | None = None,
    ) -> dict[str, Any]:
        """Make the steps that are left, up to `last_step` if it comes first; batches begin with that of the next step.

        Every `every` steps and at the end the state is saved to `folder` and what `report` finds is logged there, as it
        is before the first step. Returns the last report.
        """
        end = self.settings.num_steps if last_step is None else min(last_step, self.settings.num_steps)
        found = report()
        with tqdm(total=self.settings.num_steps, initial=self.step, unit="step") as bar:
            bar.write(log(folder, {"step": self.step, **found}))
            while self.step < end:
                bar.set_postfix_str(self._make_step(next(batches)))
                bar.update()
                if self.step % every == 0 or self.step == end:
                    self.save(folder)
                    found = report()
                    bar.write(log(folder, {"step": self.step, **found}))
        return found

    def measure(self, batches: list[Batch]) -> dict[str, Any]:
        """Means over held-out batches, weighted by tokens: losses and acceptance per depth."""
        with torch.no_grad():
            outputs = [self.compute(batch, replace(self.loss, measure=True))[0] for batch in batches]
        counts = torch.stack([output.mtp_token_count for output in outputs])  # [batches, D]
        means = {"tokens": counts.sum(0).tolist()}
        for name, values in _metrics(outputs).items():
            mean = (values.double() * counts).sum(0) / counts.sum(0).clamp(min=1)
            means[name] = [round(value, 4) for value in mean.tolist()]
        return means

    def compute(self, batch: Batch, settings: MTPSettings) -> tuple[MTPOutput, Tensor | None]:
        """What the head loses on a batch and, in joint training, the target's own mean cross entropy."""
        device = self.target.norm.scale.device
        token_ids, is_target = batch.token_ids.to(device), batch.is_target.to(device)
        labels = torch.where(is_target, token_ids, IGNORED)
        # A target that stands still records no gradients either way; a CPU's fast path is that of training.
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self.settings.joint or device.type == "cpu")):
            hidden = self.target.forward_sequence(token_ids)
        main = None
        if self.settings.joint:
            logits = self.target.compute_logits(hidden[:, :-1][is_target[:, 1:]])
            main = cross_entropy(logits, token_ids[:, 1:][is_target[:, 1:]], reduction="sum")
            main = main / is_target[:, 1:].sum().clamp(min=1)
        return compute_mtp_loss(self.draft, token_ids, hidden, labels, settings), main

    def save(self, folder: Path) -> None:
        """Write the state to `folder/step_N.pt`, whole or not at all, and delete all but the newest ones."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "settings": self._fingerprint(),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }
        torch.save(state, folder / "state.partial")
        os.replace(folder / "state.partial", folder / f"step_{self.step:08d}.pt")
        for old in list_states(folder)[:-KEPT_STATES]:
            old.unlink()

    def resume(self, folder: Path) -> None:
        """Continue from the newest state in `folder`. Raises TrainingError for none, or one of other settings."""
        states = list_states(folder)
        if not states:
            raise TrainingError(f"{folder} holds no step_*.pt: leave --resume out to begin anew")
        state = torch.load(states[-1], map_location=self.target.norm.scale.device, weights_only=True)
        saved, current = state["settings"], self._fingerprint()
        if saved != current:
            names = [name for name in current if saved.get(name) != current[name]]
            differing = "; ".join(f"{name} was {saved.get(name)}, is {current[name]}" for name in names)
            raise TrainingError(f"{states[-1]} is of another training: {differing}")
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        self.step = state["step"]

    def _make_step(self, batch: Batch) -> str:
        factor = self.settings.rate_factor(self.step)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor
        output, main = self.compute(batch, self.loss)
        (output.mtp_loss if main is None else main + output.mtp_loss).backward()
        parameters = {name: module.parameters() for name, module in self.modules.items()}
        clip_separately(parameters, self.settings.max_grad_norm)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        rates = " ".join(f"{rate:.1%}" for rate in output.mtp_accept_rate.tolist())
        losses = " ".join(f"{loss:.3f}" for loss in output.mtp_loss_per_depth.tolist())
        return f"mtp {losses} accept {rates}" + ("" if main is None else f" main {main.item():.3f}")

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a step to be the same."""
        return asdict(self.settings) | asdict(self.loss)


def list_states(folder: Path) -> list[Path]:
    """Saved states, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def log(folder: Path, entry: dict[str, Any]) -> str:
    """Append one JSON line to `folder/log.jsonl` and give it."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(entry)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    return line


def _metrics(outputs: list[MTPOutput]) -> dict[str, Tensor]:
    """The measured outputs' metrics, [batches, D] each, by the names they have in the log."""
    names = {
        "loss": "mtp_loss_per_depth",
        "accept": "mtp_accept_rate",
        "accept_cumulative": "mtp_cumulative_accept_rate",
        "accept_greedy": "mtp_greedy_accept_rate",
        "accept_sampled": "mtp_overlap",
    }
    return {name: torch.stack([getattr(output, field) for output in outputs]) for name, field in names.items()}
