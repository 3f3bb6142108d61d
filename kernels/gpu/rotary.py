"""Triton kernel of `norm_rope_store` in kernels/rotary.py: one program per token and head.

N tokens, HQ query heads, HKV key-value heads, D head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import power_of_two


def norm_rope_store(
    qkv: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    slots: Tensor,
) -> Tensor:
    """See kernels.rotary.norm_rope_store. qkv, cos and sin may have strided rows."""
    num_kv_heads, dim = kv.shape[3:]
    num_heads = (qkv.shape[1] // dim - 2 * num_kv_heads) // 2
    out = torch.empty(len(qkv), num_heads, dim, dtype=qkv.dtype, device=qkv.device)
    if len(qkv):
        _norm_rope_store_kernel[(num_heads + num_kv_heads, len(qkv))](
            *(qkv, q_scale, k_scale, cos, sin, kv, slots, out, qkv.stride(0), cos.stride(0), kv.stride(0), eps),
            HQ=num_heads,
            HKV=num_kv_heads,
            D=dim,
            HALF=cos.shape[-1],
            BLOCK=power_of_two(dim),
            num_warps=1,
        )
    return out


@triton.jit
def _norm_rope_store_kernel(
    qkv_ptr, q_scale_ptr, k_scale_ptr, cos_ptr, sin_ptr, kv_ptr, slots_ptr, out_ptr,
    qkv_stride, angle_stride, v_offset, eps,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < D
    is_query = head < HQ
    kv_head = head - HQ
    # Rows are (query | gate) per query head, then the keys, then the values.
    source = qkv_ptr + token * qkv_stride + tl.where(is_query, head * 2 * D, (2 * HQ + kv_head) * D)
    if is_query:
        scale = tl.load(q_scale_ptr + at, mask=mask, other=0.0)
    else:
        scale = tl.load(k_scale_ptr + at, mask=mask, other=0.0)
    x = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x) / D + eps)
    # The other half of the pair (i, i + HALF) is normed again from memory: lanes need not exchange anything.
    is_first = at < HALF
    is_rotated = at < 2 * HALF
    other_at = tl.where(is_rotated, tl.where(is_first, at + HALF, at - HALF), at)
    other = tl.load(source + other_at, mask=mask, other=0.0).to(tl.float32)
    if is_query:
        other_scale = tl.load(q_scale_ptr + other_at, mask=mask, other=0.0)
    else:
        other_scale = tl.load(k_scale_ptr + other_at, mask=mask, other=0.0)
    dtype = out_ptr.dtype.element_ty
    x = (x * inverse * scale).to(dtype).to(tl.float32)
    other = (other * inverse * other_scale).to(dtype).to(tl.float32)
    angle_at = token * angle_stride + tl.where(is_first, at, at - HALF)
    cos = tl.load(cos_ptr + angle_at, mask=is_rotated, other=1.0)
    sin = tl.load(sin_ptr + angle_at, mask=is_rotated, other=0.0)
    x = tl.where(is_rotated, x * cos + tl.where(is_first, -other, other) * sin, x).to(dtype)
    if is_query:
        tl.store(out_ptr + (token * HQ + head) * D + at, x, mask=mask)
    else:
        slot = (tl.load(slots_ptr + token) * HKV + kv_head) * D
        tl.store(kv_ptr + slot + at, x, mask=mask)
        value = tl.load(qkv_ptr + token * qkv_stride + (2 * HQ + HKV + kv_head) * D + at, mask=mask, other=0.0)
        tl.store(kv_ptr + v_offset + slot + at, value, mask=mask)
