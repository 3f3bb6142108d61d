"""The dense SwiGLU feed-forward layer."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.activation import silu_and_mul
from kernels.quantized_linear import Weight
from models.layers.linear import Linear, StackedLinear
from models.weight_slot import WeightSlot


class MLP(nn.Module):
    """`down(silu(gate x) · up x)`: x [..., H] -> [..., H]."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype):
        super().__init__()
        self.gate_up = StackedLinear(hidden_size, {"gate_proj": intermediate_size, "up_proj": intermediate_size}, dtype)
        self.down = Linear(intermediate_size, hidden_size, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu_and_mul(self.gate_up.forward_stacked(x)))

    def kernel_weights(self) -> dict[str, Weight]:
        """By the names of kernels/cpu/decoder.py."""
        return {"gate_up": self.gate_up.weight, "down": self.down.weight}

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.gate_up.weight_slots(prefix)
        yield from self.down.weight_slots(f"{prefix}.down_proj")
