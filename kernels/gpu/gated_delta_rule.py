"""Triton kernels of kernels/gated_delta_rule.py: fold and verify in one pass over the state, and the chunked prefill.

A program owns BV columns of one head's state S [DK, DV], which stays in registers. It first folds the m tokens that the
last verify step recorded and that were accepted (u is recorded, so that no sum is needed), then

- verify: stores S, which is the only write of the state, and runs the T guessed tokens one by one on the copy in
  registers, recording them in the ring. One pass reads the state once and writes it once, for any T, and every T does
  the same arithmetic in the same order.
- prefill: runs chunk after chunk of CHUNK tokens and stores S behind the last one. What needs no state, above all the
  inverse of each chunk's triangular system (by substitution), is prepared for all chunks at once by a launch before.

q and k come raw from the convolution and are normed here. B requests, N tokens of all of them, T tokens each, HK key
heads, HV value heads, R rows, L = ring_len, a power of two. Everything is float32 but `projected`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gated_delta_net import DeltaNetShape
from kernels.gated_delta_rule import DeltaRing
from kernels.gpu.launch import power_of_two

_CHUNK = 16
# One chunk follows the other: few columns and one warp make each of them short, and its loads are under way before.
_PREFILL_COLUMNS, _CHAIN_WARPS, _CHAIN_STAGES = 16, 1, 3
_PREPARE_WARPS = 2
# The same for every batch, as the order of the sums over DK follows from the tile: a row's bits depend on no company.
_VERIFY_COLUMNS = 16


class DeltaInputs(NamedTuple):
    """conv [N, C]: the convolution's q | k | v. gates [N, 2·HV], rows may be strided: the projections b | a. a_log,
    dt_bias [HV]."""

    conv: Tensor
    gates: Tensor
    a_log: Tensor
    dt_bias: Tensor


def gated_delta_rule_verify(
    inputs: DeltaInputs,
    shape: DeltaNetShape,
    state: Tensor,
    ring: DeltaRing,
    rows: Tensor,
    start_lens: Tensor,
    accept_lens: Tensor,
) -> Tensor:
    """Fold, then verify N = B · T tokens: [N, HV, DV] float32.

    state [R, HV, DK, DV] stands at start_lens - accept_lens and is moved to start_lens; ring: see DeltaRing; rows,
    start_lens, accept_lens [B] int64. Row 0 is padding: it gives 0 and nothing is written there.
    """
    batch, num_tokens = len(rows), len(inputs.conv)
    key_heads, value_heads, key_dim, value_dim = shape
    out = torch.empty(num_tokens, value_heads, value_dim, dtype=torch.float32, device=state.device)
    if batch == 0:
        return out
    columns = min(_VERIFY_COLUMNS, power_of_two(value_dim))
    _verify_kernel[(triton.cdiv(value_dim, columns), value_heads, batch)](
        *(*inputs, state, *ring, out, rows, start_lens, accept_lens),
        *(inputs.conv.stride(0), inputs.gates.stride(0), key_dim**-0.5),
        RING_LEN=ring.k.shape[1],
        T=num_tokens // batch,
        HK=key_heads,
        HV=value_heads,
        DK=key_dim,
        DV=value_dim,
        BK=power_of_two(key_dim),
        BV=columns,
        num_warps=1,  # no sum crosses a warp
    )
    return out


def gated_delta_rule_prefill(
    inputs: DeltaInputs,
    shape: DeltaNetShape,
    state: Tensor,
    ring: DeltaRing,
    rows: Tensor,
    start_lens: Tensor,
    accept_lens: Tensor,
    query_starts: Tensor,
    longest: int,
) -> Tensor:
    """Fold, then run ragged known tokens and store the state behind the last one of each request: [N, HV, DV] float32.

    As `gated_delta_rule_verify`; request b has tokens query_starts[b] .. query_starts[b + 1] - 1 (int64, on the
    device), no more than `longest`. The ring is read only: the caller sets the rows' accept_len to 0.
    """
    batch, num_tokens = len(rows), len(inputs.conv)
    key_heads, value_heads, key_dim, value_dim = shape
    out = torch.empty(num_tokens, value_heads, value_dim, dtype=torch.float32, device=state.device)
    if num_tokens == 0:
        return out
    sizes = {"HK": key_heads, "HV": value_heads, "DK": key_dim, "DV": value_dim, "BK": max(16, power_of_two(key_dim))}

    def scratch(width: int) -> Tensor:
        return torch.empty(num_tokens, value_heads, width, dtype=torch.float32, device=state.device)

    prepared = (scratch(key_dim), scratch(key_dim), scratch(key_dim), scratch(value_dim), scratch(_CHUNK), scratch(1))
    _prepare_kernel[(triton.cdiv(longest, _CHUNK), value_heads, batch)](
        *(*inputs, query_starts, *prepared, inputs.conv.stride(0), inputs.gates.stride(0), key_dim**-0.5),
        **sizes,
        BV=max(16, power_of_two(value_dim)),
        CHUNK=_CHUNK,
        num_warps=_PREPARE_WARPS,
    )
    columns = min(_PREFILL_COLUMNS, max(16, power_of_two(value_dim)))
    _chain_kernel[(triton.cdiv(value_dim, columns), value_heads, batch)](
        *(*prepared, state, *ring, out, rows, start_lens, accept_lens, query_starts),
        **sizes,
        RING_LEN=ring.k.shape[1],
        BV=columns,
        CHUNK=_CHUNK,
        # What a bf16 model feeds in has fewer digits than tf32.
        PRECISION="tf32" if inputs.gates.dtype == torch.bfloat16 else "tf32x3",
        num_warps=_CHAIN_WARPS,
        num_stages=_CHAIN_STAGES,
    )
    return out


def fold_states(
    shape: DeltaNetShape, state: Tensor, ring: DeltaRing, rows: Tensor, start_lens: Tensor, accept_lens: Tensor
) -> None:
    """The fold alone, for a prefill that others do: the states then stand at start_lens. Arguments as above."""
    key_heads, value_heads, key_dim, value_dim = shape
    columns = min(_VERIFY_COLUMNS, power_of_two(value_dim))
    _fold_kernel[(triton.cdiv(value_dim, columns), value_heads, len(rows))](
        *(state, *ring, rows, start_lens, accept_lens),
        RING_LEN=ring.k.shape[1],
        HK=key_heads,
        HV=value_heads,
        DK=key_dim,
        DV=value_dim,
        BK=power_of_two(key_dim),
        BV=columns,
        num_warps=1,
    )


@triton.jit
def _load_gates(gates_ptr, a_log_ptr, dt_bias_ptr, where, mask, head, HV: tl.constexpr):
    """log α and β of tokens at the offsets `where` of gates b | a."""
    b = tl.load(gates_ptr + where + head, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(gates_ptr + where + HV + head, mask=mask, other=0.0).to(tl.float32)
    x = a + tl.load(dt_bias_ptr + head)
    softplus = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
    return -tl.exp(tl.load(a_log_ptr + head)) * softplus, tl.sigmoid(b)


@triton.jit
def _fold(
    S, k_ptr, u_ptr, alpha_ptr, row, stand, count, key_head, head,
    k_at, k_mask, v_at, v_mask,
    RING_LEN: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """S after the `count` recorded tokens from position `stand` on: rounded as the verify rounded it."""
    for index in range(count):
        slot = row * RING_LEN + (stand + index) % RING_LEN
        alpha = tl.load(alpha_ptr + slot * HV + head)
        k = tl.load(k_ptr + (slot * HK + key_head) * DK + k_at, mask=k_mask, other=0.0)
        u = tl.load(u_ptr + (slot * HV + head) * DV + v_at, mask=v_mask, other=0.0)
        S = _update(S, alpha, k, u)
    return S


@triton.jit
def _update(S, alpha, k, u):
    """α S + k uᵀ, as one explicit fused multiply-add: a fold must round exactly as the verify step did."""
    return tl.fma(tl.broadcast_to(k[:, None], S.shape), tl.broadcast_to(u[None, :], S.shape), S * alpha)


@triton.jit
def _fold_kernel(
    state_ptr, ring_k_ptr, ring_u_ptr, ring_alpha_ptr, rows_ptr, start_lens_ptr, accept_lens_ptr,
    RING_LEN: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    tile, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, count = tl.load(start_lens_ptr + request), tl.load(accept_lens_ptr + request)
    if count == 0:
        return
    row = tl.load(rows_ptr + request)
    k_at, v_at = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    k_mask, v_mask = k_at < DK, v_at < DV
    where = state_ptr + (row * HV + head) * DK * DV + k_at[:, None] * DV + v_at[None, :]
    mask = k_mask[:, None] & v_mask[None, :]
    S = tl.load(where, mask=mask, other=0.0)
    S = _fold(
        S, ring_k_ptr, ring_u_ptr, ring_alpha_ptr, row, start - count, count, head // (HV // HK), head,
        k_at, k_mask, v_at, v_mask, RING_LEN, HK, HV, DK, DV,
    )  # fmt: skip
    tl.store(where, S, mask=mask)


@triton.jit
def _verify_kernel(
    conv_ptr, gates_ptr, a_log_ptr, dt_bias_ptr, state_ptr, ring_k_ptr, ring_u_ptr, ring_alpha_ptr, out_ptr,
    rows_ptr, start_lens_ptr, accept_lens_ptr, conv_stride, gates_stride, scale,
    RING_LEN: tl.constexpr, T: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    tile, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    key_head = head // (HV // HK)
    row = tl.load(rows_ptr + request)
    k_at, v_at = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    k_mask, v_mask = k_at < DK, v_at < DV
    out_ptr += (request * T * HV + head) * DV
    if row == 0:
        for t in tl.static_range(T):
            tl.store(out_ptr + t * HV * DV + v_at, tl.zeros([BV], tl.float32), mask=v_mask)
        return
    start, count = tl.load(start_lens_ptr + request), tl.load(accept_lens_ptr + request)
    where = state_ptr + (row * HV + head) * DK * DV + k_at[:, None] * DV + v_at[None, :]
    mask = k_mask[:, None] & v_mask[None, :]
    S = tl.load(where, mask=mask, other=0.0)
    S = _fold(
        S, ring_k_ptr, ring_u_ptr, ring_alpha_ptr, row, start - count, count, key_head, head,
        k_at, k_mask, v_at, v_mask, RING_LEN, HK, HV, DK, DV,
    )  # fmt: skip
    if count > 0:
        tl.store(where, S, mask=mask)
    for t in tl.static_range(T):
        token = conv_ptr + (request * T + t) * conv_stride
        q = tl.load(token + key_head * DK + k_at, mask=k_mask, other=0.0)
        k = tl.load(token + (HK + key_head) * DK + k_at, mask=k_mask, other=0.0)
        v = tl.load(token + 2 * HK * DK + head * DV + v_at, mask=v_mask, other=0.0)
        gates_at = (request * T + t) * gates_stride
        log_alpha, beta = _load_gates(gates_ptr, a_log_ptr, dt_bias_ptr, gates_at, True, head, HV)
        alpha = tl.exp(log_alpha)
        q = q * (tl.rsqrt(tl.sum(q * q) + 1e-6) * scale)
        k = k * tl.rsqrt(tl.sum(k * k) + 1e-6)
        # Both sums read the same S, so that their latencies overlap.
        seen_k, seen_q = tl.sum(S * k[:, None], 0), tl.sum(S * q[:, None], 0)
        u = beta * (v - alpha * seen_k)
        tl.store(
            out_ptr + t * HV * DV + v_at, tl.fma(seen_q, tl.broadcast_to(alpha, [BV]), u * tl.sum(q * k)), mask=v_mask
        )
        slot = row * RING_LEN + (start + t) % RING_LEN
        tl.store(ring_u_ptr + (slot * HV + head) * DV + v_at, u, mask=v_mask)
        if tile == 0:
            tl.store(ring_alpha_ptr + slot * HV + head, alpha)
            if head % (HV // HK) == 0:
                tl.store(ring_k_ptr + (slot * HK + key_head) * DK + k_at, k, mask=k_mask)
        if t + 1 < T:
            S = _update(S, alpha, k, u)


@triton.jit
def _prepare_kernel(
    conv_ptr, gates_ptr, a_log_ptr, dt_bias_ptr, query_starts_ptr,
    q_out_ptr, k_out_ptr, w_out_ptr, u_out_ptr, reads_out_ptr, total_out_ptr, conv_stride, gates_stride, scale,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """All of a chunk that needs no state. With M = I + tril(β k·kᵀ decay, -1), by token and value head:
    w = M⁻¹ β e^G k; u = M⁻¹ β v; reads = tril(q·kᵀ decay); q e^G; k e^(G_last - G); e^G."""
    head, request = tl.program_id(1), tl.program_id(2).to(tl.int64)
    key_head = head // (HV // HK)
    end = tl.load(query_starts_ptr + request + 1)
    start = tl.load(query_starts_ptr + request) + tl.program_id(0) * CHUNK
    if start >= end:
        return
    token = start + tl.arange(0, CHUNK)
    is_token = token < end
    k_at, v_at = tl.arange(0, BK), tl.arange(0, BV)
    k_mask = is_token[:, None] & (k_at < DK)[None, :]
    v_mask = is_token[:, None] & (v_at < DV)[None, :]
    conv = conv_ptr + token[:, None] * conv_stride
    log_alpha, beta = _load_gates(gates_ptr, a_log_ptr, dt_bias_ptr, token * gates_stride, is_token, head, HV)
    total = tl.cumsum(tl.where(is_token, log_alpha, 0.0))
    beta = tl.where(is_token, beta, 0.0)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    decay = tl.exp(tl.where(i >= j, total[:, None] - total[None, :], float("-inf")))
    k = tl.load(conv + (HK + key_head) * DK + k_at[None, :], mask=k_mask, other=0.0)
    k = k * tl.rsqrt(tl.sum(k * k, 1) + 1e-6)[:, None]
    place = token * HV + head
    last = tl.sum(tl.where(tl.arange(0, CHUNK) == CHUNK - 1, total, 0.0))
    out = place[:, None] * DK + k_at[None, :]
    tl.store(k_out_ptr + out, k * tl.exp(last - total)[:, None], mask=k_mask)
    tl.store(total_out_ptr + place, tl.exp(total), mask=is_token)
    mixing = tl.where(i > j, tl.dot(k, tl.trans(k), input_precision="tf32x3") * decay * beta[:, None], 0.0)
    inverse = tl.where(i == j, 1.0, 0.0)
    for index in range(1, tl.minimum(end - start, CHUNK).to(tl.int32)):
        row = tl.sum(tl.where(i == index, mixing, 0.0), 0)
        known = tl.sum(row[:, None] * inverse, 0)
        inverse = tl.where(i == index, inverse - known[None, :], inverse)
    w = tl.dot(inverse, k * (beta * tl.exp(total))[:, None], input_precision="tf32x3")
    tl.store(w_out_ptr + out, w, mask=k_mask)
    q = tl.load(conv + key_head * DK + k_at[None, :], mask=k_mask, other=0.0)
    q = q * (tl.rsqrt(tl.sum(q * q, 1) + 1e-6) * scale)[:, None]
    reads = tl.dot(q, tl.trans(k), input_precision="tf32x3") * decay
    tl.store(reads_out_ptr + place[:, None] * CHUNK + j, reads, mask=is_token[:, None])
    tl.store(q_out_ptr + out, q * tl.exp(total)[:, None], mask=k_mask)
    v = tl.load(conv + 2 * HK * DK + head * DV + v_at[None, :], mask=v_mask, other=0.0)
    u = tl.dot(inverse, v * beta[:, None], input_precision="tf32x3")
    tl.store(u_out_ptr + place[:, None] * DV + v_at[None, :], u, mask=v_mask)


@triton.jit
def _chain_kernel(
    q_ptr, k_ptr, w_ptr, u_ptr, reads_ptr, total_ptr, state_ptr, ring_k_ptr, ring_u_ptr, ring_alpha_ptr, out_ptr,
    rows_ptr, start_lens_ptr, accept_lens_ptr, query_starts_ptr,
    RING_LEN: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state from chunk to chunk: u - w S, what the tokens read, and S behind them."""
    tile, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.load(rows_ptr + request)
    first, end = tl.load(query_starts_ptr + request), tl.load(query_starts_ptr + request + 1)
    start, count = tl.load(start_lens_ptr + request), tl.load(accept_lens_ptr + request)
    k_at, v_at = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    k_mask, v_mask = k_at < DK, v_at < DV
    where = state_ptr + (row * HV + head) * DK * DV + k_at[:, None] * DV + v_at[None, :]
    S = tl.load(where, mask=k_mask[:, None] & v_mask[None, :], other=0.0)
    S = _fold(
        S, ring_k_ptr, ring_u_ptr, ring_alpha_ptr, row, start - count, count, head // (HV // HK), head,
        k_at, k_mask, v_at, v_mask, RING_LEN, HK, HV, DK, DV,
    )  # fmt: skip
    for chunk in range(first, end, CHUNK):
        token = chunk + tl.arange(0, CHUNK)
        is_token = token < end
        place = token[:, None] * HV + head
        qk_at, qk_mask = place * DK + k_at[None, :], is_token[:, None] & k_mask[None, :]
        uo_at, uo_mask = place * DV + v_at[None, :], is_token[:, None] & v_mask[None, :]
        w = tl.load(w_ptr + qk_at, mask=qk_mask, other=0.0)
        u = tl.load(u_ptr + uo_at, mask=uo_mask, other=0.0) - tl.dot(w, S, input_precision=PRECISION)
        q = tl.load(q_ptr + qk_at, mask=qk_mask, other=0.0)
        reads_at = place * CHUNK + tl.arange(0, CHUNK)[None, :]
        reads = tl.load(reads_ptr + reads_at, mask=is_token[:, None], other=0.0)
        out = tl.dot(q, S, input_precision=PRECISION) + tl.dot(reads, u, input_precision=PRECISION)
        tl.store(out_ptr + uo_at, out, mask=uo_mask)
        k = tl.load(k_ptr + qk_at, mask=qk_mask, other=0.0)
        alpha = tl.load(total_ptr + (tl.minimum(chunk + CHUNK, end) - 1) * HV + head)
        S = S * alpha + tl.dot(tl.trans(k), u, input_precision=PRECISION)
    tl.store(where, S, mask=k_mask[:, None] & v_mask[None, :])
