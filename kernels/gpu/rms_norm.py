"""Triton kernels of kernels/rms_norm.py, one row per program. N rows, D columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import num_warps_for, power_of_two


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """See kernels.rms_norm.rms_norm. Rows may be strided: x [..., D] is read in place."""
    rows = x.flatten(0, -2)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, size = rows.shape
    block = power_of_two(size)
    _rms_norm_kernel[(num_rows,)](
        rows,
        rows,
        scale,
        out,
        out,
        rows.stride(0),
        size,
        eps,
        HAS_DELTA=False,
        BLOCK=block,
        num_warps=num_warps_for(block),
    )
    return out


def add_rms_norm(x: Tensor, delta: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See kernels.rms_norm.add_rms_norm. x, delta [N, D], contiguous."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    num_rows, size = x.shape
    block = power_of_two(size)
    _rms_norm_kernel[(num_rows,)](
        x, delta, scale, out, total, x.stride(0), size, eps, HAS_DELTA=True, BLOCK=block, num_warps=num_warps_for(block)
    )
    return out, total


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See kernels.rms_norm.gated_rms_norm. x [N, heads, D] contiguous; gate [N, heads, D] may be strided over N."""
    num_tokens, num_heads, size = x.shape
    out = torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    block = power_of_two(size)
    _gated_rms_norm_kernel[(num_tokens * num_heads,)](
        x, gate, weight, out, gate.stride(0), num_heads, size, eps, BLOCK=block, num_warps=num_warps_for(block)
    )
    return out


@triton.jit
def _rms_norm_kernel(
    x_ptr, delta_ptr, scale_ptr, out_ptr, total_ptr, x_stride, size, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_ptr + row * size + columns, mask=mask, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * size + columns, total, mask=mask)
        x = total.to(tl.float32)  # what the next layers see: rounded as torch rounds a sum
    scale = tl.load(scale_ptr + columns, mask=mask, other=0.0)
    x = x * tl.rsqrt(tl.sum(x * x) / size + eps) * scale
    tl.store(out_ptr + row * size + columns, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_rms_norm_kernel(
    x_ptr, gate_ptr, weight_ptr, out_ptr, gate_stride, num_heads, size, eps, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, head = row // num_heads, row % num_heads
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    x = tl.load(x_ptr + row * size + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + token * gate_stride + head * size + columns, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    normed = (x * tl.rsqrt(tl.sum(x * x) / size + eps)).to(out_ptr.dtype.element_ty).to(tl.float32)
    out = normed * weight * gate * tl.sigmoid(gate)
    tl.store(out_ptr + row * size + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
