"""Counting accepted drafts and cutting where a request ends, and shifting ids by one."""

import itertools
import random
from collections.abc import Callable

import pytest
import torch

from kernels.speculative import Accepted, accept, accept_torch, roll_next_ids

NO_STOPS = torch.full((1, 2), -1)
Accept = Callable[..., Accepted]
both = pytest.mark.parametrize("accept_op", [accept, accept_torch])


def naive_lens(targets: list[int], drafts: list[int], stop_ids: list[int], room: int) -> tuple[int, int]:
    """(tokens that match, tokens that are emitted) of one request."""
    matched = 1
    for draft, target in zip(drafts, targets, strict=False):
        if draft != target:
            break
        matched += 1
    emitted = 0
    for token in targets[: min(matched, max(1, room))]:
        emitted += 1
        if token in stop_ids:
            break
    return matched, emitted


@both
def test_drafts_count_up_to_the_first_mistake_and_one_token_is_always_emitted(accept_op: Accept) -> None:
    for drafts in itertools.product([0, 1], repeat=3):
        for targets in itertools.product([0, 1], repeat=4):
            expected = naive_lens(list(targets), list(drafts), [], 9)
            window = torch.tensor([5, *drafts])
            found = accept_op(torch.tensor(targets), window, (4,), NO_STOPS, torch.tensor([9]))
            assert found.token_ids.tolist() == [list(targets)]
            assert (found.match_lens.item(), found.accept_lens.item()) == expected


@both
@pytest.mark.parametrize("seed", range(20))
def test_requests_of_any_widths_are_cut_where_each_of_them_ends(accept_op: Accept, seed: int) -> None:
    rng = random.Random(seed)
    widths = [rng.randint(1, 5) for _ in range(rng.randint(1, 6))]
    targets = [[rng.randrange(3) for _ in range(width)] for width in widths]
    windows = [[rng.randrange(3) for _ in range(width)] for width in widths]
    stop_ids = [[rng.choice([-1, 0, 1, 2]), -1] for _ in widths]
    room = [rng.randint(-1, 6) for _ in widths]
    flat = (torch.tensor([token for row in rows for token in row]) for rows in (targets, windows))
    found = accept_op(*flat, widths, torch.tensor(stop_ids), torch.tensor(room))
    for index, width in enumerate(widths):
        expected = naive_lens(targets[index], windows[index][1:], stop_ids[index], room[index])
        assert (found.match_lens[index].item(), found.accept_lens[index].item()) == expected
        assert found.token_ids[index, :width].tolist() == targets[index]


def test_columns_of_a_larger_table_are_read_rightly() -> None:
    """What the caller hands over may be strided."""
    ids, windows = torch.tensor([[1, 9], [2, 9], [3, 9]]), torch.tensor([[7, 0], [1, 0], [2, 0]])
    found = accept(ids[:, 0], windows[:, 0], (3,), torch.tensor([[2, 5], [0, 0]]).T[:1], torch.tensor([9]))
    assert found.match_lens.tolist() == [3] and found.accept_lens.tolist() == [2]


def test_rolled_ids_end_each_request_with_its_newest_token() -> None:
    token_ids = torch.tensor([10, 11, 12, 20, 30, 31])
    rolled = roll_next_ids(token_ids, torch.tensor([2, 3, 5]), torch.tensor([13, 21, 32]))
    assert rolled.tolist() == [11, 12, 13, 21, 31, 32]
    assert token_ids.tolist() == [10, 11, 12, 20, 30, 31]
