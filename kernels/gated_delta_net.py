"""A Gated DeltaNet layer between its two projections, a verify step or whole sequences: convolution, gates, delta rule,
gated norm.

It composes kernels/causal_conv1d.py, kernels/gated_delta_rule.py and kernels/rms_norm.py, where the formulas stand, and
serves every device. On a CPU kernels/cpu/decoder.py does it, with all that surrounds it, in one pass over the state.

B requests, T tokens each, HK key heads, HV value heads, DK / DV their dimensions, C = 2·HK·DK + HV·DV channels, W taps,
R rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_cached, read_history, record_inputs
from kernels.cpu.delta_training import ConvolvedHeads
from kernels.cpu.training import runs
from kernels.gated_delta_rule import (
    DeltaRing,
    Fold,
    gated_delta_rule,
    gated_delta_rule_prefill,
    gated_delta_rule_verify,
)
from kernels.rms_norm import gated_rms_norm, l2_norm


class DeltaNetShape(NamedTuple):
    """Heads and dimensions: HK, HV, DK, DV."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


class DeltaNetWeights(NamedTuple):
    """conv [C, W], a_log [HV], dt_bias [HV], norm [DV], all of one dtype, float32 or wider; eps of the norm."""

    conv: Tensor
    a_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    eps: float


class DeltaNetMemory(NamedTuple):
    """One layer's cache, updated in place: conv_ring [R, ring_len, C], state [R, HV, DK, DV] and the delta ring."""

    conv_ring: Tensor
    state: Tensor
    ring: DeltaRing


class Stand(NamedTuple):
    """Where the B requests stand, all [B] int64 on the device: table rows, tokens in the cache before the pass, and how
    many of these the states have not folded yet."""

    rows: Tensor
    start_lens: Tensor
    accept_lens: Tensor


class VerifyPlace(NamedTuple):
    """Where the B requests stand, the same for every layer: rows, start_lens, accept_lens [B] int64, and what follows
    from them: the convolution's (read, write) slots, what to fold, and the delta ring's write slots."""

    rows: Tensor
    start_lens: Tensor
    accept_lens: Tensor
    conv_slots: tuple[Tensor, Tensor]
    fold: Fold
    write_slots: Tensor


def gated_delta_net_verify(
    projected: Tensor, shape: DeltaNetShape, weights: DeltaNetWeights, memory: DeltaNetMemory, place: VerifyPlace
) -> Tensor:
    """What the output projection reads, [B · T, HV · DV] in projected's dtype.

    projected [B · T, C + HV·DV + 2·HV]: the input projection's rows qkv | z | b | a. On entry the states stand at
    start_len - accept_len, on exit at start_len, with the T tokens recorded in the rings.
    """
    batch = len(place.rows)
    qkv, z, log_alpha, beta = split_projected(projected.view(batch, -1, projected.shape[-1]), shape, weights)
    conv = causal_conv1d_cached(qkv, weights.conv, memory.conv_ring, *place.conv_slots)
    q, k, v = split_heads(conv, shape)
    out = gated_delta_rule_verify(q, k, v, log_alpha, beta, memory.state, memory.ring, place.fold, place.write_slots)
    return gated_rms_norm(out, z, weights.norm, weights.eps).view(len(projected), -1)


def gated_delta_net_prefill(
    projected: Tensor,
    shape: DeltaNetShape,
    weights: DeltaNetWeights,
    memory: DeltaNetMemory,
    conv_slots: tuple[Tensor, Tensor],
    fold: Fold,
) -> Tensor:
    """Known tokens: projected [B, T, ...] as in `gated_delta_net_verify`, split by request -> [B · T, HV · DV].

    conv_slots are the convolution's (read, write) slots. On entry the states may be behind by what `fold` has, on exit
    they stand behind the last token.
    """
    qkv, z, log_alpha, beta = split_projected(projected, shape, weights)
    history = read_history(memory.conv_ring, conv_slots[0], len(projected))
    record_inputs(qkv, memory.conv_ring, conv_slots[1])
    q, k, v = convolve_heads(qkv, weights.conv, shape, history)
    out = gated_delta_rule_prefill(q, k, v, log_alpha, beta, memory.state, memory.ring, fold)
    return gated_rms_norm(out, z, weights.norm, weights.eps).view(-1, shape.value_heads * shape.value_dim)


def gated_delta_net_sequence(projected: Tensor, shape: DeltaNetShape, weights: DeltaNetWeights) -> Tensor:
    """Whole sequences from a zero state, differentiable: projected [B, T, ...] as in `gated_delta_net_verify`, split
    by sequence -> [B · T, HV · DV]."""
    qkv, z, log_alpha, beta = split_projected(projected, shape, weights)
    q, k, v = convolve_heads(qkv, weights.conv, shape)
    out = gated_delta_rule(q, k, v, log_alpha, beta)
    return gated_rms_norm(out, z, weights.norm, weights.eps).view(-1, shape.value_heads * shape.value_dim)


def convolve_heads(
    qkv: Tensor, conv: Tensor, shape: DeltaNetShape, history: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution of qkv [B, T, C] with conv [C, W], and `split_heads` of it; differentiable.

    history [B, W - 1, C], of conv's dtype, holds the inputs before qkv; None means zeros, as before whole sequences.
    """
    if history is not None and runs(conv):
        heads = ConvolvedHeads.apply(torch.cat([history, qkv.to(conv.dtype)], dim=1), conv, tuple(shape))
        return tuple(head[:, history.shape[1] :] for head in heads)
    if runs(qkv, conv):
        return ConvolvedHeads.apply(qkv, conv, tuple(shape))
    return split_heads(causal_conv1d(qkv, conv, history), shape)


def split_projected(
    projected: Tensor, shape: DeltaNetShape, weights: DeltaNetWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input projection [B, T, ...] -> qkv [B, T, C], z [B, T, HV, DV] in its dtype; log_alpha, beta [B, T, HV] wide."""
    heads, value_size = shape.value_heads, shape.value_heads * shape.value_dim
    qkv, z, b, a = projected.split([len(weights.conv), value_size, heads, heads], dim=-1)
    beta = b.to(weights.a_log.dtype).sigmoid()
    log_alpha = -weights.a_log.exp() * F.softplus(a + weights.dt_bias)
    return qkv, z.view(*z.shape[:2], heads, shape.value_dim), log_alpha, beta


def split_heads(conv: Tensor, shape: DeltaNetShape) -> tuple[Tensor, Tensor, Tensor]:
    """Convolved channels [B, T, C] -> normed, scaled q and normed k [B, T, HK, DK], and v [B, T, HV, DV]."""
    qk_size = 2 * shape.key_heads * shape.key_dim
    qk, v = conv.split([qk_size, conv.shape[-1] - qk_size], dim=-1)
    q, k = l2_norm(qk.reshape(*qk.shape[:2], 2, shape.key_heads, shape.key_dim)).unbind(2)
    return q * shape.key_dim**-0.5, k, v.view(*v.shape[:2], shape.value_heads, shape.value_dim)
