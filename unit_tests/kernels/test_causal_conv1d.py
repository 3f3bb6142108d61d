"""The causal convolution against its sum, plain and on the ring."""

import random

import pytest
import torch

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_cached, read_history, record_inputs

C, W, NUM_ROWS, RING_LEN = 5, 4, 6, 8


def naive(u, weight):
    """One request [T, C] from its first token, tap by tap."""
    out = torch.full_like(u, torch.nan)
    for t in range(len(u)):
        total = torch.zeros(C, dtype=u.dtype)
        for tap in range(W):
            if t - W + 1 + tap >= 0:
                total += weight[:, tap] * u[t - W + 1 + tap]
        out[t] = total / (1 + (-total).exp())
    return out


def slots(rows, start_lens, first, last):
    """Flat ring slots of positions start + first .. start + last - 1 of every row."""
    flat = [
        row * RING_LEN + (s + i) % RING_LEN for row, s in zip(rows, start_lens, strict=True) for i in range(first, last)
    ]
    return torch.tensor(flat)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = draw(C, W, seed=5)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 30])
def test_it_equals_the_sum_at_every_length(length):
    u = draw(2, length, C)
    expected = torch.stack([naive(request, WEIGHT) for request in u])
    torch.testing.assert_close(causal_conv1d(u, WEIGHT), expected)


def test_history_continues_a_sequence():
    u = draw(1, 20, C)
    tail = causal_conv1d(u[:, 9:], WEIGHT, history=u[:, 6:9])
    torch.testing.assert_close(tail[0], naive(u[0], WEIGHT)[9:])


@pytest.mark.parametrize("rows", [[1, 2, 3], [4, 1, 5], [2]])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_ring_survives_rejected_tokens_and_long_chunks(rows, seed):
    """Chunks shorter and longer than the ring, and rounds of four tokens of which some count."""
    rng = random.Random(seed)
    ring = torch.zeros(NUM_ROWS, RING_LEN, C, dtype=torch.float64)
    ring[0] = torch.nan
    truth = draw(len(rows), 120, C, seed=seed)
    expected = torch.stack([naive(request, WEIGHT) for request in truth])
    start_lens = [0] * len(rows)
    while max(start_lens) < 100:
        is_verify, width = rng.random() < 0.7, rng.choice([1, 3, 4])
        width = width if is_verify else rng.choice([1, 2, 7, 8, 9, 13])
        counts = [rng.randint(1, width) if is_verify else width for _ in rows]
        u = torch.stack([truth[i, s : s + width] for i, s in enumerate(start_lens)]).clone()
        for request, count in enumerate(counts):
            u[request, count:] = 1e6
        write_slots = slots(rows, start_lens, max(0, width - RING_LEN), width)
        out = causal_conv1d_cached(u, WEIGHT, ring, slots(rows, start_lens, 1 - W, 0), write_slots)
        for request, (start, count) in enumerate(zip(start_lens, counts, strict=True)):
            torch.testing.assert_close(out[request, :count], expected[request, start : start + count])
        start_lens = [start + count for start, count in zip(start_lens, counts, strict=True)]
    assert ring[0].isnan().all()
    others = [row for row in range(1, NUM_ROWS) if row not in rows]
    assert (ring[others] == 0).all()


def test_the_ring_holds_the_raw_inputs_of_the_last_positions():
    ring = torch.full((NUM_ROWS, RING_LEN, C), torch.nan, dtype=torch.float64)
    ring[2] = 0
    u = draw(1, 11, C)
    causal_conv1d_cached(u, WEIGHT, ring, slots([2], [0], 1 - W, 0), slots([2], [0], 11 - RING_LEN, 11))
    for position in range(3, 11):
        assert torch.equal(ring[2, position % RING_LEN], u[0, position])
    assert ring[[0, 1, 3, 4, 5]].isnan().all()


def test_what_is_recorded_is_read_as_the_history_of_the_next_tokens():
    """Of two requests, in float32 whatever the inputs are."""
    ring = torch.full((NUM_ROWS, RING_LEN, C), torch.nan)
    rows, starts, u = [4, 2], [3, 9], draw(2, 5, C).bfloat16()
    record_inputs(u, ring, slots(rows, starts, 0, 5))
    history = read_history(ring, slots(rows, [start + 5 for start in starts], 1 - W, 0), 2)
    assert torch.equal(history, u[:, -3:].float())
    assert ring[[0, 1, 3, 5]].isnan().all()
    ring.zero_()
    assert history.isfinite().all() and (history != 0).any()


def test_gradients_flow_through_whole_sequences():
    u, weight = draw(2, 9, C).requires_grad_(), WEIGHT.clone().requires_grad_()
    causal_conv1d(u, weight).sum().backward()
    assert u.grad.abs().max() > 0
    assert weight.grad.abs().max() > 0
