"""The C++ step against the torch law, through whole histories of both caches."""

import pytest
import torch
from torch import Tensor

from kernels.cpu.library import load_library
from kernels.gated_delta_net import (
    DeltaNetMemory,
    DeltaNetShape,
    DeltaNetWeights,
    VerifyPlace,
    gated_delta_net_verify,
    gated_delta_net_verify_torch,
    split_heads,
    split_projected,
)
from kernels.gated_delta_rule import DeltaRing, Fold

TAPS, NUM_ROWS, EPS = 4, 7, 1e-6
SHAPES = {
    "grouped": DeltaNetShape(2, 6, 16, 24),
    "odd": DeltaNetShape(3, 3, 7, 5),
    "wide": DeltaNetShape(1, 4, 128, 128),
}
needs_compiler = pytest.mark.skipif(load_library() is None, reason="this machine has no C++ compiler")


def channels(shape: DeltaNetShape) -> int:
    return 2 * shape.key_heads * shape.key_dim + shape.value_heads * shape.value_dim


def make_weights(shape: DeltaNetShape, dtype: torch.dtype) -> DeltaNetWeights:
    source = torch.Generator().manual_seed(1)
    sizes = ((channels(shape), TAPS), (shape.value_heads,), (shape.value_heads,), (shape.value_dim,))
    return DeltaNetWeights(*(torch.randn(size, generator=source, dtype=torch.float64).to(dtype) for size in sizes), EPS)


def make_memory(shape: DeltaNetShape, num_tokens: int, dtype: torch.dtype) -> DeltaNetMemory:
    """Random states; row 0 is not a number, and neither may be touched nor read."""
    ring_len = 1 << (2 * num_tokens - 1).bit_length()
    conv_len = 1 << (num_tokens + TAPS - 2).bit_length()
    source = torch.Generator().manual_seed(2)

    def draw(*size: int) -> Tensor:
        tensor = torch.randn(NUM_ROWS, *size, generator=source, dtype=torch.float64).to(dtype)
        tensor[0] = torch.nan
        return tensor

    heads, key_heads, key_dim, value_dim = shape.value_heads, shape.key_heads, shape.key_dim, shape.value_dim
    ring = DeltaRing(draw(ring_len, key_heads, key_dim), draw(ring_len, heads, value_dim), draw(ring_len, heads))
    return DeltaNetMemory(draw(conv_len, channels(shape)), draw(heads, key_dim, value_dim), ring)


def make_place(
    memory: DeltaNetMemory, rows: list[int], starts: list[int], accepts: list[int], width: int
) -> VerifyPlace:
    conv_len, ring_len, count = memory.conv_ring.shape[1], memory.ring.k.shape[1], max(accepts)

    def slots(length: int, first: list[int], size: int) -> Tensor:
        each = [row * length + (f + i) % length for row, f in zip(rows, first, strict=True) for i in range(size)]
        return torch.tensor(each, dtype=torch.int64)

    folded = [start - accept for start, accept in zip(starts, accepts, strict=True)]
    fold = Fold(
        groups=tuple((slice(row, row + 1), slice(i, i + 1)) for i, row in enumerate(rows)),
        slots=slots(ring_len, folded, count),
        is_accepted=torch.tensor([[age < accept for age in range(count)] for accept in accepts]).view(len(rows), count),
    )
    history = [start - TAPS + 1 for start in starts]
    conv_slots = (slots(conv_len, history, TAPS - 1), slots(conv_len, starts, width))
    where = (torch.tensor(values) for values in (rows, starts, accepts))
    return VerifyPlace(*where, conv_slots, fold, slots(ring_len, starts, width))


