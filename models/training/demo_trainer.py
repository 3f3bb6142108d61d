"""Trains a target and its MTP head together on completions; knows batches and tensors, never text.

loss = CE(target, t_{p+1}) + Σ_k w_k · CE(draft pass k, row p, t_{p+1+k})        over the tokens of completions

Pass 1 of the draft reads the target's hidden states, each later one those of the pass before: as when serving drafts
several tokens ahead.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from models.training.demo_batches import Batch
from models.training.muon import Muon

DRAFT_WEIGHTS = (0.3, 0.15, 0.1)  # of the passes
INITIAL_SCALE = 0.02


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Attributes:
        num_steps: planned length; the learning rate is planned over it.
        max_minutes: limit of the wall time; where it comes first, it shortens the plan.
        rate_scale: factor of both learning rates; less than one to train a trained model further.
        muon_rate: learning rate of the matrices.
        adam_rate: learning rate of everything else.
        weight_decay: of the matrices, decoupled.
        warmup: share of the plan with a rising rate.
        decay: share of the plan with a falling rate.
        max_grad_norm: gradients are scaled down to this norm.
        evaluation_seconds: time between evaluations.
    """

    num_steps: int
    max_minutes: float
    rate_scale: float = 1.0
    muon_rate: float = 0.02
    adam_rate: float = 0.004
    weight_decay: float = 0.02
    warmup: float = 0.02
    decay: float = 0.6
    max_grad_norm: float = 1.0
    evaluation_seconds: float = 300.0


def train(
    target: Qwen35,
    draft: Qwen35MTP,
    batches: Iterator[Batch],
    settings: TrainingSettings,
    evaluate: Callable[[], str],
) -> None:
    """Train both models in place to the end of the plan, calling `evaluate` now and then to show where it stands."""
    optimizers = _build_optimizers(target, draft, settings)
    parameters = [*target.parameters(), *draft.parameters()]
    start, evaluated = time.monotonic(), time.monotonic()
    with tqdm(total=100.0, unit="%", bar_format="{l_bar}{bar}| {elapsed} {postfix}") as bar:
        for step, batch in enumerate(batches):
            elapsed_minutes = (time.monotonic() - start) / 60.0
            progress = max(step / settings.num_steps, elapsed_minutes / settings.max_minutes)
            if progress >= 1.0:
                break
            _set_rate(optimizers, settings.rate_scale * rate_factor(progress, settings))
            losses = compute_losses(target, draft, batch)
            (losses[0] + sum(w * loss for w, loss in zip(DRAFT_WEIGHTS, losses[1:], strict=True))).backward()
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            bar.n = 100.0 * progress
            drafts = " ".join(f"{loss.item():.3f}" for loss in losses[1:])
            bar.set_postfix_str(f"step {step} loss {losses[0].item():.3f} mtp {drafts}")
            if time.monotonic() - evaluated > settings.evaluation_seconds:
                bar.write(f"{100 * progress:.0f} % step {step}: {evaluate()}")
                evaluated = time.monotonic()


def compute_losses(target: Qwen35, draft: Qwen35MTP, batch: Batch) -> list[Tensor]:
    """Give the mean cross entropies over the completion tokens, scalars: the target's, then one per draft pass."""
    hidden = target.forward_sequence(batch.token_ids[:, :-1])
    losses = [_cross_entropy(target, hidden, batch, 1)]
    for shift in range(2, 2 + len(DRAFT_WEIGHTS)):
        hidden = draft.forward_sequence(batch.token_ids[:, shift - 1 : -1], hidden[:, :-1])
        losses.append(_cross_entropy(target, hidden, batch, shift))
    return losses


def initialize(module: nn.Module) -> None:
    """Fill parameters by name: small normal matrices, GDN decays over their useful range, norms one."""
    for name, parameter in module.named_parameters():
        if name.endswith("A_log"):
            nn.init.uniform_(parameter, 1.0, 16.0).data.log_()
        elif name.endswith("dt_bias"):
            nn.init.uniform_(parameter, math.log(1e-3), math.log(1e-1)).data.exp_()
            parameter.data.add_(torch.log(-torch.expm1(-parameter.data)))
        elif "norm" in name:
            nn.init.ones_(parameter)
        elif "conv" in name:
            nn.init.normal_(parameter, std=0.3)
        else:
            nn.init.normal_(parameter, std=INITIAL_SCALE)


def rate_factor(progress: float, settings: TrainingSettings) -> float:
    """Give the factor of the learning rates: rise, hold, fall linearly to zero."""
    return max(0.0, min(1.0, (progress + 1e-3) / settings.warmup, (1.0 - progress) / settings.decay))


def _cross_entropy(target: Qwen35, hidden: Tensor, batch: Batch, shift: int) -> Tensor:
    """Give the mean cross entropy of `hidden` [B, T', H] whose row p predicts the token p + `shift`."""
    is_target = batch.is_target[:, shift:]
    logits = target.compute_logits(hidden[is_target])
    return cross_entropy(logits.float(), batch.token_ids[:, shift:][is_target])


def _build_optimizers(target: Qwen35, draft: Qwen35MTP, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of hidden layers, AdamW for embeddings, norms, convolutions and gates."""
    parameters = dict(target.named_parameters()) | {f"draft.{name}": p for name, p in draft.named_parameters()}
    is_matrix = {name: p.ndim == 2 and min(p.shape) > 16 and "embed" not in name for name, p in parameters.items()}
    distinct = {id(p): (name, p) for name, p in parameters.items()}
    matrices = [p for name, p in distinct.values() if is_matrix[name]]
    others = [p for name, p in distinct.values() if not is_matrix[name]]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=settings.muon_rate, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=settings.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set the learning rate of every group to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
