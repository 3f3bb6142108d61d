"""The verify step against the whole sequence in one go, and how the projection is split."""

import pytest
import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.gated_delta_net import (
    DeltaNetMemory,
    DeltaNetShape,
    DeltaNetWeights,
    VerifyPlace,
    convolve_heads,
    gated_delta_net_prefill,
    gated_delta_net_sequence,
    gated_delta_net_verify,
    split_heads,
    split_projected,
)
from kernels.gated_delta_rule import DeltaRing, Fold, gated_delta_rule
from kernels.rms_norm import gated_rms_norm

TAPS, EPS, ROW, RING_LEN, CONV_LEN = 4, 1e-6, 2, 8, 8
SHAPES = {"grouped": DeltaNetShape(2, 6, 16, 24), "odd": DeltaNetShape(3, 3, 7, 5)}


def channels(shape: DeltaNetShape) -> int:
    return 2 * shape.key_heads * shape.key_dim + shape.value_heads * shape.value_dim


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_inputs(shape: DeltaNetShape, count: int, seed: int) -> Tensor:
    return draw(count, channels(shape) + shape.value_heads * (shape.value_dim + 2), seed=seed)


def make_weights(shape: DeltaNetShape) -> DeltaNetWeights:
    sizes = ((channels(shape), TAPS), (shape.value_heads,), (shape.value_heads,), (shape.value_dim,))
    return DeltaNetWeights(*(draw(*size, seed=i) for i, size in enumerate(sizes)), EPS)


def make_memory(shape: DeltaNetShape) -> DeltaNetMemory:
    """An empty sequence on ROW; the other rows are not numbers."""

    def rows(*size: int) -> Tensor:
        tensor = torch.full((4, *size), torch.nan, dtype=torch.float64)
        tensor[ROW] = 0
        return tensor

    heads, key_heads, key_dim, value_dim = shape.value_heads, shape.key_heads, shape.key_dim, shape.value_dim
    ring = DeltaRing(rows(RING_LEN, key_heads, key_dim), rows(RING_LEN, heads, value_dim), rows(RING_LEN, heads))
    return DeltaNetMemory(rows(CONV_LEN, channels(shape)), rows(heads, key_dim, value_dim), ring)


def make_place(start: int, accepted: int, width: int) -> VerifyPlace:
    def slots(length: int, first: int, size: int) -> Tensor:
        return ROW * length + torch.arange(first, first + size) % length

    fold = Fold(((slice(ROW, ROW + 1), slice(0, 1)),), slots(RING_LEN, start - accepted, accepted), None)
    conv_slots = slots(CONV_LEN, start - TAPS + 1, TAPS - 1), slots(CONV_LEN, start, width)
    where = (torch.tensor([value]) for value in (ROW, start, accepted))
    return VerifyPlace(*where, conv_slots, fold, slots(RING_LEN, start, width))


def run_whole(inputs: Tensor, shape: DeltaNetShape, weights: DeltaNetWeights) -> Tensor:
    qkv, z, log_alpha, beta = split_projected(inputs[None], shape, weights)
    q, k, v = split_heads(causal_conv1d(qkv, weights.conv), shape)
    return gated_rms_norm(gated_delta_rule(q, k, v, log_alpha, beta), z, weights.norm, EPS).view(len(inputs), -1)


