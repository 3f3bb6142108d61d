"""SwiGLU's elementwise half. Source: Qwen3.5 MLP."""

import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.training import SiluAndMul, trains
from kernels.gpu.dispatch import runs_triton


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) · up` of gate_up [..., 2I] (gate first), giving [..., I]."""
    if runs_triton(gate_up):
        from kernels.gpu.activation import silu_and_mul as silu_and_mul_triton

        return silu_and_mul_triton(gate_up)
    return SiluAndMul.apply(gate_up) if trains(gate_up) else silu_and_mul_torch(gate_up)


def silu_and_mul_torch(gate_up: Tensor) -> Tensor:
    """The law: see `silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
