"""Triton's delta rule against the law, interpreted: random accept lengths, every T alike, ragged prefills."""

import pytest
import torch
from torch import Tensor

from kernels.gated_delta_net import DeltaNetShape
from kernels.gated_delta_rule import DeltaRing, gated_delta_rule
from kernels.gpu.gated_delta_rule import DeltaInputs, fold_states, gated_delta_rule_prefill, gated_delta_rule_verify
from kernels.rms_norm import l2_norm

SHAPE = DeltaNetShape(2, 6, 12, 20)
NUM_ROWS, RING_LEN, ROW = 4, 8, 2


def draw_inputs(count: int, seed: int = 0) -> DeltaInputs:
    source = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=source)

    channels = 2 * SHAPE.key_heads * SHAPE.key_dim + SHAPE.value_heads * SHAPE.value_dim
    gates = normal(count, 2 * SHAPE.value_heads + 5)[:, 5:]  # strided, as they come out of the projection
    return DeltaInputs(normal(count, channels), gates, normal(SHAPE.value_heads), normal(SHAPE.value_heads))


def pick(inputs: DeltaInputs, where: slice) -> DeltaInputs:
    return inputs._replace(conv=inputs.conv[where], gates=inputs.gates[where])


def run_law(inputs: DeltaInputs) -> Tensor:
    """All tokens in one go, from a zero state: [N, HV, DV]."""
    key_size = SHAPE.key_heads * SHAPE.key_dim
    q, k, v = inputs.conv.split([key_size, key_size, SHAPE.value_heads * SHAPE.value_dim], dim=1)
    q, k = (l2_norm(x.reshape(1, -1, SHAPE.key_heads, SHAPE.key_dim)) for x in (q, k))
    b, a = inputs.gates.chunk(2, dim=1)
    log_alpha = -inputs.a_log.exp() * torch.nn.functional.softplus(a + inputs.dt_bias)
    v = v.reshape(1, -1, SHAPE.value_heads, SHAPE.value_dim)
    return gated_delta_rule(q * SHAPE.key_dim**-0.5, k, v, log_alpha[None], b.sigmoid()[None])[0]


def make_memory() -> tuple[Tensor, DeltaRing]:
    """ROW is an empty sequence; whatever else is read shows."""

    def poisoned(*size: int) -> Tensor:
        return torch.full((NUM_ROWS, *size), torch.nan)

    key_heads, heads, key_dim, value_dim = SHAPE
    state = poisoned(heads, key_dim, value_dim)
    state[ROW] = 0
    ring = DeltaRing(
        poisoned(RING_LEN, key_heads, key_dim), poisoned(RING_LEN, heads, value_dim), poisoned(RING_LEN, heads)
    )
    return state, ring


def verify(inputs: DeltaInputs, memory: tuple[Tensor, DeltaRing], start: int, accepted: int) -> Tensor:
    where = (torch.tensor([value]) for value in (ROW, start, accepted))
    return gated_delta_rule_verify(inputs, SHAPE, *memory, *where)


def prefill(inputs: DeltaInputs, memory: tuple[Tensor, DeltaRing], start: int, accepted: int) -> Tensor:
    where = (torch.tensor([value]) for value in (ROW, start, accepted))
    return gated_delta_rule_prefill(
        inputs, SHAPE, *memory, *where, torch.tensor([0, len(inputs.conv)]), len(inputs.conv)
    )


def test_verify_steps_with_any_accept_lengths_give_the_law_and_the_bits_of_plain_decoding() -> None:
    inputs = draw_inputs(10)
    plain_memory, accepted, plain = make_memory(), 0, []
    for position in range(10):
        plain.append(verify(pick(inputs, slice(position, position + 1)), plain_memory, position, accepted))
        accepted = 1
    torch.testing.assert_close(torch.cat(plain), run_law(inputs), rtol=1e-4, atol=1e-5)
    for widths in ([4, 4, 4, 4], [3, 2, 4, 1, 4]):
        memory, position, accepted = make_memory(), 0, 0
        for step, width in enumerate(widths):
            window = pick(inputs, slice(position, position + width))
            out = verify(window, memory, position, accepted)
            accepted = [2, 1, 3, 1, 1][step]
            assert torch.equal(out, torch.cat(plain)[position : position + len(out)]), "rejected rows were right, too"
            position += accepted


