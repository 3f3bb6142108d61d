"""Batches: nothing is cut, only completions are targets, padding stays small."""

import itertools
import random

import pytest

from models.training.conversations import Text, draw_text
from models.training.demo_batches import collate, draw_batches, encode_text
from models.training.demo_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return train_tokenizer((text.prompt + text.completion for text in (draw_text(rng) for _ in range(200))), 400)


def test_a_batch_holds_whole_texts_and_marks_their_completions():
    batch = collate([([1, 2, 3], [4]), ([5], [6, 7])])
    assert batch.token_ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert batch.is_target.int().tolist() == [[0, 0, 0, 1], [0, 1, 1, 0]]


def test_prompt_and_completion_are_encoded_apart(tokenizer):
    prompt, completion = encode_text(Text("Answer:", " 12"), tokenizer)
    assert tokenizer.decode(prompt) == "Answer:"
    assert tokenizer.decode(completion) == " 12"


def test_batches_have_about_the_tokens_asked_for_and_little_padding(tokenizer):
    for batch in itertools.islice(draw_batches(random.Random(1), tokenizer, 1000), 12):
        rows, length = batch.token_ids.shape
        assert 1000 <= rows * length < 1000 + 2 * length
        ends = batch.is_target.int().cumsum(1).argmax(1) + 1
        assert ends.float().mean() > 0.75 * length
