"""Counting accepted drafts, and shifting ids by one."""

import itertools

import torch

from kernels.speculative import count_accepted, roll_next_ids


def test_drafts_count_up_to_the_first_mistake_and_one_token_is_always_emitted():
    for drafts in itertools.product([0, 1], repeat=3):
        for targets in itertools.product([0, 1], repeat=4):
            expected = 1
            for draft, target in zip(drafts, targets, strict=False):
                if draft != target:
                    break
                expected += 1
            counted = count_accepted(torch.tensor([targets]), torch.tensor([drafts]))
            assert counted.tolist() == [expected]


def test_requests_are_counted_separately():
    token_ids = torch.tensor([[4, 5, 6], [4, 5, 6], [4, 5, 6]])
    draft_ids = torch.tensor([[4, 5], [4, 0], [0, 5]])
    assert count_accepted(token_ids, draft_ids).tolist() == [3, 2, 1]


def test_without_drafts_one_token_is_emitted():
    counted = count_accepted(torch.tensor([[7], [8]]), torch.zeros(2, 0, dtype=torch.long))
    assert counted.tolist() == [1, 1]


def test_rolled_ids_end_each_request_with_its_newest_token():
    token_ids = torch.tensor([10, 11, 12, 20, 30, 31])
    rolled = roll_next_ids(token_ids, torch.tensor([2, 3, 5]), torch.tensor([13, 21, 32]))
    assert rolled.tolist() == [11, 12, 13, 21, 31, 32]
    assert token_ids.tolist() == [10, 11, 12, 20, 30, 31]
