"""RMSNorm with zero-centred checkpoint weights."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.rms_norm import add_rms_norm, rms_norm
from models.weight_slot import WeightSlot


class RMSNorm(nn.Module):
    """x [..., size] -> the same shape. The scale 1 + w stays in float32 or wider: bf16 would lose bits of a small w.

    The w that was loaded is kept beside it, for exports that give back what came.
    """

    def __init__(self, size: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        wide = torch.promote_types(dtype, torch.float32)
        self.scale = nn.Parameter(torch.ones(size, dtype=wide))
        self.checkpoint_weight: Tensor
        self.register_buffer("checkpoint_weight", torch.zeros(size, dtype=wide), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale, self.eps)

    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + delta, and x + delta itself; without a delta of x."""
        return (self(x), x) if delta is None else add_rms_norm(x, delta, self.scale, self.eps)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{prefix}.weight", self.scale, shift=1.0, unshifted=self.checkpoint_weight)
