"""The gated delta rule: chunked over known tokens, and the fold-then-verify step of speculative decoding.

Per value head, with state S [DK, DV] (source: Qwen3.5; Gated DeltaNet, arXiv 2412.06464):

    S ← α_t S ;   u_t = β_t (v_t − Sᵀk_t) ;   S ← S + k_t u_tᵀ ;   o_t = Sᵀ q_t

Over a chunk with G_t = Σ_{j≤t} log α_j this becomes one unit-triangular solve for all u and masked products, which is
what runs here for any number of rows:

    u_t + β_t Σ_{j<t} e^{G_t−G_j} (k_t·k_j) u_j = β_t (v_t − e^{G_t} Sᵀk_t)
    o_t = e^{G_t} Sᵀq_t + Σ_{j≤t} e^{G_t−G_j} (q_t·k_j) u_j
    S'  = e^{G_T} S + Σ_j e^{G_T−G_j} k_j u_jᵀ

Because S' needs only k, u and α, a verify step records these in a ring and leaves S alone; the next step folds the
tokens that were accepted. Rejected rows are simply never folded.

B requests, T tokens, HK key heads, HV value heads (value head i uses key head i // (HV/HK)), R rows. All float32 or
wider. q is scaled and q, k are normed by the caller.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_LEN = 64


class DeltaRing(NamedTuple):
    """What a later fold needs, by row and position mod ring_len: k [R, ring_len, HK, DK], u [R, ring_len, HV, DV],
    alpha [R, ring_len, HV]. ring_len is at least twice the rows of a verify step."""

    k: Tensor
    u: Tensor
    alpha: Tensor


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor) -> Tensor:
    """Whole sequences from a zero state, differentiable: o [B, T, HV, DV].

    q, k [B, T, HK, DK]; v [B, T, HV, DV]; log_alpha, beta [B, T, HV].
    """
    state = q.new_zeros(q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    return _run_chunks(q, k, v, log_alpha, beta, state)[0]


def gated_delta_rule_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    ring: DeltaRing,
    rows: Tensor,
    start_lens: Tensor,
    accept_lens: Tensor,
) -> Tensor:
    """Known tokens: fold what the last verify step left, run all T tokens, store the state after the last one.

    Shapes as in `gated_delta_rule`; state [R, HV, DK, DV] is updated in place at `rows` [B] int64 and then stands at
    start_len + T, so the caller sets the rows' accept_len to 0. start_lens, accept_lens [B] int64.
    """
    current = _fold(state, ring, rows, start_lens, accept_lens)
    out, final = _run_chunks(q, k, v, log_alpha, beta, current)
    state[rows] = final
    return out


def gated_delta_rule_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    ring: DeltaRing,
    rows: Tensor,
    start_lens: Tensor,
    accept_lens: Tensor,
) -> Tensor:
    """One verify step: fold the accept_lens newest tokens into the state (once), run T tokens, record them in the ring.

    Shapes as in `gated_delta_rule_prefill`. On entry the state stands at start_len - accept_len, on exit at start_len.
    """
    current = _fold(state, ring, rows, start_lens, accept_lens)
    out, u = _run_rows(*(_heads_first(x) for x in (q, k, v)), log_alpha.mT, beta.mT, current)
    slots = (start_lens[:, None] + torch.arange(q.shape[1], device=q.device)) % ring.k.shape[1]
    index = (rows[:, None], slots)
    ring.k[index], ring.u[index], ring.alpha[index] = k, u.transpose(1, 2), log_alpha.exp()
    return out.transpose(1, 2)


def _fold(state: Tensor, ring: DeltaRing, rows: Tensor, start_lens: Tensor, accept_lens: Tensor) -> Tensor:
    """The rows' states [B, HV, DK, DV] at start_lens, written back in place when anything was folded."""
    current = _take_rows(state, rows)
    longest = int(accept_lens.max()) if len(rows) else 0
    if longest == 0:
        return current
    age = torch.arange(longest, device=rows.device)
    index = (rows[:, None], (start_lens - accept_lens)[:, None].add(age) % ring.k.shape[1])
    k, u, alpha = ring.k[index], ring.u[index], ring.alpha[index].mT
    if longest > 1:
        is_accepted = age < accept_lens[:, None]
        alpha = torch.where(is_accepted[:, None], alpha, 1.0)
        k = k * is_accepted[:, :, None, None]
        decay = alpha.flip(-1).cumprod(-1).flip(-1)
        total, weight = decay[..., 0], torch.cat([decay[..., 1:], torch.ones_like(decay[..., :1])], -1)
        k = _expand_heads(_heads_first(k), u.shape[2]) * weight[..., None]
    else:
        is_accepted = accept_lens[:, None]
        total = torch.where(is_accepted > 0, alpha[..., 0], 1.0)
        k = _expand_heads(_heads_first(k), u.shape[2]) * is_accepted[:, :, None, None]
    current.mul_(total[..., None, None])
    current.flatten(0, 1).baddbmm_(k.flatten(0, 1).mT, _heads_first(u).flatten(0, 1))
    if current.data_ptr() != state[rows[0]].data_ptr():
        state[rows] = current
    return current


def _take_rows(state: Tensor, rows: Tensor) -> Tensor:
    """state[rows]: a view when the rows are consecutive (no copy of what may be gigabytes), else a copy."""
    ids = rows.tolist()
    if ids == list(range(ids[0], ids[0] + len(ids))):
        return state[ids[0] : ids[0] + len(ids)]
    return state[rows]


def _run_chunks(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, HV, DV] of all tokens, chunk by chunk, and the state after them. `state` is not written."""
    outs = []
    for start in range(0, q.shape[1], CHUNK_LEN):
        part = slice(start, start + CHUNK_LEN)
        q_c, k_c, v_c = (_heads_first(x[:, part]) for x in (q, k, v))
        log_alpha_c = log_alpha[:, part].mT
        out, u = _run_rows(q_c, k_c, v_c, log_alpha_c, beta[:, part].mT, state)
        outs.append(out)
        total = log_alpha_c.cumsum(-1)
        weight = (total[..., -1:] - total).exp()
        k_c = _expand_heads(k_c, v.shape[2]) * weight[..., None]
        state = state * total[..., -1].exp()[..., None, None] + k_c.mT @ u
    return torch.cat(outs, dim=2).transpose(1, 2), state


def _run_rows(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk, heads first: outputs and u, both [B, HV, T, DV]. q, k [B, HK, T, DK]; log_alpha, beta [B, HV, T]."""
    num_rows, num_heads = q.shape[2], v.shape[1]
    qk_state = _expand_heads(torch.cat([q, k], dim=2), num_heads) @ state
    total = log_alpha.cumsum(-1) if num_rows > 1 else log_alpha
    q_state, k_state = (qk_state * total.exp().repeat(1, 1, 2)[..., None]).split(num_rows, dim=2)
    u = beta[..., None] * (v - k_state)
    if num_rows == 1:
        return q_state + _expand_heads((q * k).sum(-1, keepdim=True), num_heads) * u, u
    lower = torch.ones(num_rows, num_rows, dtype=torch.bool, device=q.device).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    mixing = _expand_heads(k @ k.mT, num_heads) * decay * beta[..., None]
    u = torch.linalg.solve_triangular(mixing, u, upper=False, unitriangular=True)
    return q_state + (_expand_heads(q @ k.mT, num_heads) * decay) @ u, u


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, HK, ...] -> [B, HV, ...]: value head i reads key head i // (HV / HK)."""
    repeat = num_heads // x.shape[1]
    return x if repeat == 1 else x.repeat_interleave(repeat, dim=1)
