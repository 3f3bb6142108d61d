"""How a draft head is trained: settings under every name they have in the field, and what is refused before a step."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from models.config import ModelConfig, parse_config

LossType = Literal["ce", "soft_ce", "tv"]
Recompute = Literal["none", "reentrant", "non_reentrant"]

_ALIASES = {
    "mtp_loss_weight": "mtp_loss_scaling_factor",
    "loss_scale": "mtp_loss_scaling_factor",
    "loss_scaling_factor": "mtp_loss_scaling_factor",
}


class TrainingError(ValueError):
    """What a user asked for cannot be trained; the message says what was seen, the limit and the mend."""


@dataclass(frozen=True)
class MTPSettings:
    """How the loss of a draft head is computed. Raises TrainingError for a value outside its range.

    Attributes:
        enabled: whether there is an MTP loss at all.
        mtp_loss_type: cross entropy with the text, cross entropy with the target's own next-token distribution
            (soft_ce), or total variation `1 - Σ min(p, q)` from it, the rejection rate of speculative sampling.
        mtp_depth: how many tokens ahead the head is trained, by recursion; 1 is the token after the next.
        mtp_loss_scaling_factor: of the mean over depths.
        mtp_detach: gradients stop before the trunk, the embedding and the output head.
        recompute: whether the head's layers are computed again in the backward pass, and by which of torch's ways.
        measure: also compare with the target's own distribution, one more output head per depth; soft losses do anyway.
        enable_rollout: draft with the head that is being trained.
        num_speculative_tokens: drafts per step of such rollouts.
    """

    enabled: bool = False
    mtp_loss_type: LossType = "ce"
    mtp_depth: int = 1
    mtp_loss_scaling_factor: float = 0.1
    mtp_detach: bool = True
    recompute: Recompute = "none"
    measure: bool = False
    enable_rollout: bool = False
    num_speculative_tokens: int = 1

    def __post_init__(self) -> None:
        for name, choices in (("mtp_loss_type", get_args(LossType)), ("recompute", get_args(Recompute))):
            if (value := getattr(self, name)) not in choices:
                raise TrainingError(f"{name} is {value!r}, one of {', '.join(choices)} is needed")
        for name in ("mtp_depth", "num_speculative_tokens"):
            if (value := getattr(self, name)) < 1:
                raise TrainingError(f"{name} is {value}, at least 1 is needed")
        if not 0 <= self.mtp_loss_scaling_factor < float("inf"):
            raise TrainingError(f"mtp_loss_scaling_factor is {self.mtp_loss_scaling_factor}, at least 0 is needed")
        if self.enable_rollout and not self.enabled:
            raise TrainingError("enable_rollout needs enabled: the rollouts' head would not be trained")

    @staticmethod
    def read(values: Mapping[str, Any]) -> "MTPSettings":
        """Settings from a configuration; None counts as not given. Raises TrainingError for names it does not know and
        for aliases that differ."""
        known = {field.name for field in fields(MTPSettings)}
        given: dict[str, tuple[str, Any]] = {}
        for name, value in values.items():
            canonical = _ALIASES.get(name, name)
            if canonical not in known:
                names = ", ".join(sorted(known | set(_ALIASES)))
                raise TrainingError(f"unknown MTP setting {name!r}: known are {names}")
            if value is None:
                continue
            first, other = given.setdefault(canonical, (name, value))
            if first != name and other != value:
                raise TrainingError(f"{first} is {other} and {name} is {value}: they are one setting, give it once")
        return MTPSettings(**{name: value for name, (_, value) in given.items()})


def check_trainable(
    config: Mapping[str, Any], has_new_head: bool = False, context_parallel_size: int = 1, has_vision: bool = False
) -> ModelConfig:
    """ModelConfig of a config.json object whose head can be trained; `has_new_head`: one is made if there is none.

    Raises CheckpointError for another family and for quantised weights, TrainingError for the rest.
    """
    parsed = parse_config(dict(config))
    if parsed.num_mtp_layers == 0 and not has_new_head:
        raise TrainingError("mtp_num_hidden_layers is 0: there is no head to train; ask for one (--mtp-init random)")
    if context_parallel_size > 1:
        raise TrainingError(
            f"context_parallel_size is {context_parallel_size}, only 1 is: the loss needs whole documents"
        )
    if has_vision:
        raise TrainingError("pixel_values: the MTP loss is for text only, leave images and videos out")
    return parsed
