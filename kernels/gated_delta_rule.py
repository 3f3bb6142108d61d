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

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.delta_training import DeltaRule, continue_delta_rule
from kernels.cpu.library import load_library
from kernels.cpu.training import runs
from kernels.gpu.dispatch import runs_triton

CHUNK_LEN = 64
# Numbers of a state below which a second thread is not worth waking.
_PARALLEL_NUMBERS = 2**18


class DeltaRing(NamedTuple):
    """What a later fold needs, by row and position mod ring_len: k [R, ring_len, HK, DK], u [R, ring_len, HV, DV],
    alpha [R, ring_len, HV]. ring_len is at least twice the rows of a verify step."""

    k: Tensor
    u: Tensor
    alpha: Tensor


class Fold(NamedTuple):
    """What a pass must fold first, the same for every layer: of each request the newest F recorded tokens at most.

    groups: pairs (rows of the state, their requests) of slices that together cover the B requests; the states of one
    group are worked on together, and always in place. slots [B · F] int64: flat ring slots, oldest first; is_accepted
    [B, F] bool, None when all are. F may be 0.
    """

    groups: tuple[tuple[slice, slice], ...]
    slots: Tensor
    is_accepted: Tensor | None


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor) -> Tensor:
    """Whole sequences from a zero state, differentiable: o [B, T, HV, DV].

    q, k [B, T, HK, DK]; v [B, T, HV, DV]; log_alpha, beta [B, T, HV]. float32 on a CPU takes kernels/cpu, whose
    results are nearer to those of float64.
    """
    if runs(q, k, v, log_alpha, beta):
        return DeltaRule.apply(q, k, v, log_alpha, beta)
    state = q.new_zeros(q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    return _run_chunks(q, k, v, log_alpha, beta, state)[0]


def gated_delta_rule_prefill(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor, ring: DeltaRing, fold: Fold
) -> Tensor:
    """Known tokens: fold what the last verify step left, run all T tokens, store the state after the last one.

    Shapes as in `gated_delta_rule`; state [R, HV, DK, DV] is updated in place. The caller sets the rows' accept_len to
    0, because nothing is left to fold.
    """
    recorded = _read_ring(ring, fold, v.shape[2])
    for group, members in fold.groups:
        _fold(state[group], recorded, members)
    rows = [row for group, _ in fold.groups for row in range(group.start, group.stop)]
    states = state[rows]
    if runs(q, k, v, log_alpha, beta, states):
        out = continue_delta_rule((q, k, v, log_alpha, beta), states)
    else:
        out, states = _run_chunks(q, k, v, log_alpha, beta, states)
    state[rows] = states
    return out


def gated_delta_rule_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    ring: DeltaRing,
    fold: Fold,
    write_slots: Tensor,
) -> Tensor:
    """One verify step: fold the accepted tokens into the state (once), run T tokens, record them in the ring.

    Shapes as in `gated_delta_rule_prefill`; write_slots [B · T] int64 are the tokens' flat ring slots. On entry the
    state stands at start_len - accept_len, on exit at start_len.
    """
    recorded = _read_ring(ring, fold, v.shape[2])
    qk = _stack_heads(q.transpose(1, 2), k.transpose(1, 2), v.shape[2])
    reads = [qk[members] @ _fold(state[rows], recorded, members) for rows, members in fold.groups]
    seen = reads[0] if len(reads) == 1 else torch.cat(reads)
    out, u = _run_rows(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), log_alpha.mT, beta.mT, seen)
    for part, value in zip(ring, (k, u.transpose(1, 2), log_alpha.exp()), strict=True):
        part.flatten(0, 1).index_copy_(0, write_slots, value.flatten(0, 1))
    return out.transpose(1, 2)


def fold_recorded(state: Tensor, recorded: DeltaRing, count: Tensor, out: Tensor) -> None:
    """Write the states after the first `count` recorded tokens to `out`; `state` is not written.

    state, out [L, HV, DK, DV], the layers perhaps apart; recorded k [L, F, HK, DK], u [L, F, HV, DV], alpha [L, F, HV],
    oldest first; count: a number 0..F on the device.
    """
    library = load_library() if state.device.type == "cpu" and not runs_triton(state) else None
    if library is None:
        out.copy_(fold_recorded_torch(state, recorded, count))
        return
    k, u, alpha = (part.contiguous() for part in recorded)
    assert state[0].is_contiguous() and out[0].is_contiguous() and int(count) <= k.shape[1]
    sizes = (len(state), k.shape[2], *state.shape[1:], k.shape[1], state.stride(0), out.stride(0))
    function = library.fold_recorded_float32 if state.dtype == torch.float32 else library.fold_recorded_float64
    num_threads = torch.get_num_threads() if state.numel() >= _PARALLEL_NUMBERS else 1
    addresses = [tensor.data_ptr() for tensor in (state, k, u, alpha, out)]
    function((ctypes.c_int64 * len(sizes))(*sizes), *addresses, int(count), num_threads)


