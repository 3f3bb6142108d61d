"""Triton's accepting and committing against the law, interpreted."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.gpu.speculative import CommitTable, accept_and_commit
from kernels.speculative import accept_torch

VOCAB_SIZE = 4


@dataclass(frozen=True)
class Step:
    """A verify step of B requests of T rows over a table of R rows."""

    token_ids: Tensor
    window: Tensor
    widths: Tensor
    rows: Tensor
    table: CommitTable


def make_step(num_requests: int, width: int, seed: int) -> Step:
    """Few tokens, so that drafts match, stop ids come early and tokens repeat; every third request is padding."""
    source = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=source)

    num_rows = num_requests + 3
    counts = integers(0, 50, num_rows, 5)  # seq_len, accept_len, longest_len and whether there are rules are columns
    counts[:, 2] = counts[:, 0] + integers(-1, width + 3, num_rows)
    rows = 1 + torch.randperm(num_rows - 1, generator=source)[:num_requests]
    rows[::3] = 0
    token_ids = integers(0, 2, num_requests * width)
    window = integers(0, 2, num_requests, width)
    copied = integers(0, 4, num_requests, 1) > 0  # most drafts are right
    window[:, 1:] = torch.where(copied, token_ids.view(num_requests, width)[:, :-1], window[:, 1:])
    table = CommitTable(
        counts[:, 0],
        counts[:, 1],
        counts[:, 2],
        next_ids=integers(100, 200, num_rows, width + 2),
        stop_ids=torch.where(integers(0, 4, num_rows, 3) > 0, -1, integers(0, 2, num_rows, 3)),
        output_counts=integers(0, 9, num_rows, VOCAB_SIZE).int(),
        has_rules=(counts[:, 4] % 2).bool(),
    )
    return Step(token_ids, window.flatten(), integers(1, width + 1, num_requests), rows, table)


def accept_by_law(step: Step) -> tuple[Tensor, Tensor]:
    """match_lens, accept_lens [B]: the law takes no padding between the requests' rows."""
    num_requests, table = len(step.rows), step.table
    widths = step.widths.tolist()
    ids, windows = (x.view(num_requests, -1) for x in (step.token_ids, step.window))
    packed = (torch.cat([row[:width] for row, width in zip(x, widths, strict=True)]) for x in (ids, windows))
    room = table.longest_len[step.rows] - table.seq_len[step.rows] - 1
    accepted = accept_torch(*packed, widths, table.stop_ids[step.rows], room)
    return accepted.match_lens, accepted.accept_lens


def commit_by_law(step: Step, accept_lens: Tensor) -> CommitTable:
    table = CommitTable(*(column.clone() for column in step.table))
    ids = step.token_ids.view(len(step.rows), -1)
    for tokens, row, length in zip(ids.tolist(), step.rows.tolist(), accept_lens.tolist(), strict=True):
        if row == 0:
            continue
        table.seq_len[row] += length
        table.accept_len[row] = length
        table.next_ids[row, 0] = tokens[length - 1]
        for token in tokens[:length] if table.has_rules[row] else []:
            table.output_counts[row, token] += 1
    return table


@pytest.mark.parametrize("width", [1, 2, 4, 5])
@pytest.mark.parametrize("seed", range(3))
def test_requests_are_accepted_and_committed_as_the_law_says(width: int, seed: int) -> None:
    """Ragged widths, stop ids, no room, repeated tokens, padding: and row 0 stays as it was."""
    step = make_step(23, width, seed)
    expected_lens = accept_by_law(step)
    expected = commit_by_law(step, expected_lens[1])
    lens = accept_and_commit(step.token_ids, step.window, step.widths, step.rows, step.table)
    for found, law in zip(lens, expected_lens, strict=True):
        assert found.dtype == torch.int64 and found.tolist() == law.tolist()
    for name, found, law in zip(CommitTable._fields, step.table, expected, strict=True):
        assert torch.equal(found, law), name


def test_a_token_that_is_emitted_twice_counts_twice() -> None:
    one, counts = torch.tensor([1, 1]), torch.zeros(2, 9, dtype=torch.int32)
    next_ids, stop_ids = torch.zeros(2, 4, dtype=torch.int64), torch.full((2, 1), -1)
    table = CommitTable(one.clone(), one.clone(), one + 50, next_ids, stop_ids, counts, has_rules=one)
    token_ids, window = torch.tensor([7, 7, 3, 7]), torch.tensor([2, 7, 7, 3])
    match_lens, accept_lens = accept_and_commit(token_ids, window, torch.tensor([4]), torch.tensor([1]), table)
    assert (match_lens.tolist(), accept_lens.tolist()) == ([4], [4])
    assert counts[1].tolist() == [0, 0, 0, 1, 0, 0, 0, 3, 0]
    assert next_ids.tolist() == [[0, 0, 0, 0], [7, 0, 0, 0]]


def test_no_requests_are_no_launch() -> None:
    step = make_step(0, 3, 0)
    match_lens, accept_lens = accept_and_commit(step.token_ids, step.window, step.widths, step.rows, step.table)
    assert match_lens.shape == accept_lens.shape == (0,)
