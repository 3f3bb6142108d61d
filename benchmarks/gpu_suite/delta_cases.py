"""Cases of the delta-net layer: convolution, delta rule and all of it between the projections.

The rows 1..B of the caches hold requests, row 0 and what a kernel must not read hold NaN in the kernel's copy.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.gpu_suite import bytes as moved
from benchmarks.gpu_suite.case import Case, Setting
from benchmarks.gpu_suite.peers import delta_prefill_peers, delta_verify_peers
from kernels.causal_conv1d import causal_conv1d_cached
from kernels.gated_delta_net import (
    DeltaNetMemory,
    DeltaNetShape,
    DeltaNetWeights,
    Stand,
    VerifyPlace,
    gated_delta_net_verify,
    split_heads,
)
from kernels.gated_delta_rule import DeltaRing, Fold, gated_delta_rule_prefill, gated_delta_rule_verify
from kernels.gpu import causal_conv1d as conv_kernels
from kernels.gpu import gated_delta_net as net_kernels
from kernels.gpu import gated_delta_rule as rule_kernels
from kernels.gpu.gated_delta_rule import DeltaInputs

_RING_LEN = 8  # of both rings, enough for T = 4
_EPS = 1e-6


class DeltaPlace:
    """Where the requests of a setting stand, and what follows from it for the law. `most` tokens are folded at most."""

    def __init__(self, setting: Setting, most: int):
        self.rows, self.start_lens = setting.row_ids(), setting.start_lens()
        low = 0 if setting.is_ragged else most
        self.accept_lens = setting.integers(low, most + 1, setting.batch)
        ahead = torch.arange(setting.num_tokens, device=setting.device)
        self.write_slots = self.ring_slots(self.start_lens[:, None] + ahead)
        history = torch.arange(1 - setting.sizes.taps, 0, device=setting.device)
        self.conv_slots = self.ring_slots(self.start_lens[:, None] + history), self.write_slots
        age = torch.arange(most, device=setting.device)
        folded = self.ring_slots((self.start_lens - self.accept_lens)[:, None] + age)
        together = ((slice(1, setting.batch + 1), slice(0, setting.batch)),)
        is_accepted = age < self.accept_lens[:, None]
        self.fold = Fold(together, folded, is_accepted)
        self.accepted_slots = folded[is_accepted.flatten()]

    def ring_slots(self, positions: Tensor) -> Tensor:
        """Flat slots of positions [B, n]."""
        return (self.rows[:, None] * _RING_LEN + positions % _RING_LEN).flatten()

    @property
    def stand(self) -> Stand:
        """For the kernels."""
        return Stand(self.rows, self.start_lens, self.accept_lens)

    @property
    def verify_place(self) -> VerifyPlace:
        """For the law."""
        return VerifyPlace(*self.stand, self.conv_slots, self.fold, self.write_slots)


class DeltaMemory:
    """Caches of one layer with random contents."""

    def __init__(self, setting: Setting):
        sizes, num_rows = setting.sizes, setting.batch + 1

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return setting.normal(num_rows, *shape, dtype=torch.float32, scale=scale)

        self.state = normal(sizes.value_heads, sizes.key_dim, sizes.value_dim)
        k = normal(_RING_LEN, sizes.key_heads, sizes.key_dim, scale=sizes.key_dim**-0.5)
        u = normal(_RING_LEN, sizes.value_heads, sizes.value_dim)
        self.ring = DeltaRing(k, u, normal(_RING_LEN, sizes.value_heads).sigmoid())
        self.conv_ring = normal(_RING_LEN, sizes.channels)

    def copy(self, place: DeltaPlace) -> "DeltaMemory":
        """For the kernel: NaN in row 0 and wherever the ring's tokens were not accepted."""
        other = object.__new__(DeltaMemory)
        other.state, other.conv_ring = self.state.clone(), self.conv_ring.clone()
        other.ring = DeltaRing(*(torch.full_like(part, torch.nan) for part in self.ring))
        for mine, theirs in zip(self.ring, other.ring, strict=True):
            slots = place.accepted_slots
            theirs.flatten(0, 1)[slots] = mine.flatten(0, 1)[slots]
        other.state[0] = other.conv_ring[0] = torch.nan
        return other

    def results(self, place: DeltaPlace) -> list[Tensor]:
        """What a verify step leaves: states, and the tokens that it recorded."""
        return [self.state[1:], *(part.flatten(0, 1)[place.write_slots] for part in self.ring)]

    def net(self) -> DeltaNetMemory:
        """As the layer's functions take it."""
        return DeltaNetMemory(self.conv_ring, self.state, self.ring)


