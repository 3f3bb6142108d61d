"""The policy that learns: target and draft head in float32, computing with the very weights that are published.

The optimiser moves master weights in float32. What is published has the checkpoint's dtypes, and the models compute
with it: a rollout server that has it gives the same log-probabilities. Knows tensors, never prompts or rewards.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from models.config import read_json
from models.safetensors_file import FLOAT_TYPES, FileTensor
from models.training.head_checkpoint import choose_layout, load_models, read_tensors
from models.training.mtp_loss import clip_separately
from models.training.mtp_settings import TrainingError, check_trainable
from models.training.rl.recipe import Actor, Mtp, Optimizer
from models.weight_slot import WeightSlot
from models.weights import normalise_name


def read_weights(directory: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors as they are in its files, by their text-only names."""
    return {normalise_name(name): _read(tensor) for name, tensor in read_tensors(directory).items()}


class Policy:
    """A checkpoint's models, `tensors` as they are published now by checkpoint name, and their optimisers."""

    def __init__(self, directory: Path, actor: Actor, mtp: Mtp):
        config = check_trainable(read_json(directory / "config.json"))
        self.target, self.head = load_models(directory, config)
        self.tensors = read_weights(directory)
        target_slots, head_slots = choose_layout(self.target, self.tensors), choose_layout(self.head, self.tensors)
        self.tensors = {name: self.tensors[name] for name in (*target_slots, *head_slots)}
        prefixes = actor.trainable or ("",)
        wanted = {name: slot for name, slot in target_slots.items() if name.startswith(tuple(prefixes))}
        if missing := [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in wanted)]:
            raise TrainingError(f"trainer_base.actor.trainable: no tensor's name begins with {missing[0]!r}")
        self._groups = {"actor": _Group(wanted, target_slots, actor.optimizer)}
        if mtp.enabled:
            self._groups["mtp"] = _Group(head_slots, head_slots, mtp.optimizer)
        self.target.requires_grad_(False)
        self.head.requires_grad_(False)
        for group in self._groups.values():
            group.unfreeze()
        self._publish()

    def step(self) -> dict[str, float]:
        """Move the weights by the gradients that `backward` has left; the gradients' norms, by group."""
        norms = {name: group.clip() for name, group in self._groups.items()}
        for group in self._groups.values():
            group.step()
        self._publish()
        return norms

    def _publish(self) -> None:
        """Round the master weights, and compute with what has become of them."""
        for group in self._groups.values():
            for name, tensor in group.round(self.tensors):
                self.tensors[name] = tensor


class _Group:
    """Parameters that are trained at one rate: their masters, and the checkpoint tensors that lie in them."""

    def __init__(self, wanted: dict[str, WeightSlot], slots: dict[str, WeightSlot], settings: Optimizer):
        self.params = list({id(slot.param): _parameter_of(slot) for slot in wanted.values()}.values())
        # A parameter may hold several tensors (gate and up): they are trained together.
        held = {id(param) for param in self.params}
        self.slots = {name: slot for name, slot in slots.items() if id(slot.param) in held}
        self.masters = [nn.Parameter(param.detach().clone()) for param in self.params]
        self.max_norm = settings.gradient_clipping
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )

    def unfreeze(self) -> None:
        for param in self.params:
            param.requires_grad_(True)

    def clip(self) -> float:
        for param, master in zip(self.params, self.masters, strict=True):
            master.grad, param.grad = param.grad, None
        return clip_separately({"all": self.masters}, self.max_norm)["all"]

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def round(self, published: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the checkpoint, in the dtypes that are published; the parameters become just these."""
        masters = {id(param): master for param, master in zip(self.params, self.masters, strict=True)}
        for name, slot in self.slots.items():
            part = masters[id(slot.param)].detach()[slot.index] - slot.shift
            tensor = part.reshape(slot.checkpoint_shape).to(published[name].dtype, copy=True).contiguous()
            slot.load(tensor)
            yield name, tensor


def _parameter_of(slot: WeightSlot) -> nn.Parameter:
    assert isinstance(slot.param, nn.Parameter), "quantized weights have no gradients"
    return slot.param


def _read(tensor: FileTensor) -> Tensor:
    blocks = [values for _, values in tensor.row_blocks()]
    return torch.cat(blocks).to(FLOAT_TYPES[tensor.dtype])