@needs_compiler
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_cpp_step_equals_the_torch_law_over_a_history(name: str, num_tokens: int, dtype: torch.dtype) -> None:
    shape, wide = SHAPES[name], torch.promote_types(dtype, torch.float32)
    weights = make_weights(shape, wide)
    memories = [make_memory(shape, num_tokens, wide) for _ in range(2)]
    rows, starts, accepts = [5, 2, 3], [9, 30, 17], [0, 0, 0]
    source = torch.Generator().manual_seed(3)
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 5e-2}[dtype]
    for step in range(6):
        # A step without drafts follows steps with them: one token, several to fold.
        width = 1 if step == 4 else num_tokens
        inputs = torch.randn(
            len(rows) * width, channels(shape) + shape.value_heads * (shape.value_dim + 2), generator=source
        ).to(dtype)
        place = make_place(memories[0], rows, starts, accepts, width)
        expected = gated_delta_net_verify_torch(inputs, shape, weights, memories[0], place)
        out = gated_delta_net_verify(inputs, shape, weights, memories[1], place)
        assert out.dtype == dtype and out.isfinite().all()
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        accepts = torch.randint(1, width + 1, (len(rows),), generator=source).tolist()
        starts = [start + accept for start, accept in zip(starts, accepts, strict=True)]
    for mine, law in zip(flatten(memories[1]), flatten(memories[0]), strict=True):
        torch.testing.assert_close(mine, law, rtol=tolerance, atol=tolerance, equal_nan=True)


def flatten(memory: DeltaNetMemory) -> tuple[Tensor, ...]:
    return memory.conv_ring, memory.state, *memory.ring


@needs_compiler
def test_the_result_does_not_depend_on_company_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: a row alone on one thread gives what it gives among others on two."""
    shape = SHAPES["wide"]
    weights = make_weights(shape, torch.float32)
    inputs = torch.randn(3 * 4, channels(shape) + shape.value_heads * (shape.value_dim + 2))
    rows, starts, accepts = [1, 4, 6], [20, 31, 12], [2, 0, 4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    memory = make_memory(shape, 4, torch.float32)
    together = gated_delta_net_verify(inputs, shape, weights, memory, make_place(memory, rows, starts, accepts, 4))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for i in range(3):
        memory = make_memory(shape, 4, torch.float32)
        place = make_place(memory, rows[i : i + 1], starts[i : i + 1], accepts[i : i + 1], 4)
        alone = gated_delta_net_verify(inputs[4 * i : 4 * i + 4], shape, weights, memory, place)
        assert torch.equal(alone, together[4 * i : 4 * i + 4])


@needs_compiler
def test_a_step_touches_only_its_own_rows_and_slots() -> None:
    shape = SHAPES["grouped"]
    weights, memory, before = make_weights(shape, torch.float64), *(make_memory(shape, 2, torch.float64) for _ in "ab")
    inputs = torch.randn(2 * 2, channels(shape) + shape.value_heads * (shape.value_dim + 2), dtype=torch.float64)
    gated_delta_net_verify(inputs, shape, weights, memory, make_place(memory, [2, 5], [8, 9], [0, 1], 2))
    changed = [(after != old) & ~old.isnan() for after, old in zip(flatten(memory), flatten(before), strict=True)]
    conv, state, ring_k, ring_u, ring_alpha = changed
    assert state.flatten(1).any(1).nonzero().flatten().tolist() == [5], "row 2 had nothing to fold"
    for ring in (ring_k.flatten(2), ring_u.flatten(2), ring_alpha.flatten(2)):
        assert ring.any(2).nonzero().tolist() == [[2, 0], [2, 1], [5, 1], [5, 2]]
    length = conv.shape[1]
    assert conv.any(2).nonzero().tolist() == sorted([2, p % length] for p in (8, 9)) + sorted(
        [5, p % length] for p in (9, 10)
    )


def test_without_a_library_the_law_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.gated_delta_net.load_library", lambda: None)
    shape = SHAPES["odd"]
    weights, memory, other = make_weights(shape, torch.float64), *(make_memory(shape, 1, torch.float64) for _ in "ab")
    inputs = torch.randn(1, channels(shape) + shape.value_heads * (shape.value_dim + 2), dtype=torch.float64)
    place = make_place(memory, [3], [5], [1], 1)
    law = gated_delta_net_verify_torch(inputs, shape, weights, other, place)
    assert torch.equal(gated_delta_net_verify(inputs, shape, weights, memory, place), law)


def test_the_projection_is_split_as_the_checkpoint_stacks_it() -> None:
    """Rows qkv, z, b, a; q and k normed per head, q scaled by DK^-1/2."""
    shape = SHAPES["grouped"]
    weights = make_weights(shape, torch.float64)
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
