"""Rotary embedding of the first dimensions of each head. Source: Qwen3.5, half-split pairs (i, i + D_rot / 2)."""

import torch
from torch import Tensor

_LANES = 16


def rotary_angles(positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [N, 1, rotary_dim / 2] of `position · theta^(-2j / rotary_dim)`, computed in `dtype` (fp32 or wider).

    positions [N] int64. Text only: the three rows of the multimodal rope are equal, which makes it plain rope.
    """
    half = rotary_dim // 2
    angles = positions.to(dtype)[:, None, None] * rotary_frequencies(rotary_dim, theta, dtype, positions.device)
    return angles.cos()[..., :half], angles.sin()[..., :half]


def rotary_frequencies(rotary_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`theta^(-2j / rotary_dim)` for j = 0 .. rotary_dim / 2 - 1, and a few more.

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
