"""What is learned of a request's drafts from those that were judged."""

import random

import pytest

from server.router.acceptance import Acceptance


def test_drafts_behind_a_refused_one_show_nothing() -> None:
    acceptance = Acceptance([0.5, 0.5, 0.5])
    acceptance.update(num_proposed=3, num_accepted=1)
    up, down, same = acceptance.estimates
    assert up > 0.5 > down and same == 0.5
    assert [1.0, *acceptance.survivals] == pytest.approx([1, up, up * down, up * down * 0.5], abs=0.005)


def test_estimates_reach_what_is_true_and_start_fast() -> None:
    rng = random.Random(0)
    acceptance = Acceptance([0.7])
    for _ in range(4):
        acceptance.update(1, 0)
    assert acceptance.survivals[0] < 0.4
    for _ in range(1000):
        acceptance.update(1, int(rng.random() < 0.6))
    assert acceptance.survivals[0] == pytest.approx(0.6, abs=0.15)