def shape_of(setting: Setting) -> DeltaNetShape:
    """Heads and dimensions of the setting's layer."""
    sizes = setting.sizes
    return DeltaNetShape(sizes.key_heads, sizes.value_heads, sizes.key_dim, sizes.value_dim)


def make_weights(setting: Setting) -> DeltaNetWeights:
    """Random ones; decays from almost 1 to almost 0 per token."""
    sizes = setting.sizes
    wide = torch.float32
    conv = setting.normal(sizes.channels, sizes.taps, dtype=wide, scale=0.5)
    a_log = setting.normal(sizes.value_heads, dtype=wide)
    dt_bias = setting.normal(sizes.value_heads, dtype=wide) - 1
    return DeltaNetWeights(conv, a_log, dt_bias, 1 + setting.normal(sizes.value_dim, dtype=wide, scale=0.2), _EPS)


def make_inputs(setting: Setting, num_tokens: int) -> tuple[DeltaInputs, DeltaNetWeights]:
    """Convolved tokens, and gates that are the last columns of a wider projection."""
    sizes, weights = setting.sizes, make_weights(setting)
    conv = setting.normal(num_tokens, sizes.channels, dtype=torch.float32)
    gates = setting.normal(num_tokens, sizes.delta_projection)[:, -2 * sizes.value_heads :]
    return DeltaInputs(conv, gates, weights.a_log, weights.dt_bias), weights


