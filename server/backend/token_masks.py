"""Which tokens may come next, as bits: one row for each row of logits.

N rows, V vocabulary, W = ceil(V / 32) words; bit i of word w stands for token 32 w + i.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.sampling import mask

_BITS = 32


class TokenMasks:
    """packed [N, W] int32 on the host, and `array`, the same memory for numpy. Everything is allowed at first. From
    counts[i] of its rows of a verify request i may emit tokens; None: from all."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device | str):
        is_cuda = torch.device(device).type == "cuda"
        self.packed = torch.full((num_rows, num_words(vocab_size)), -1, dtype=torch.int32, pin_memory=is_cuda)
        self.array = self.packed.numpy()
        self.counts: list[int] | None = None
        self._device = device

    @staticmethod
    def for_logits(logits: Tensor) -> "TokenMasks":
        """One row for each of logits [N, V]."""
        return TokenMasks(len(logits), logits.shape[1], logits.device)

    def allows(self, row: int, token_id: int) -> bool:
        """Whether the token may come in this row."""
        return bool(self.array[row, token_id // _BITS] >> token_id % _BITS & 1)

    def narrow(self, row: int, keep: np.ndarray) -> None:
        """Allow only tokens of `keep` [W] too, unless that would leave none: then what was allowed before stays."""
        both = self.array[row] & keep
        if both.any():
            self.array[row] = both

    def apply(self, logits: Tensor) -> Tensor:
        """logits [N, V] with -inf for what is not allowed."""
        return mask(logits, self.packed.to(self._device, non_blocking=True))


def num_words(vocab_size: int) -> int:
    """W."""
    return -(-vocab_size // _BITS)


def pack(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """A row [W] int32 that allows these tokens alone."""
    is_allowed = np.zeros(num_words(vocab_size) * _BITS, dtype=bool)
    is_allowed[list(token_ids)] = True
    return np.packbits(is_allowed, bitorder="little").view(np.int32)
