"""Outputs drawn at random from what a matcher allows, over a tokenizer of single bytes and a few markers."""

import random
from pathlib import Path

import numpy as np

from server.backend.matcher import Matcher
from server.backend.token_masks import TokenMasks
from unit_tests.checkpoints import IM_END, PLAIN_TOKENS, SPECIAL_TOKENS, TOKENIZER_SIZE, write_tokenizer

VOCAB_SIZE = TOKENIZER_SIZE + 35
STOP_IDS = (IM_END,)
# Special tokens but the one that ends an output, and ids without a token, never come.
FIRST_PLAIN_ID = 256 + len(SPECIAL_TOKENS)
BYTES = {i: bytes([i]) for i in range(256)} | {FIRST_PLAIN_ID + i: text.encode() for i, text in enumerate(PLAIN_TOKENS)}
_CLOSING = frozenset(b'"]}0')


def tokenizer_in(directory: Path) -> Path:
    """The directory, with a byte-level tokenizer in it."""
    write_tokenizer(directory)
    return directory


def allowed_ids(matcher: Matcher) -> list[int]:
    """What may come next."""
    masks = TokenMasks(1, VOCAB_SIZE, "cpu")
    matcher.fill(masks, 0)
    bits = np.unpackbits(masks.array[0].view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def draw_text(matcher: Matcher, seed: int, most: int = 300) -> bytes | None:
    """A whole output, which soon closes what it has opened; None if it does not end."""
    rng, text = random.Random(seed), b""
    for _ in range(most):
        ids = allowed_ids(matcher)
        assert ids and all(token_id in BYTES or token_id in STOP_IDS for token_id in ids), (text, ids)
        closing = [token_id for token_id in ids if token_id in _CLOSING or token_id in STOP_IDS]
        token_id = rng.choice(closing if closing and rng.random() < 0.6 else ids)
        if token_id in STOP_IDS:
            return text
        assert matcher.accept(token_id)
        text += BYTES[token_id]
    return None


def matches(matcher: Matcher, text: str) -> bool:
    """Whether the text is a whole output."""
    copy = matcher.copy()
    return all(byte in allowed_ids(copy) and copy.accept(byte) for byte in text.encode()) and IM_END in allowed_ids(
        copy
    )
