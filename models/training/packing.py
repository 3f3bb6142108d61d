"""Packed documents as rows of their own: nothing that looks along a row can look into another document.

Attention, convolution, delta rule and every shift by one run over rows [B, T], one document each, padded on the right;
all of them are causal, so padding changes nothing before it. Knows token counts, never models. N packed tokens.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from models.training.mtp_settings import TrainingError

IGNORED = -100


@dataclass(frozen=True)
class Packing:
    """Where the documents of N packed tokens lie: `lens` tokens each, one after the other.

    Alignment padding belongs to the end of the document before it: give the padded cu_seqlens, and IGNORED labels
    there.
    """

    lens: tuple[int, ...]
    device: torch.device

    @staticmethod
    def find(token_ids: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None) -> "Packing":
        """The documents of token_ids [N] or [B, T]; every row begins one. Give the positions *of the token ids*.

        positions has the shape of token_ids, a document begins where they do not go on by one; cu_seqlens [documents +
        1] counts the flattened tokens before each document, and N. Raises TrainingError where the two differ.
        """
        starts = torch.zeros_like(token_ids, dtype=torch.bool)
        starts[..., 0] = True
        if positions is not None:
            if positions.shape != token_ids.shape:
                raise TrainingError(f"positions are {list(positions.shape)}, token ids {list(token_ids.shape)}")
            starts[..., 1:] |= positions[..., 1:] != positions[..., :-1] + 1
        if cu_seqlens is not None:
            counted = _starts_of(cu_seqlens, starts)
            if positions is not None and not torch.equal(counted, starts):
                where = int((counted != starts).flatten().nonzero()[0])
                raise TrainingError(
                    f"positions contradict cu_seqlens: at token {where} only one of them begins a document; "
                    "give one of the two, or the ones the tokens were packed with"
                )
            if (starts & ~counted).any():
                raise TrainingError(f"cu_seqlens {cu_seqlens.tolist()} let a document go on in the next row")
            starts = counted
        places = starts.flatten().nonzero().flatten().tolist() + [token_ids.numel()]
        return Packing(tuple(end - start for start, end in pairwise(places)), token_ids.device)

    @cached_property
    def is_token(self) -> Tensor:
        """[B, T] bool: false where a row is padding."""
        lens = torch.tensor(self.lens, device=self.device)
        return torch.arange(max(self.lens), device=self.device) < lens[:, None]

    def unpack(self, values: Tensor, fill: float = 0) -> Tensor:
        """[N, ...] -> rows [B, T, ...], padded with `fill`. Differentiable."""
        rows = values.new_full((*self.is_token.shape, *values.shape[1:]), fill)
        rows[self.is_token] = values
        return rows

    def pack(self, rows: Tensor) -> Tensor:
        """The inverse of `unpack`: [B, T, ...] -> [N, ...]. Differentiable."""
        return rows[self.is_token]

    def roll(self, values: Tensor, count: int = 1, fill: float = 0) -> Tensor:
        """values [N, ...] of `count` tokens later in the same document, `fill` behind its end."""
        return self.pack(shift(self.unpack(values, fill), count, fill))


def shift(rows: Tensor, count: int, fill: float) -> Tensor:
    """rows [B, T, ...] moved left: what stands at t + count comes to t, `fill` where there is nothing."""
    moved = torch.full_like(rows, fill)
    moved[:, : max(0, rows.shape[1] - count)] = rows[:, count:]
    return moved


def intersect_mask(mask: Tensor, depth: int) -> Tensor:
    """mask [B, T] bool -> mask[t] and ... and mask[t + depth]: all the labels that row t predicts on its way count."""
    out = mask
    for count in range(1, depth + 1):
        out = out & shift(mask, count, False)
    return out


def unshift_labels(labels: Tensor, packing: Packing) -> Tensor:
    """Labels [N] that stand one token early, as RL trainers have them (y_t = x_{t+1}), back to their own tokens.

    A document's last label, which belongs to no token of it, is dropped; its first token gets IGNORED.
    """
    rows = packing.unpack(labels, IGNORED)
    moved = torch.full_like(rows, IGNORED)
    moved[:, 1:] = rows[:, :-1]
    return packing.pack(moved)


def _starts_of(cu_seqlens: Tensor, starts: Tensor) -> Tensor:
    """Where documents begin, in the shape of `starts`."""
    bounds, total = cu_seqlens.tolist(), starts.numel()
    is_rising = all(first < second for first, second in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != total or not is_rising:
        raise TrainingError(f"cu_seqlens must rise from 0 to the {total} tokens, they are {bounds}")
    counted = torch.zeros_like(starts).flatten()
    counted[cu_seqlens[:-1].long().to(counted.device)] = True
    return counted.view_as(starts)
