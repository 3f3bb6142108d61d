"""The delta rule against its recurrence, token by token: chunked, folded from the ring, in any rows."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from kernels.cpu.library import load_library
from kernels.gated_delta_rule import (
    DeltaRing,
    Fold,
    fold_recorded,
    fold_recorded_torch,
    gated_delta_rule,
    gated_delta_rule_prefill,
    gated_delta_rule_verify,
)

HK, HV, DK, DV = 2, 6, 5, 7
NUM_ROWS, RING_LEN = 6, 8
STALE = 1e6


def draw_inputs(batch, length, seed=0, dtype=torch.float64):
    """q, k, v, log_alpha, beta as the layer makes them, decays from almost 1 to almost 0."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(batch, length, *shape, generator=source, dtype=torch.float64)

    q, k, v = normal(HK, DK), normal(HK, DK), normal(HV, DV)
    q, k = q / q.norm(dim=-1, keepdim=True) * DK**-0.5, k / k.norm(dim=-1, keepdim=True)
    log_alpha, beta = -(normal(HV) * 2).exp(), normal(HV).sigmoid()
    return [x.to(dtype) for x in (q, k, v, log_alpha, beta)]


def recurrence(q, k, v, log_alpha, beta, state):
    """One request, from the formulas: outputs [T, HV, DV] and the state [HV, DK, DV] after every token."""
    out, states, state = torch.full_like(v, torch.nan), [], state.clone()
    for t in range(len(q)):
        for head in range(HV):
            key, query = k[t, head // (HV // HK)], q[t, head // (HV // HK)]
            s = state[head] * log_alpha[t, head].exp()
            u = beta[t, head] * (v[t, head] - s.T @ key)
            state[head] = s + torch.outer(key, u)
            out[t, head] = state[head].T @ query
        states.append(state.clone())
    return out, states


def make_memory(dtype=torch.float64):
    """States and rings of NUM_ROWS rows: random states, stale rings, padding row 0 not a number."""
    source = torch.Generator().manual_seed(7)
    state = torch.randn(NUM_ROWS, HV, DK, DV, generator=source, dtype=dtype)
    ring = DeltaRing(
        torch.full((NUM_ROWS, RING_LEN, HK, DK), STALE, dtype=dtype),
        torch.full((NUM_ROWS, RING_LEN, HV, DV), STALE, dtype=dtype),
        torch.full((NUM_ROWS, RING_LEN, HV), STALE, dtype=dtype),
    )
    for tensor in (state, *ring):
        tensor[0] = torch.nan
    return state, ring


def make_fold(rows, start_lens, accept_lens, spare=0):
    """The newest accepted tokens of every row; `spare` more are named than any row accepted."""
    count = max(accept_lens) + spare
    first, count_rows = rows[0], len(rows)
    together = ((slice(first, first + count_rows), slice(0, count_rows)),)
    apart = tuple((slice(row, row + 1), slice(i, i + 1)) for i, row in enumerate(rows))
    slots = [
        row * RING_LEN + (start - accepted + age) % RING_LEN
        for row, start, accepted in zip(rows, start_lens, accept_lens, strict=True)
        for age in range(count)
    ]
    is_accepted = torch.tensor([[age < accepted for age in range(count)] for accepted in accept_lens])
    return Fold(
        groups=together if rows == list(range(first, first + count_rows)) else apart,
        slots=torch.tensor(slots, dtype=torch.long),
        is_accepted=None if is_accepted.all() else is_accepted,
    )


def slots_ahead(rows, start_lens, width):
    """Flat ring slots of the next `width` tokens of every row."""
    slots = [row * RING_LEN + (s + i) % RING_LEN for row, s in zip(rows, start_lens, strict=True) for i in range(width)]
    return torch.tensor(slots)


@pytest.mark.parametrize("length", [1, 2, 5, 63, 64, 65, 130])
def test_chunks_equal_the_recurrence_at_every_length(length):
    inputs = draw_inputs(2, length)
    out = gated_delta_rule(*inputs)
    for request in range(2):
        expected, _ = recurrence(*(x[request] for x in inputs), torch.zeros(HV, DK, DV, dtype=torch.float64))
        torch.testing.assert_close(out[request], expected, rtol=0, atol=1e-10)


def test_float32_stays_close_over_long_sequences():
    inputs = draw_inputs(1, 300, dtype=torch.float32)
    wide = gated_delta_rule(*(x.double() for x in inputs))
    torch.testing.assert_close(gated_delta_rule(*inputs).double(), wide, rtol=0, atol=1e-4)


def test_decays_that_underflow_give_finite_outputs():
    q, k, v, log_alpha, beta = draw_inputs(1, 70, dtype=torch.float32)
    out = gated_delta_rule(q, k, v, log_alpha * 1000, beta)
    assert out.isfinite().all()


@pytest.mark.parametrize("rows", [[1, 2, 3], [4, 1, 5], [2]])
@pytest.mark.parametrize("lengths", [(3, 9), (64, 1), (1, 70)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_prefill_continues_from_the_stored_state_and_stores_the_next(rows, lengths, dtype):
    """float32 is another implementation, where there is a compiler."""
    state, ring = make_memory(dtype)
    before = state.clone()
    inputs = draw_inputs(len(rows), sum(lengths), dtype=dtype)
    tolerance = 1e-10 if dtype is torch.float64 else 1e-5
    start, outs = 0, []
    for length in lengths:
        part = [x[:, start : start + length] for x in inputs]
        fold = make_fold(rows, [10 + start] * len(rows), [0] * len(rows))
        outs.append(gated_delta_rule_prefill(*part, state, ring, fold))
        start += length
    for request, row in enumerate(rows):
        expected, states = recurrence(*(x[request].double() for x in inputs), before[row].double())
        torch.testing.assert_close(torch.cat(outs, dim=1)[request].double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(state[row].double(), states[-1], rtol=0, atol=tolerance)
    others = [row for row in range(1, NUM_ROWS) if row not in rows]
    assert torch.equal(state[others], before[others])
    assert all(tensor[0].isnan().all() for tensor in (state, *ring))


@pytest.mark.parametrize("rows", [[1, 2, 3], [4, 1, 5], [3]])
@pytest.mark.parametrize("seed", [0, 1])
def test_folding_replays_exactly_the_accepted_tokens(rows, seed):
    """Rounds of up to four tokens with random acceptance, the rings wrapping many times, some steps through prefill."""
    rng = random.Random(seed)
    state, ring = make_memory()
    expected_state = {row: state[row].clone() for row in rows}
    start_lens, accept_lens = [rng.randrange(50) for _ in rows], [0] * len(rows)
    for step in range(40):
        is_verify = rng.random() < 0.8
        width = rng.choice([1, 2, 4, 4])
        inputs = draw_inputs(len(rows), width, seed=100 * seed + step)
        fold = make_fold(rows, start_lens, accept_lens, spare=rng.choice([0, 0, 1]))
        if is_verify:
            out = gated_delta_rule_verify(*inputs, state, ring, fold, slots_ahead(rows, start_lens, width))
        else:
            out = gated_delta_rule_prefill(*inputs, state, ring, fold)
        counts = [rng.randint(1, width) if is_verify else width for _ in rows]
        for request, row in enumerate(rows):
            if is_verify:
                torch.testing.assert_close(state[row], expected_state[row], rtol=0, atol=1e-9)
            expected, states = recurrence(*(x[request] for x in inputs), expected_state[row])
            torch.testing.assert_close(out[request], expected, rtol=0, atol=1e-9)
            expected_state[row] = states[counts[request] - 1]
        start_lens = [start + count for start, count in zip(start_lens, counts, strict=True)]
        accept_lens = counts if is_verify else [0] * len(rows)
    assert all(tensor[0].isnan().all() for tensor in (state, *ring))


def test_rows_of_one_step_may_fold_different_counts():
    """Fresh from prefill (0), one, and all tokens of the last step, side by side."""
    state, ring = make_memory()
    rows, starts = [5, 2, 3], [6, 7, 21]
    first, second = draw_inputs(3, 4, seed=1), draw_inputs(3, 4, seed=2)
    before = state.clone()
    nothing_to_fold = make_fold(rows, starts, [0, 0, 0])
    gated_delta_rule_verify(*first, state, ring, nothing_to_fold, slots_ahead(rows, starts, 4))
    assert torch.equal(state[1:], before[1:])
    counts = [1, 4, 0]
    starts = [start + count for start, count in zip(starts, counts, strict=True)]
    fold = make_fold(rows, starts, counts)
    gated_delta_rule_verify(*second, state, ring, fold, slots_ahead(rows, starts, 4))
    for request, (row, count) in enumerate(zip(rows, counts, strict=True)):
        _, states = recurrence(*(x[request] for x in first), before[row])
        expected = states[count - 1] if count else before[row]
        torch.testing.assert_close(state[row], expected, rtol=0, atol=1e-10)


def test_a_verify_step_writes_only_its_own_slots():
    state, ring = make_memory()
    fold = make_fold([2], [6], [0])
    gated_delta_rule_verify(*draw_inputs(1, 3), state, ring, fold, slots_ahead([2], [6], 3))
    written = [slot for slot in range(RING_LEN) if not (ring.k[2, slot] == STALE).all()]
    assert written == [0, 6, 7]
    assert all((part[[1, 3, 4, 5]] == STALE).all() for part in ring)


def record_of_layers(num_tokens, dtype=torch.float64):
    """Two layers' states before and after every one of the tokens, and what a verify step would have recorded."""
    q, k, v, log_alpha, beta = draw_inputs(2, num_tokens, seed=3)
    before = torch.randn(2, HV, DK, DV, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    after, u = [[], []], torch.zeros_like(v)
    for layer in range(2):
        _, after[layer] = recurrence(q[layer], k[layer], v[layer], log_alpha[layer], beta[layer], before[layer])
        states = [before[layer], *after[layer]]
        for t, head in itertools.product(range(num_tokens), range(HV)):
            seen = (states[t][head] * log_alpha[layer, t, head].exp()).T @ k[layer, t, head // (HV // HK)]
            u[layer, t, head] = beta[layer, t, head] * (v[layer, t, head] - seen)
    expected = [before, *(torch.stack(pair) for pair in zip(*after, strict=True))]
    return before.to(dtype), DeltaRing(k.to(dtype), u.to(dtype), log_alpha.exp().to(dtype)), expected


def fold_cpp(state: Tensor, recorded: DeltaRing, count: Tensor) -> Tensor:
    """By the library, between layers and rows of other requests, which it leaves alone."""
    if load_library() is None:
        pytest.skip("no compiler")
    rows, slots = (torch.full((len(state), 3, *state.shape[1:]), 7.0, dtype=state.dtype) for _ in range(2))
    rows[:, 1] = state
    fold_recorded(rows[:, 1], recorded, count, slots[:, 2])
    assert (slots[:, :2] == 7).all() and torch.equal(rows[:, 1], state)
    return slots[:, 2]


FOLDS = pytest.mark.parametrize("fold", [fold_recorded_torch, fold_cpp])


@FOLDS
@pytest.mark.parametrize("count", range(5))
def test_a_copy_is_folded_by_exactly_as_many_recorded_tokens_as_asked(count, fold):
    state, recorded, expected = record_of_layers(4)
    original = state.clone()
    out = fold(state, recorded, torch.tensor(count))
    torch.testing.assert_close(out, expected[count], rtol=0, atol=1e-12)
    assert torch.equal(state, original)
    if count:
        assert (out - expected[count - 1]).abs().max() > 1e-3


@FOLDS
@pytest.mark.parametrize("count", range(4))
def test_recorded_tokens_behind_the_count_never_reach_the_copy(count, fold):
    """Rejected drafts may have left anything, also what is not a number."""
    state, recorded, expected = record_of_layers(4)
    for part in recorded:
        part[:, count:] = torch.nan
    out = fold(state, recorded, torch.tensor(count))
    torch.testing.assert_close(out, expected[count], rtol=0, atol=1e-12)


@FOLDS
def test_a_folded_copy_keeps_the_width_of_the_state(fold):
    state, recorded, expected = record_of_layers(3, torch.float32)
    out = fold(state, recorded, torch.tensor(3))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected[3], rtol=0, atol=1e-4)


def test_gradients_flow_through_whole_sequences():
    inputs = [x.requires_grad_() for x in draw_inputs(1, 66)]
    gated_delta_rule(*inputs).square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0 for x in inputs)
