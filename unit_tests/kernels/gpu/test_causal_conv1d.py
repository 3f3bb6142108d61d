"""Triton's convolutions on the ring against the law, interpreted."""

import pytest
import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.gpu.causal_conv1d import causal_conv1d_prefill, causal_conv1d_verify

CHANNELS, TAPS, RING_LEN, NUM_ROWS = 300, 4, 8, 5


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def make_ring(row: int, history: Tensor, start: int) -> Tensor:
    """The inputs before `start` of one row; what else there is must not be read."""
    ring = torch.full((NUM_ROWS, RING_LEN, CHANNELS), torch.nan)
    for position in range(start - len(history), start):
        ring[row, position % RING_LEN] = history[position - start]
    return ring


@pytest.mark.parametrize("num_tokens", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 2, 9])
def test_a_verify_step_reads_the_history_and_records_its_tokens(num_tokens: int, start: int) -> None:
    weight, history = draw(CHANNELS, TAPS, seed=0), draw(TAPS - 1, CHANNELS, seed=1)
    wide = draw(num_tokens, CHANNELS + 7, seed=2)
    u, ring = wide[:, 3 : 3 + CHANNELS], make_ring(2, history, start)
    out = causal_conv1d_verify(u, weight, ring, torch.tensor([2]), torch.tensor([start]))
    torch.testing.assert_close(out, causal_conv1d(u[None], weight, history[None])[0])
    recorded = [(start + index) % RING_LEN for index in range(num_tokens)]
    assert torch.equal(ring[2, recorded], u)


def test_rejected_tokens_are_overwritten_and_never_seen_again() -> None:
    weight, u = draw(CHANNELS, TAPS, seed=0), draw(12, CHANNELS, seed=1)
    ring, rows = torch.zeros(NUM_ROWS, RING_LEN, CHANNELS), torch.tensor([3])
    expected, position = causal_conv1d(u[None], weight)[0], 0
    for num_accepted in (2, 1, 4, 1, 3, 1):
        tokens = u[position : position + 4].clone()
        tokens[num_accepted:] = torch.nan
        out = causal_conv1d_verify(tokens, weight, ring, rows, torch.tensor([position]))
        torch.testing.assert_close(out[:num_accepted], expected[position : position + num_accepted])
        position += num_accepted


def test_padding_rows_record_nothing_and_no_requests_are_no_launch() -> None:
    weight, ring = draw(CHANNELS, TAPS, seed=0), torch.zeros(NUM_ROWS, RING_LEN, CHANNELS)
    rows, start_lens = torch.tensor([0, 4, 0]), torch.tensor([0, 5, 0])
    out = causal_conv1d_verify(draw(6, CHANNELS, seed=1), weight, ring, rows, start_lens)
    assert out.isfinite().all()
    assert not ring[0].any()
    assert ring[4].any()
    nothing = torch.zeros(0, dtype=torch.int64)
    assert causal_conv1d_verify(torch.zeros(0, CHANNELS), weight, ring, nothing, nothing).shape == (0, CHANNELS)


@pytest.mark.parametrize("lengths", [[1], [3, 17, 5], [40, 2]])
def test_ragged_known_tokens_continue_each_request(lengths: list[int]) -> None:
    weight, u = draw(CHANNELS, TAPS, seed=0), draw(sum(lengths), CHANNELS + 1, seed=1)[:, 1:]
    rows, start_lens = [4, 1, 2][: len(lengths)], [0, 6, 11][: len(lengths)]
    ring, histories = torch.zeros(NUM_ROWS, RING_LEN, CHANNELS), []
    for row, start in zip(rows, start_lens, strict=True):
        histories.append(draw(TAPS - 1, CHANNELS, seed=row) if start else torch.zeros(TAPS - 1, CHANNELS))
        ring[row] = make_ring(row, histories[-1], start)[row]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    out = causal_conv1d_prefill(u, weight, ring, torch.tensor(rows), torch.tensor(start_lens), starts, max(lengths))
    for index, (row, start, length) in enumerate(zip(rows, start_lens, lengths, strict=True)):
        tokens = u[starts[index] : starts[index + 1]]
        expected = causal_conv1d(tokens[None], weight, histories[index][None])[0]
        torch.testing.assert_close(out[starts[index] : starts[index + 1]], expected)
        for position in range(start + max(0, length - RING_LEN), start + length):
            assert torch.equal(ring[row, position % RING_LEN], tokens[position - start])


def test_a_prefill_longer_than_a_short_ring_still_reads_its_history() -> None:
    weight, history, u = draw(CHANNELS, TAPS, seed=0), draw(3, CHANNELS, seed=1), draw(20, CHANNELS, seed=2)
    ring = torch.zeros(NUM_ROWS, 4, CHANNELS)
    ring[1, [1, 2, 3]] = history  # positions 5, 6, 7
    starts = torch.tensor([0, 20])
    out = causal_conv1d_prefill(u, weight, ring, torch.tensor([1]), torch.tensor([8]), starts, 20)
    torch.testing.assert_close(out, causal_conv1d(u[None], weight, history[None])[0])
    assert torch.equal(ring[1, [0, 1, 2, 3]], u[-4:])  # positions 24..27
