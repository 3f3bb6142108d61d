"""SwiGLU's elementwise half. Source: Qwen3.5 MLP."""

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) · up` of gate_up [..., 2I] (gate first), giving [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
