"""Depthwise causal convolution with SiLU, plain and on the position-indexed ring. Source: Qwen3.5 delta-net layer.

    c_t = silu(Σ_w weight[:, w] · u_{t - W + 1 + w}),   inputs before the sequence are 0

B requests, T tokens each, C channels, W taps, R rows. The ring keeps the raw inputs u of the last positions: position p
of a row lies in slot p mod ring_len, so a rejected draft is overwritten by the next input at its position and nothing
is ever rolled back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(u: Tensor, weight: Tensor, history: Tensor | None = None) -> Tensor:
    """Convolve u [B, T, C] with weight [C, W]; `history` [B, W - 1, C] holds the inputs before it (None: zeros)."""
    num_taps = weight.shape[1]
    if history is None:
        window = F.pad(u, (0, 0, num_taps - 1, 0))
    else:
        window = torch.cat([history, u], dim=1)
    out = window[:, : u.shape[1]] * weight[:, 0]
    for tap in range(1, num_taps):
        out = torch.addcmul(out, window[:, tap : tap + u.shape[1]], weight[:, tap])
    return F.silu(out)


def causal_conv1d_cached(u: Tensor, weight: Tensor, ring: Tensor, rows: Tensor, start_lens: Tensor) -> Tensor:
    """Convolve u [B, T, C] at positions start_lens.. of their rows, reading history from the ring and recording u.

    ring [R, ring_len, C] is updated in place, ring_len >= W - 1 + the T of a verify step; rows, start_lens [B] int64.
    Prefill records the last ring_len inputs only.
    """
    num_taps, ring_len, num_tokens = weight.shape[1], ring.shape[1], u.shape[1]
    past = start_lens[:, None] + torch.arange(1 - num_taps, 0, device=u.device)
    history = ring[rows[:, None], past % ring_len]
    out = causal_conv1d(u, weight, history)
    kept = min(num_tokens, ring_len)
    positions = start_lens[:, None] + torch.arange(num_tokens - kept, num_tokens, device=u.device)
    ring[rows[:, None], positions % ring_len] = u[:, num_tokens - kept :]
    return out