def fold_recorded_torch(state: Tensor, recorded: DeltaRing, count: Tensor) -> Tensor:
    """The law: what `fold_recorded` writes."""
    num_heads, is_known = state.shape[1], not count.is_cuda
    for index in range(int(count) if is_known else recorded.k.shape[1]):
        k, u, alpha = (part[:, index] for part in recorded)
        k = k.repeat_interleave(num_heads // k.shape[1], dim=1)
        folded = state * alpha[..., None, None] + k[..., None] * u[:, :, None]
        state = folded if is_known else torch.where(count > index, folded, state)
    return state


def _read_ring(ring: DeltaRing, fold: Fold, num_heads: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """What the fold does to a state, `S · decay + k · u`: decay [B, HV, 1, 1], k [B, HV, DK, F], u [B, HV, F, DV].

    None when there is nothing to fold.
    """
    if len(fold.slots) == 0:
        return None
    batch = max(members.stop for _, members in fold.groups)
    k, u, alpha = (x.flatten(0, 1).index_select(0, fold.slots).view(batch, -1, *x.shape[2:]) for x in ring)
    alpha = alpha.mT  # [B, HV, F]
    if fold.is_accepted is not None:
        alpha = torch.where(fold.is_accepted[:, None], alpha, 1.0)
        k = k * fold.is_accepted[:, :, None, None]
    k, u = _expand_heads(k.transpose(1, 2), num_heads), u.transpose(1, 2)
    if alpha.shape[-1] > 1:
        # What token j leaves is decayed by every later one.
        decay = alpha.flip(-1).cumprod(-1).flip(-1)
        k = k * F.pad(decay[..., 1:], (0, 1), value=1.0)[..., None]
        alpha = decay[..., :1]
    return alpha[..., None], k.mT, u


def _fold(state: Tensor, recorded: tuple[Tensor, Tensor, Tensor] | None, members: slice) -> Tensor:
    """Fold into the group's states [b, HV, DK, DV], in place, and return them."""
    if recorded is None:
        return state
    decay, k, u = (part[members] for part in recorded)
    state.mul_(decay)
    if k.shape[-1] == 1:
        return state.addcmul_(k, u)
    state.flatten(0, 1).baddbmm_(k.flatten(0, 1), u.flatten(0, 1))
    return state


def _run_chunks(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, HV, DV] of all tokens, chunk by chunk, and the state after them. `state` is not written."""
    outs = []
    for start in range(0, q.shape[1], CHUNK_LEN):
        part = slice(start, start + CHUNK_LEN)
        q_c, k_c, v_c = (x[:, part].transpose(1, 2) for x in (q, k, v))
        log_alpha_c = log_alpha[:, part].mT
        reads = _stack_heads(q_c, k_c, v.shape[2]) @ state
        out, u = _run_rows(q_c, k_c, v_c, log_alpha_c, beta[:, part].mT, reads)
        outs.append(out)
        total = log_alpha_c.cumsum(-1)
        weight = (total[..., -1:] - total).exp()
        k_c = _expand_heads(k_c, v.shape[2]) * weight[..., None]
        state = state * total[..., -1].exp()[..., None, None] + k_c.mT @ u
    return torch.cat(outs, dim=2).transpose(1, 2), state


def _run_rows(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, reads: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk, heads first: outputs and u, both [B, HV, T, DV]. q, k [B, HK, T, DK]; log_alpha, beta [B, HV, T].

    reads [B, HV, 2T, DV] is the state before the chunk as the rows of q, then of k, see it.
    """
    num_rows, num_heads = q.shape[2], v.shape[1]
    total = log_alpha.cumsum(-1) if num_rows > 1 else log_alpha
    reads = reads.view(len(q), num_heads, 2, num_rows, -1) * total.exp()[:, :, None, :, None]
    q_state, k_state = reads.unbind(2)
    u = (v - k_state) * beta[..., None]
    if num_rows == 1:
        return torch.addcmul(q_state, _expand_heads(torch.linalg.vecdot(q, k)[..., None], num_heads), u), u
    lower = torch.ones(num_rows, num_rows, dtype=torch.bool, device=q.device).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    mixing = _expand_heads(k @ k.mT, num_heads) * decay * beta[..., None]
    u = torch.linalg.solve_triangular(mixing, u, upper=False, unitriangular=True)
    return q_state + (_expand_heads(q @ k.mT, num_heads) * decay) @ u, u


def _stack_heads(q: Tensor, k: Tensor, num_heads: int) -> Tensor:
    """q and k [B, HK, T, DK] as the 2T rows [B, HV, 2T, DK] that read the state."""
    return _expand_heads(torch.cat([q, k], dim=2), num_heads)


def _expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, HK, ...] -> [B, HV, ...]: value head i reads key head i // (HV / HK)."""
    repeat = num_heads // x.shape[1]
    return x if repeat == 1 else x[:, :, None].expand(-1, -1, repeat, *x.shape[2:]).flatten(1, 2)
