"""Token embedding and output head; a tied head is the same parameter."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.quantized_linear import QuantizedWeight
from models.weight_slot import WeightSlot


class Embedding(nn.Module):
    """Token ids [...] int64 -> vectors [..., hidden]."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.weight: nn.Parameter | QuantizedWeight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype))

    def forward(self, token_ids: Tensor) -> Tensor:
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.dequantize(token_ids)
        return F.embedding(token_ids, self.weight)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{prefix}.weight", self.weight)
