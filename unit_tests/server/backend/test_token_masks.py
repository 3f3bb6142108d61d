"""Bits of a row against plain sets."""

import random

import numpy as np
import pytest
import torch

from server.backend.token_masks import TokenMasks, num_words, pack


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 320])
def test_what_is_packed_is_what_is_allowed(vocab_size: int) -> None:
    rng = random.Random(vocab_size)
    allowed = {token for token in range(vocab_size) if rng.random() < 0.4} | {vocab_size - 1}
    masks = TokenMasks(2, vocab_size, "cpu")
    masks.narrow(1, pack(sorted(allowed), vocab_size))
    assert all(masks.allows(0, token) for token in range(vocab_size))
    assert {token for token in range(vocab_size) if masks.allows(1, token)} == allowed
    assert masks.array.shape == (2, num_words(vocab_size))


def test_a_rule_that_would_leave_nothing_gives_way() -> None:
    masks = TokenMasks(1, 40, "cpu")
    masks.narrow(0, pack([3, 39], 40))
    masks.narrow(0, pack([5], 40))
    assert {token for token in range(40) if masks.allows(0, token)} == {3, 39}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_keep_what_is_allowed_and_lose_the_rest(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    raw, masks = logits.clone(), TokenMasks.for_logits(logits)
    masks.array[1] = pack([0, 31, 32, 69], 70)
    masks.array[2] = np.int32(0)
    masked = masks.apply(logits)
    assert torch.equal(masked[0], raw[0]) and torch.equal(logits, raw)
    assert masked[1].isfinite().nonzero().flatten().tolist() == [0, 31, 32, 69]
    assert torch.equal(masked[1, [0, 31, 32, 69]], raw[1, [0, 31, 32, 69]])
    assert (masked[2] == -torch.inf).all()