def split_inputs(inputs: DeltaInputs, setting: Setting, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, log_alpha, beta [B, T, ...] of the law."""
    q, k, v = split_heads(inputs.conv.unflatten(0, (batch, -1)), shape_of(setting))
    b, a = inputs.gates.unflatten(0, (batch, -1)).float().chunk(2, dim=-1)
    log_alpha = -inputs.a_log.exp() * torch.nn.functional.softplus(a + inputs.dt_bias)
    return q, k, v, log_alpha, b.sigmoid()


def delta_verify_cases(setting: Setting) -> Iterator[Case]:
    """Of a decode step: convolution, delta rule, and both with the gated norm."""
    for make in (_conv_verify, _rule_verify, _net_verify):
        yield make(setting, DeltaPlace(setting, setting.num_tokens), DeltaMemory(setting))


def delta_prefill_cases(setting: Setting) -> Iterator[Case]:
    """Of known tokens."""
    lens = setting.prompt_lens()
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], device=setting.device)
    for make in (_conv_prefill, _rule_prefill):
        yield make(setting, DeltaPlace(setting, 4 if setting.is_ragged else 0), DeltaMemory(setting), lens, starts)


def _conv_verify(setting: Setting, place: DeltaPlace, memory: DeltaMemory) -> Case:
    sizes, weight = setting.sizes, make_weights(setting).conv
    u = setting.normal(setting.rows, sizes.delta_projection)[:, : sizes.channels]
    ring = memory.conv_ring.clone()
    ring[0] = torch.nan

    def run() -> Tensor:
        return conv_kernels.causal_conv1d_verify(u, weight, ring, place.rows, place.start_lens)

    def read(out: Tensor) -> Sequence[Tensor]:
        return out, ring.flatten(0, 1)[place.write_slots]

    def law() -> Sequence[Tensor]:
        by_request = u.unflatten(0, (setting.batch, -1))
        out = causal_conv1d_cached(by_request, weight, memory.conv_ring, *place.conv_slots)
        return out.flatten(0, 1), memory.conv_ring.flatten(0, 1)[place.write_slots]

    counted = moved.causal_conv1d_verify(setting.batch, setting.num_tokens, sizes, setting.element)
    return Case("causal_conv1d_verify", setting, run, read, law, counted)


def _rule_verify(setting: Setting, place: DeltaPlace, memory: DeltaMemory) -> Case:
    inputs, _ = make_inputs(setting, setting.rows)
    shape, copy = shape_of(setting), memory.copy(place)

    def run() -> Tensor:
        return rule_kernels.gated_delta_rule_verify(inputs, shape, copy.state, copy.ring, *place.stand)

    def read(out: Tensor) -> Sequence[Tensor]:
        return out, *copy.results(place)

    def law() -> Sequence[Tensor]:
        split = split_inputs(inputs, setting, setting.batch)
        out = gated_delta_rule_verify(*split, memory.state, memory.ring, place.fold, place.write_slots)
        return out.flatten(0, 1), *memory.results(place)

    folded, written = place.accept_lens.sum().item(), (place.accept_lens > 0).sum().item()
    counted = moved.gated_delta_rule_verify(
        setting.batch, setting.num_tokens, setting.sizes, setting.element, folded, written
    )
    peers = delta_verify_peers(inputs, setting)
    return Case("gated_delta_rule_verify", setting, run, read, law, counted, peers)


def _net_verify(setting: Setting, place: DeltaPlace, memory: DeltaMemory) -> Case:
    sizes, weights, shape = setting.sizes, make_weights(setting), shape_of(setting)
    projected, copy = setting.normal(setting.rows, sizes.delta_projection), memory.copy(place)

    def run() -> Tensor:
        return net_kernels.gated_delta_net_verify(projected, shape, weights, copy.net(), place.stand)

    def read(out: Tensor) -> Sequence[Tensor]:
        return out, *copy.results(place)

    def law() -> Sequence[Tensor]:
        out = gated_delta_net_verify(projected, shape, weights, memory.net(), place.verify_place)
        return out, *memory.results(place)

    folded, written = place.accept_lens.sum().item(), (place.accept_lens > 0).sum().item()
    batch, num_tokens, element = setting.batch, setting.num_tokens, setting.element
    counted = moved.causal_conv1d_verify(batch, num_tokens, sizes, element)
    counted += moved.gated_delta_rule_verify(batch, num_tokens, sizes, element, folded, written)
    counted += moved.gated_rms_norm(setting.rows, sizes.value_heads, sizes.value_dim, element)
    return Case("gated_delta_net_verify", setting, run, read, law, counted)


def _conv_prefill(setting: Setting, place: DeltaPlace, memory: DeltaMemory, lens: list[int], starts: Tensor) -> Case:
    sizes, weight = setting.sizes, make_weights(setting).conv
    u = setting.normal(sum(lens), sizes.delta_projection)[:, : sizes.channels]
    ring = memory.conv_ring.clone()
    ring[0] = torch.nan

    def run() -> Tensor:
        where = (place.rows, place.start_lens, starts, max(lens))
        return conv_kernels.causal_conv1d_prefill(u, weight, ring, *where)

    def law() -> Sequence[Tensor]:
        outs = []
        for request, (tokens, start) in enumerate(zip(u.split(lens), place.start_lens.tolist(), strict=True)):
            positions = torch.arange(start - sizes.taps + 1, start + len(tokens), device=setting.device)
            slots = (request + 1) * _RING_LEN + positions % _RING_LEN
            kept = min(len(tokens), _RING_LEN)
            read, write = slots[: sizes.taps - 1], slots[len(slots) - kept :]
            outs.append(causal_conv1d_cached(tokens[None], weight, memory.conv_ring, read, write)[0])
        return torch.cat(outs), memory.conv_ring[1:]

    counted = moved.causal_conv1d_prefill(setting.batch, sum(lens), sizes, setting.element, _RING_LEN)
    return Case("causal_conv1d_prefill", setting, run, lambda out: [out, ring[1:]], law, counted)


def _rule_prefill(setting: Setting, place: DeltaPlace, memory: DeltaMemory, lens: list[int], starts: Tensor) -> Case:
    inputs, _ = make_inputs(setting, sum(lens))
    shape, copy = shape_of(setting), memory.copy(place)

    def run() -> Tensor:
        where = (*place.stand, starts, max(lens))
        return rule_kernels.gated_delta_rule_prefill(inputs, shape, copy.state, copy.ring, *where)

    def law() -> Sequence[Tensor]:
        outs, spans = [], pairwise(starts.tolist())
        stands = zip(place.start_lens.tolist(), place.accept_lens.tolist(), strict=True)
        for request, ((first, end), (start, count)) in enumerate(zip(spans, stands, strict=True)):
            part = inputs._replace(conv=inputs.conv[first:end], gates=inputs.gates[first:end])
            positions = torch.arange(start - count, start, device=setting.device)
            slots = (request + 1) * _RING_LEN + positions % _RING_LEN
            fold = Fold(((slice(request + 1, request + 2), slice(0, 1)),), slots, None)
            split = split_inputs(part, setting, 1)
            outs.append(gated_delta_rule_prefill(*split, memory.state, memory.ring, fold)[0])
        return torch.cat(outs), memory.state[1:]

    counted = moved.gated_delta_rule_prefill(setting.batch, sum(lens), setting.sizes, setting.element)
    peers = delta_prefill_peers(inputs, setting)
    return Case("gated_delta_rule_prefill", setting, run, lambda out: [out, copy.state[1:]], law, counted, peers)
