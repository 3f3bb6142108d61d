"""Qwen3.5 MoE: the dense model with a sparse feed-forward layer.

N tokens, H hidden size, E experts, I expert width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.moe import route, run_experts
from kernels.quantized_linear import QuantizedWeight, Weight
from models.config import ModelConfig
from models.layers.linear import Linear
from models.layers.mlp import MLP
from models.qwen3_5.model import Qwen35
from models.weight_slot import WeightSlot


class SparseMLP(nn.Module):
    """Top-k routed experts plus a shared expert behind a sigmoid gate: x [N, H] -> [N, H]."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        hidden, experts, size = config.hidden_size, config.num_experts, config.expert_size
        self.experts_per_token = config.experts_per_token
        self.router = Linear(hidden, experts, dtype)
        self.gate_up: nn.Parameter | QuantizedWeight = nn.Parameter(torch.empty(experts, 2 * size, hidden, dtype=dtype))
        self.down: nn.Parameter | QuantizedWeight = nn.Parameter(torch.empty(experts, hidden, size, dtype=dtype))
        self.shared_expert = MLP(hidden, config.shared_expert_size, dtype)
        self.shared_gate = Linear(hidden, 1, dtype)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = route(self.router(x), self.experts_per_token)
        shared, gate = self.shared_expert(x), self.shared_gate(x)
        return run_experts(x, self.gate_up, self.down, weights, experts, shared, gate)

    def kernel_weights(self) -> dict[str, Weight]:
        """By the names of kernels/cpu/decoder.py."""
        shared = {f"shared_{name}": weight for name, weight in self.shared_expert.kernel_weights().items()}
        shared |= {"shared_gate": self.shared_gate.weight, "router": self.router.weight}
        return {"gate_up": self.gate_up, "down": self.down, **shared}

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Both expert layouts of the checkpoints: fused 3-D tensors, and one 2-D tensor per expert and matrix."""
        yield from self.router.weight_slots(f"{prefix}.gate")
        yield WeightSlot(f"{prefix}.experts.gate_up_proj", self.gate_up)
        yield WeightSlot(f"{prefix}.experts.down_proj", self.down)
        size = self.down.shape[2]
        for expert in range(self.down.shape[0]):
            name = f"{prefix}.experts.{expert}"
            yield WeightSlot(f"{name}.gate_proj.weight", self.gate_up, (expert, slice(0, size)))
            yield WeightSlot(f"{name}.up_proj.weight", self.gate_up, (expert, slice(size, 2 * size)))
            yield WeightSlot(f"{name}.down_proj.weight", self.down, (expert,))
        yield from self.shared_expert.weight_slots(f"{prefix}.shared_expert")
        yield from self.shared_gate.weight_slots(f"{prefix}.shared_expert_gate")


def build_target(config: ModelConfig, dtype: torch.dtype) -> Qwen35:
    """The MoE target model."""
    return Qwen35(config, dtype, SparseMLP)