def to(dtype: torch.dtype, weights: DeltaNetWeights, memory: DeltaNetMemory) -> tuple[DeltaNetWeights, DeltaNetMemory]:
    ring = DeltaRing(*(part.to(dtype) for part in memory.ring))
    kept = DeltaNetMemory(memory.conv_ring.to(dtype), memory.state.to(dtype), ring)
    return DeltaNetWeights(*(weight.to(dtype) for weight in weights[:-1]), weights.eps), kept


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [(5, 1, 40, 4), (1, 2, 47), (50,)])
def test_a_prompt_in_chunks_gives_the_whole_sequence(name: str, dtype: torch.dtype, chunks: tuple[int, ...]) -> None:
    """bfloat16 is the projection's; all else is float32 then."""
    shape, wide = SHAPES[name], torch.promote_types(dtype, torch.float32)
    inputs = draw_inputs(shape, sum(chunks), seed=7).to(dtype)
    expected = run_whole(inputs.double(), shape, make_weights(shape))
    weights, memory = to(wide, make_weights(shape), make_memory(shape))
    outs, start = [], 0
    for count in chunks:
        place = make_place(start, 0, min(count, CONV_LEN))
        kept = ROW * CONV_LEN + torch.arange(start + max(0, count - CONV_LEN), start + count) % CONV_LEN
        part = inputs[None, start : start + count]
        outs.append(gated_delta_net_prefill(part, shape, weights, memory, (place.conv_slots[0], kept), place.fold))
        start += count
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(torch.cat(outs).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SHAPES)
def test_verify_steps_that_accept_some_of_their_rows_give_the_whole_sequence(name: str) -> None:
    shape = SHAPES[name]
    weights, memory, inputs = make_weights(shape), make_memory(shape), draw_inputs(shape, 12, seed=7)
    expected, start, accepted = run_whole(inputs, shape, weights), 0, 0
    for width, accept_len in ((1, 1), (4, 2), (4, 4), (3, 1), (1, 1), (4, 3)):
        window = torch.cat([inputs[start : start + accept_len], 9 * draw_inputs(shape, width - accept_len, seed=start)])
        out = gated_delta_net_verify(window, shape, weights, memory, make_place(start, accepted, width))
        torch.testing.assert_close(out[:accept_len], expected[start : start + accept_len])
        start, accepted = start + accept_len, accept_len
    assert start == len(inputs)


def test_the_projection_is_split_as_the_checkpoint_stacks_it() -> None:
    """Rows qkv, z, b, a; q and k normed per head, q scaled by DK^-1/2."""
    shape = SHAPES["grouped"]
    weights = make_weights(shape)
    size = channels(shape) + shape.value_heads * (shape.value_dim + 2)
    projected = torch.randn(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    qkv, z, log_alpha, beta = split_projected(projected, shape, weights)
    value_size = shape.value_heads * shape.value_dim
    assert torch.equal(z.flatten(2), projected[..., channels(shape) : channels(shape) + value_size])
    b, a = projected[..., -2 * shape.value_heads :].chunk(2, dim=-1)
    torch.testing.assert_close(beta, 1 / (1 + (-b).exp()))
    torch.testing.assert_close(log_alpha, -weights.a_log.exp() * (1 + (a + weights.dt_bias).exp()).log())
    q, k, v = split_heads(qkv, shape)
    key_size = shape.key_heads * shape.key_dim
    raw = qkv[..., :key_size].unflatten(-1, (shape.key_heads, shape.key_dim))
    torch.testing.assert_close(q.norm(dim=-1), torch.full_like(q[..., 0], shape.key_dim**-0.5), rtol=1e-4, atol=0)
    torch.testing.assert_close(k.norm(dim=-1), torch.ones_like(k[..., 0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(q / q.norm(dim=-1, keepdim=True), raw / raw.norm(dim=-1, keepdim=True))
    assert torch.equal(v.flatten(2), qkv[..., 2 * key_size :])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_sequences_are_made_of_the_operations_in_order(shape, dtype):
    projected, weights = draw_inputs(shape, 2 * 40, seed=9).view(2, 40, -1), make_weights(shape)
    qkv, z, log_alpha, beta = split_projected(projected, shape, weights)
    q, k, v = split_heads(causal_conv1d(qkv, weights.conv), shape)
    out = gated_delta_rule(q, k, v, log_alpha, beta)
    expected = gated_rms_norm(out, z, weights.norm, EPS).flatten(0, 1).flatten(1)
    narrow = DeltaNetWeights(*(part.to(dtype) for part in weights[:4]), EPS)
    found = gated_delta_net_sequence(projected.to(dtype), shape, narrow)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)
    heads = convolve_heads(qkv.to(dtype), narrow.conv, shape)
    torch.testing.assert_close([x.double() for x in heads], [q, k, v], rtol=0, atol=1e-5)
