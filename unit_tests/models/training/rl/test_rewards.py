"""Rewards: which tokens are wanted, and prompts without special tokens."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from models.training.rl.recipe import DEMO
from models.training.rl.rewards import REWARDS, Reward, prompt_tokens

TOKENIZER = Tokenizer.from_file(str(Path(DEMO) / "tokenizer.json"))


@pytest.mark.parametrize(
    ("name", "text", "share"),
    [("digit_share", "12+ab", 0.4), ("digit_share", "none", 0.0), ("word_start_share", " the", 1.0)],
)
def test_a_reward_is_the_share_of_wanted_tokens(name, text, share):
    ids = TOKENIZER.encode(text).ids
    expected = sum(REWARDS[name](TOKENIZER.decode([token])) for token in ids) / len(ids)
    assert Reward(name, TOKENIZER)(ids) == expected
    if len(ids) == len(text) or share in (0.0, 1.0):
        assert expected == pytest.approx(share)


def test_a_sample_without_tokens_earns_nothing():
    assert Reward("digit_share", TOKENIZER)([]) == 0.0


def test_prompts_have_no_special_tokens():
    tokens = prompt_tokens(TOKENIZER)
    assert not set(tokens) & set(TOKENIZER.get_added_tokens_decoder())
    assert 500 < len(tokens) < TOKENIZER.get_vocab_size()
