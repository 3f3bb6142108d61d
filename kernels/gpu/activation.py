"""Triton kernel of kernels/activation.py. N rows, I columns of each half."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See kernels.activation.silu_and_mul. gate_up [N, 2I], contiguous."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        _silu_and_mul_kernel[(num_rows, triton.cdiv(size, _BLOCK))](gate_up, out, size, BLOCK=_BLOCK, num_warps=4)
    return out


@triton.jit
def _silu_and_mul_kernel(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(gate_up_ptr + row * 2 * size + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + columns, mask=mask, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty).to(tl.float32)  # rounded as torch rounds it
    tl.store(out_ptr + row * size + columns, (silu * up).to(out_ptr.dtype.element_ty), mask=mask)