def test_padding_rows_give_zero_and_stay_as_they_are() -> None:
    inputs, (state, ring) = draw_inputs(6, seed=2), make_memory()
    state[ROW + 1] = 0
    rows, zeros = torch.tensor([0, ROW, ROW + 1]), torch.tensor([0, 0, 0])
    out = gated_delta_rule_verify(inputs, SHAPE, state, ring, rows, zeros, zeros)
    assert not out[:2].any()
    assert state[0].isnan().all()
    assert ring.k[0].isnan().all()
    alone = make_memory()
    assert torch.equal(out[2:4], verify(pick(inputs, slice(2, 4)), alone, 0, 0))
    empty = torch.zeros(0, dtype=torch.int64)
    nothing = gated_delta_rule_verify(pick(inputs, slice(0, 0)), SHAPE, state, ring, empty, empty, empty)
    assert nothing.shape == (0, SHAPE.value_heads, SHAPE.value_dim)


@pytest.mark.parametrize("lengths", [[1, 2], [31, 33], [32, 1, 40]])
def test_chunks_of_known_tokens_equal_the_law(lengths: list[int]) -> None:
    inputs, memory, start, outs = draw_inputs(sum(lengths), seed=3), make_memory(), 0, []
    for length in lengths:
        outs.append(prefill(pick(inputs, slice(start, start + length)), memory, start, 0))
        start += length
    torch.testing.assert_close(torch.cat(outs), run_law(inputs), rtol=1e-4, atol=1e-5)


def test_a_prefill_folds_what_a_verify_step_left_and_ragged_requests_stay_apart() -> None:
    inputs, memory = draw_inputs(9, seed=4), make_memory()
    expected = run_law(inputs)
    verify(pick(inputs, slice(0, 4)), memory, 0, 0)
    torch.testing.assert_close(prefill(pick(inputs, slice(3, 8)), memory, 3, 3), expected[3:8], rtol=1e-4, atol=1e-5)
    out = verify(pick(inputs, slice(8, 9)), memory, 8, 0)
    torch.testing.assert_close(out, expected[8:], rtol=1e-4, atol=1e-5)
    (state, ring), zeros = make_memory(), torch.zeros(2, dtype=torch.int64)
    state[1] = 0
    starts, rows = torch.tensor([0, 2, 9]), torch.tensor([1, ROW])
    out = gated_delta_rule_prefill(inputs, SHAPE, state, ring, rows, zeros, zeros, starts, 7)
    for part in (slice(0, 2), slice(2, 9)):
        torch.testing.assert_close(out[part], run_law(pick(inputs, part)), rtol=1e-4, atol=1e-5)


def test_a_fold_alone_gives_the_bits_of_a_verify_step_and_touches_no_other_row() -> None:
    inputs, memory, other = draw_inputs(7, seed=6), make_memory(), make_memory()
    for state, ring in (memory, other):
        state[1] = 0
        verify(pick(inputs, slice(0, 4)), (state, ring), 0, 0)
    verify(pick(inputs, slice(3, 4)), memory, 3, 3)
    rows, starts, accepted = torch.tensor([1, ROW]), torch.tensor([0, 3]), torch.tensor([0, 3])
    fold_states(SHAPE, *other, rows, starts, accepted)
    assert torch.equal(memory[0][ROW], other[0][ROW]) and other[0][ROW].any()
    assert not other[0][1].any() and other[0][0].isnan().all()


def test_equal_keys_without_decay_stay_exact() -> None:
    """The triangular system at its worst: an inverse by powers would lose all digits."""
    inputs = draw_inputs(32, seed=5)
    inputs.conv[:] = inputs.conv[:1]
    inputs = inputs._replace(gates=torch.full_like(inputs.gates, 4.0), a_log=torch.full_like(inputs.a_log, -12.0))
    torch.testing.assert_close(prefill(inputs, make_memory(), 0, 0), run_law(inputs), rtol=1e-3, atol=1e-4)
