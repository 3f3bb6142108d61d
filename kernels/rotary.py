"""Rotary embedding of the first dimensions of each head. Source: Qwen3.5, half-split pairs (i, i + D_rot / 2)."""

from functools import cache

import torch
from torch import Tensor

from kernels.attention import store_kv
from kernels.cpu.training import NormRotary, trains
from kernels.gpu.dispatch import runs_triton
from kernels.rms_norm import rms_norm

_LANES = 16


def rotary_angles(positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [N, 1, rotary_dim / 2] of `position · theta^(-2j / rotary_dim)`, computed in `dtype` (fp32 or wider).

    positions [N] int64. Text only: the three rows of the multimodal rope are equal, which makes it plain rope.
    """
    half = rotary_dim // 2
    angles = positions.to(dtype)[:, None, None] * rotary_frequencies(rotary_dim, theta, dtype, positions.device)
    return angles.cos()[..., :half], angles.sin()[..., :half]


@cache
@torch.inference_mode(False)
def rotary_frequencies(rotary_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`theta^(-2j / rotary_dim)` for j = 0 .. rotary_dim / 2 - 1, and a few more; the same tensor at every call.

    Whole vectors only: torch's vector and scalar functions differ in the last bit, and which one an angle gets must not
    depend on how many rows there are.
    """
    width = -(-(rotary_dim // 2) // _LANES) * _LANES
    return theta ** -(torch.arange(0, 2 * width, 2, device=device, dtype=dtype) / rotary_dim)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dims [0, D_rot) of x [N, heads, D]; the rest passes through. cos, sin [N, 1, D_rot / 2]."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def norm_rotary(x: Tensor, scale: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm and rotate the heads of x [N, heads, D]; scale [D] is 1 + w; cos, sin [N, 1, D_rot / 2]."""
    if trains(x, scale, cos, sin):
        return NormRotary.apply(x, scale, eps, cos, sin)
    return apply_rotary(rms_norm(x, scale, eps), cos, sin)


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
    """What stands between an attention layer's projection and its attention: norm and rotate q and k, store k and v.

    qkv [N, (2·HQ + 2·HKV)·D]: per query head (query | gate), then keys, then values; q_scale, k_scale [D] are 1 + w;
    cos, sin [N, 1, D_rot / 2]; kv [2, pages, page_size, HKV, D] is written at slots [N] int64. Returns q [N, HQ, D];
    HQ may be 0, where only keys and values are wanted.
    """
    if runs_triton(qkv):
        from kernels.gpu.rotary import norm_rope_store as norm_rope_store_triton

        return norm_rope_store_triton(qkv, q_scale, k_scale, eps, cos, sin, kv, slots)
    return norm_rope_store_torch(qkv, q_scale, k_scale, eps, cos, sin, kv, slots)


def norm_rope_store_torch(
    qkv: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    slots: Tensor,
) -> Tensor:
    """The law: see `norm_rope_store`."""
    num_kv_heads, dim = kv.shape[3:]
    kv_size = num_kv_heads * dim
    q_gate, k, v = qkv.split([qkv.shape[1] - 2 * kv_size, kv_size, kv_size], dim=-1)
    q = q_gate.unflatten(1, (q_gate.shape[1] // (2 * dim), 2 * dim))[..., :dim]
    k, v = (x.unflatten(1, (num_kv_heads, dim)) for x in (k, v))
    store_kv(apply_rotary(rms_norm(k, k_scale, eps), cos, sin), v, kv, slots)
    return apply_rotary(rms_norm(q, q_scale, eps), cos, sin)
