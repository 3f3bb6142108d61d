"""Batches of token ids from a text file: JSON lines of `text`, `prompt` and `completion`, or `question` and `answer`.

Which texts make up the i-th batch depends on the seed alone, so that training goes on after a stop as if it had not
stopped. GSM8K's rows are questions and answers; of a directory only `train.jsonl` is read.
"""

import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from models.training.demo_batches import Batch, collate
from models.training.mtp_settings import TrainingError

POOL_BATCHES = 8
_FORMS = "'text', 'prompt' and 'completion', or 'question' and 'answer'"

Encoded = tuple[list[int], list[int]]


@dataclass(frozen=True)
class TextSet:
    """Encoded texts, each its prompt's and its completion's token ids: those to train on, and those held out."""

    train: list[Encoded]
    held_out: list[Encoded]

    @property
    def digest(self) -> str:
        """Changes with every token of the texts to train on."""
        return f"{len(self.train)} texts {zlib.crc32(repr(self.train).encode()):08x}"


def read_texts(path: Path, tokenizer: Tokenizer, stop_id: int | None, max_length: int, num_held_out: int) -> TextSet:
    """Encode a file, or the `train.jsonl` of a directory; texts are cut to max_length tokens and end in `stop_id`.

    The held-out texts are drawn from the whole file, the same ones every time. Raises TrainingError naming the line.
    """
    file = path / "train.jsonl" if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines() cuts texts at U+2028, too
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"--data {path} is not readable: {error}") from None
    texts = [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if len(texts) <= num_held_out:
        raise TrainingError(f"{file} has {len(texts)} texts, --held-out takes {num_held_out}: none is left to train on")
    encoded = [_encode(*text, tokenizer, stop_id, max_length) for text in texts]
    random.Random(len(encoded)).shuffle(encoded)
    return TextSet(encoded[num_held_out:], encoded[:num_held_out])


def plan_batches(lens: Sequence[int], batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """Indices of texts, batch after batch without end, of about batch_tokens padded tokens: every text once per epoch,
    similar lengths together."""
    for epoch in count():
        rng = random.Random(f"{seed} {epoch}")
        order = rng.sample(range(len(lens)), len(lens))
        for pool in cut_batches(order, lens, POOL_BATCHES * batch_tokens):
            batches = cut_batches(sorted(pool, key=lambda index: lens[index]), lens, batch_tokens)
            yield from rng.sample(batches, len(batches))


def make_batch(texts: Sequence[Encoded], is_whole: bool) -> Batch:
    """Texts as one padded batch; `is_whole`: prompts are to be predicted, too."""
    return collate([([], prompt + completion) if is_whole else (prompt, completion) for prompt, completion in texts])


def cut_batches(order: Sequence[int], lens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Runs of indices whose padded size is at most max_tokens, but of one text at least."""
    runs: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, lens[index])
        if not runs or longest * (len(runs[-1]) + 1) > max_tokens:
            runs.append([])
            longest = lens[index]
        runs[-1].append(index)
    return runs


def _parse(line: str, place: str) -> tuple[str, str]:
    """(prompt, completion) of one JSON line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TrainingError(f"{place} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise TrainingError(f"{place} is a {type(row).__name__}, an object with {_FORMS} is needed")
    prompt: Any
    completion: Any
    if {"question", "answer"} <= row.keys():
        prompt, completion = f"Question: {row['question']}\nAnswer:", f" {row['answer']}"
    elif {"prompt", "completion"} <= row.keys():
        prompt, completion = row["prompt"], row["completion"]
    else:
        prompt, completion = "", row.get("text")
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise TrainingError(f"{place} has the fields {', '.join(row)}: texts in {_FORMS} are needed")
    return prompt, completion


def _encode(prompt: str, completion: str, tokenizer: Tokenizer, stop_id: int | None, max_length: int) -> Encoded:
    before = tokenizer.encode(prompt).ids if prompt else []
    after = tokenizer.encode(completion).ids + ([] if stop_id is None else [stop_id])
    return before[:max_length], after[: max(0, max_length - len(before))]
