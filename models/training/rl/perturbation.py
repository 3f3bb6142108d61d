"""Weights that change a little, as a training step would change them: to try out updates without training."""

from collections.abc import Mapping

import torch
from torch import Tensor

_STEP = 0.02


def perturb(tensors: Mapping[str, Tensor], share: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Copies in which about `share` of all numbers are a few percent off; 1: all of them."""
    return {name: _perturb(tensor, share, generator) for name, tensor in tensors.items()}


def _perturb(tensor: Tensor, share: float, generator: torch.Generator) -> Tensor:
    changed = tensor.clone()
    flat = changed.view(-1)
    if share >= 1:
        flat.mul_(1 + _STEP)
        return changed
    places = torch.randint(flat.numel(), (round(share * flat.numel()),), generator=generator)
    flat[places] *= 1 + _STEP * torch.randn(len(places), generator=generator).to(flat.dtype)
    return changed
