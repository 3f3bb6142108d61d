"""Depthwise causal convolution with SiLU, plain and on the position-indexed ring. Source: Qwen3.5 delta-net layer.

    c_t = silu(Σ_w weight[:, w] · u_{t - W + 1 + w}),   inputs before the sequence are 0

B requests, T tokens each, C channels, W taps, R rows. The ring keeps the raw inputs u of the last positions: position p
of a row lies in slot p mod ring_len, so a rejected draft is overwritten by the next input at its position and nothing
is ever rolled back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_UNROLLED_TOKENS = 16


def causal_conv1d(u: Tensor, weight: Tensor, history: Tensor | None = None) -> Tensor:
    """Convolve u [B, T, C] with weight [C, W]: [B, T, C] in the wider dtype of both.

    history [B, W - 1, C] holds the inputs before u; None means zeros.
    """
    num_tokens, num_taps = u.shape[1], weight.shape[1]
    u = u.to(weight.dtype)
    window = F.pad(u, (0, 0, num_taps - 1, 0)) if history is None else torch.cat([history, u], dim=1)
    if num_tokens <= _UNROLLED_TOKENS:
        return F.silu((window.unfold(1, num_taps, 1) * weight).sum(-1))
    out = window[:, :num_tokens] * weight[:, 0]
    for tap in range(1, num_taps):
        out = torch.addcmul(out, window[:, tap : tap + num_tokens], weight[:, tap])
    return F.silu(out)


def causal_conv1d_cached(u: Tensor, weight: Tensor, ring: Tensor, read_slots: Tensor, write_slots: Tensor) -> Tensor:
    """`causal_conv1d` of u [B, T, C] with the history in the ring, recording u there.

    ring [R, ring_len, C] is updated in place. read_slots [B · (W - 1)] int64 are the flat slots (row · ring_len +
    position mod ring_len) of the inputs before u, oldest first; write_slots [B · T'] those of the last T' <= ring_len
    tokens of u. A verify step needs ring_len >= T + W - 1, so that what it writes spares what the next one reads.
    """
    history = read_history(ring, read_slots, len(u))
    record_inputs(u, ring, write_slots)
    return causal_conv1d(u, weight, history)


def read_history(ring: Tensor, read_slots: Tensor, batch: int) -> Tensor:
    """The inputs before those of a pass over `batch` requests: [B, W - 1, C], a copy; see `causal_conv1d_cached`."""
    return ring.flatten(0, 1).index_select(0, read_slots).view(batch, -1, ring.shape[2])


def record_inputs(u: Tensor, ring: Tensor, write_slots: Tensor) -> None:
    """Put the newest of u [B, T, C] into the ring; see `causal_conv1d_cached`."""
    num_kept = len(write_slots) // len(u)
    newest = u[:, u.shape[1] - num_kept :].flatten(0, 1)
    ring.flatten(0, 1).index_copy_(0, write_slots, newest.to(ring.dtype))
