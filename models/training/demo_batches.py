"""Batches of token ids for the demo model: fresh texts, similar lengths together, loss on completions only."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.training.conversations import Text, draw_text

POOL_BATCHES = 8


@dataclass(frozen=True)
class Batch:
    """Texts of similar length, padded on the right.

    Attributes:
        token_ids: [B, T] int64.
        is_target: [B, T] bool, true where the token belongs to a completion.
    """

    token_ids: Tensor
    is_target: Tensor


def draw_batches(rng: random.Random, tokenizer: Tokenizer, batch_tokens: int) -> Iterator[Batch]:
    """Draw batches of about `batch_tokens` tokens without end; no text is ever used twice on purpose."""
    while True:
        pool: list[tuple[list[int], list[int]]] = []
        while sum(len(prompt) + len(completion) for prompt, completion in pool) < POOL_BATCHES * batch_tokens:
            pool.extend(encode_text(draw_text(rng), tokenizer) for _ in range(32))
        batches = list(_cut(sorted(pool, key=_length), batch_tokens))
        rng.shuffle(batches)
        yield from map(collate, batches)


def encode_text(text: Text, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Give the token ids of the prompt and of the completion."""
    return tokenizer.encode(text.prompt).ids, tokenizer.encode(text.completion).ids


def collate(pairs: list[tuple[list[int], list[int]]]) -> Batch:
    """Pad prompts with their completions to one batch."""
    longest = max(map(_length, pairs))
    token_ids = torch.zeros(len(pairs), longest, dtype=torch.int64)
    is_target = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        token_ids[row, :end] = torch.tensor(prompt + completion)
        is_target[row, len(prompt) : end] = True
    return Batch(token_ids, is_target)


def _cut(pairs: list[tuple[list[int], list[int]]], batch_tokens: int) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Cut sorted pairs into runs whose padded size is about `batch_tokens`."""
    run: list[tuple[list[int], list[int]]] = []
    for pair in pairs:
        run.append(pair)
        if len(run) * _length(pair) >= batch_tokens:
            yield run
            run = []


def _length(pair: tuple[list[int], list[int]]) -> int:
    """Give the length of a prompt and its completion."""
    return len(pair[0]) + len(pair[1])
