"""The usual way to roll a delta-net state back, to compare with: a verify step that keeps a state after every token.

`pool` [R, T, HV, DK, DV] holds what the last step left; the state of the last accepted token is read, T tokens run, and
T states are written: T + 1 passes over the state instead of two. The arithmetic is that of
kernels/gpu/gated_delta_rule.py, whose shapes and legend hold here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gated_delta_net import DeltaNetShape
from kernels.gpu.gated_delta_rule import DeltaInputs, _load_gates, _update
from kernels.gpu.launch import power_of_two


def snapshot_verify(
    inputs: DeltaInputs, shape: DeltaNetShape, pool: Tensor, rows: Tensor, accept_lens: Tensor, columns: int = 16
) -> Tensor:
    """[N, HV, DV] float32 of N = B · T tokens. Reads pool[row, accept_len - 1], of accept_len 0 the first; writes
    pool[row]. A program takes `columns` of a state, which changes no bit; from 32 on registers do not suffice."""
    batch, num_tokens = len(rows), len(inputs.conv)
    key_heads, value_heads, key_dim, value_dim = shape
    out = torch.empty(num_tokens, value_heads, value_dim, dtype=torch.float32, device=pool.device)
    columns = min(columns, power_of_two(value_dim))
    _snapshot_kernel[(triton.cdiv(value_dim, columns), value_heads, batch)](
        *(*inputs, pool, out, rows, accept_lens, inputs.conv.stride(0), inputs.gates.stride(0), key_dim**-0.5),
        SLOTS=pool.shape[1],
        T=num_tokens // batch,
        HK=key_heads,
        HV=value_heads,
        DK=key_dim,
        DV=value_dim,
        BK=power_of_two(key_dim),
        BV=columns,
        num_warps=1,
    )
    return out


@triton.jit
def _snapshot_kernel(
    conv_ptr, gates_ptr, a_log_ptr, dt_bias_ptr, pool_ptr, out_ptr, rows_ptr, accept_lens_ptr,
    conv_stride, gates_stride, scale,
    SLOTS: tl.constexpr, T: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    tile, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    key_head = head // (HV // HK)
    k_at, v_at = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    k_mask, v_mask = k_at < DK, v_at < DV
    out_ptr += (request * T * HV + head) * DV
    row, newest = tl.load(rows_ptr + request), tl.maximum(tl.load(accept_lens_ptr + request) - 1, 0)
    states = pool_ptr + (row * SLOTS * HV + head) * DK * DV + k_at[:, None] * DV + v_at[None, :]
    mask = k_mask[:, None] & v_mask[None, :]
    S = tl.load(states + newest * HV * DK * DV, mask=mask, other=0.0)
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
        seen_k, seen_q = tl.sum(S * k[:, None], 0), tl.sum(S * q[:, None], 0)
        u = beta * (v - alpha * seen_k)
        tl.store(
            out_ptr + t * HV * DV + v_at, tl.fma(seen_q, tl.broadcast_to(alpha, [BV]), u * tl.sum(q * k)), mask=v_mask
        )
        S = _update(S, alpha, k, u)
        tl.store(states + t * HV * DK * DV, S, mask=mask)
