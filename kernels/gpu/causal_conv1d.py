"""Triton kernels of kernels/causal_conv1d.py: on the ring, for equally many guessed tokens and for ragged known ones.

B requests, N tokens of all of them, T tokens each, C channels, W taps, R rows, L = ring_len.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import power_of_two

_CHANNELS = 256
_TOKENS = 16


def causal_conv1d_verify(u: Tensor, weight: Tensor, ring: Tensor, rows: Tensor, start_lens: Tensor) -> Tensor:
    """Convolve T guessed tokens of each request behind the ring's history, and record them: [B · T, C] float32.

    u [B · T, C], rows may be strided; weight [C, W], ring [R, L, C] float32, L >= T + W - 1; rows, start_lens [B]
    int64. Row 0 is padding: nothing is recorded there.
    """
    batch, channels = len(rows), u.shape[1]
    out = torch.empty(u.shape, dtype=torch.float32, device=u.device)
    if batch == 0:
        return out
    assert ring.shape[1] >= len(u) // batch + weight.shape[1] - 1
    block = min(_CHANNELS, power_of_two(channels))
    _verify_kernel[(triton.cdiv(channels, block), batch)](
        *(u, weight, ring, out, rows, start_lens, u.stride(0), channels, ring.shape[1]),
        T=len(u) // batch,
        W=weight.shape[1],
        BLOCK=block,
        num_warps=max(1, block // 64),
    )
    return out


def causal_conv1d_prefill(
    u: Tensor, weight: Tensor, ring: Tensor, rows: Tensor, start_lens: Tensor, query_starts: Tensor, longest: int
) -> Tensor:
    """Convolve ragged known tokens and record the last L of each request: [N, C] float32.

    As `causal_conv1d_verify`; request b has tokens query_starts[b] .. query_starts[b + 1] - 1 (int64 on the device), no
    more than `longest`. The record is a launch of its own: it overwrites the history that the first one reads.
    """
    batch, channels = len(rows), u.shape[1]
    out = torch.empty(u.shape, dtype=torch.float32, device=u.device)
    if len(u) == 0:
        return out
    block = min(_CHANNELS, power_of_two(channels))
    ring_len, num_warps, num_blocks = ring.shape[1], max(1, block // 64), triton.cdiv(channels, block)
    places = (rows, start_lens, query_starts, u.stride(0), channels, ring_len)
    _prefill_kernel[(num_blocks, triton.cdiv(longest, _TOKENS), batch)](
        *(u, weight, ring, out, *places), W=weight.shape[1], TOKENS=_TOKENS, BLOCK=block, num_warps=num_warps
    )
    _record_kernel[(num_blocks, batch)](*(u, ring, *places), BLOCK=block, num_warps=num_warps)
    return out


@triton.jit
def _verify_kernel(
    u_ptr, weight_ptr, ring_ptr, out_ptr, rows_ptr, start_lens_ptr, u_stride, channels, ring_len,
    T: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    row, start = tl.load(rows_ptr + request), tl.load(start_lens_ptr + request)
    for t in tl.static_range(T):
        total = tl.zeros([BLOCK], tl.float32)
        for tap in tl.static_range(W):
            weight = tl.load(weight_ptr + channel * W + tap, mask=mask, other=0.0)
            if t + tap >= W - 1:
                token = request * T + t + tap - (W - 1)
                x = tl.load(u_ptr + token * u_stride + channel, mask=mask, other=0.0).to(tl.float32)
            else:
                slot = (start + t + tap - (W - 1) + ring_len) % ring_len
                x = tl.load(ring_ptr + (row * ring_len + slot) * channels + channel, mask=mask, other=0.0)
            total = tl.fma(x, weight, total)
        tl.store(out_ptr + (request * T + t) * channels + channel, total * tl.sigmoid(total), mask=mask)
    if row != 0:
        for t in tl.static_range(T):
            x = tl.load(u_ptr + (request * T + t) * u_stride + channel, mask=mask, other=0.0).to(tl.float32)
            slot = (start + t) % ring_len
            tl.store(ring_ptr + (row * ring_len + slot) * channels + channel, x, mask=mask)


@triton.jit
def _prefill_kernel(
    u_ptr, weight_ptr, ring_ptr, out_ptr, rows_ptr, start_lens_ptr, query_starts_ptr, u_stride, channels, ring_len,
    W: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(2).to(tl.int64)
    first = tl.load(query_starts_ptr + request)
    num_tokens = tl.load(query_starts_ptr + request + 1) - first
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    if tl.program_id(1) * TOKENS >= num_tokens:
        return
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, start = tl.load(rows_ptr + request), tl.load(start_lens_ptr + request)
    mask = (t < num_tokens)[:, None] & (channel < channels)[None, :]
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    for tap in tl.static_range(W):
        source = t + tap - (W - 1)
        weight = tl.load(weight_ptr + channel * W + tap, mask=channel < channels, other=0.0)
        is_new = (source >= 0)[:, None]
        where = (first + source)[:, None] * u_stride + channel[None, :]
        new = tl.load(u_ptr + where, mask=mask & is_new, other=0.0).to(tl.float32)
        slot = (start + source + ring_len) % ring_len
        where = (row * ring_len + slot)[:, None] * channels + channel[None, :]
        old = tl.load(ring_ptr + where, mask=mask & (is_new == 0), other=0.0)
        total = tl.fma(tl.where(is_new, new, old), tl.broadcast_to(weight[None, :], [TOKENS, BLOCK]), total)
    where = (first + t)[:, None] * channels + channel[None, :]
    tl.store(out_ptr + where, total * tl.sigmoid(total), mask=mask)


@triton.jit
def _record_kernel(
    u_ptr, ring_ptr, rows_ptr, start_lens_ptr, query_starts_ptr, u_stride, channels, ring_len, BLOCK: tl.constexpr
):  # fmt: skip
    request = tl.program_id(1).to(tl.int64)
    first, end = tl.load(query_starts_ptr + request), tl.load(query_starts_ptr + request + 1)
    row, start = tl.load(rows_ptr + request), tl.load(start_lens_ptr + request)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    for token in range(tl.maximum(first, end - ring_len), end):
        x = tl.load(u_ptr + token * u_stride + channel, mask=mask, other=0.0).to(tl.float32)
        slot = (start + token - first) % ring_len
        tl.store(ring_ptr + (row * ring_len + slot) * channels + channel, x, mask=mask)
