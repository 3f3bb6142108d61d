"""Linear layers: a plain one, and several stacked into one matrix product."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.linear import linear
from kernels.quantized_linear import QuantizedWeight
from models.weight_slot import WeightSlot


class Linear(nn.Module):
    """`x · Wᵀ`, no bias: x [..., in_size] -> [..., out_size]."""

    def __init__(self, in_size: int, out_size: int, dtype: torch.dtype):
        super().__init__()
        self.weight: nn.Parameter | QuantizedWeight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{prefix}.weight", self.weight)


class StackedLinear(nn.Module):
    """Several linear layers with one input as one product: x [..., in_size] -> one tensor per name, [..., size].

    `parts` maps the checkpoint's module names to output sizes, in row order.
    """

    def __init__(self, in_size: int, parts: dict[str, int], dtype: torch.dtype):
        super().__init__()
        self.parts = parts
        self.weight: nn.Parameter | QuantizedWeight = nn.Parameter(
            torch.empty(sum(parts.values()), in_size, dtype=dtype)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.forward_stacked(x).split(list(self.parts.values()), dim=-1)

    def forward_stacked(self, x: Tensor) -> Tensor:
        """All outputs side by side: [..., sum of sizes]."""
        return linear(x, self.weight)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        start = 0
        for name, size in self.parts.items():
            yield WeightSlot(f"{prefix}.{name}.weight", self.weight, slice(start, start + size))
            start += size
