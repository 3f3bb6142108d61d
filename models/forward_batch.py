"""What a layer must know about one forward pass. Passed as an argument, never looked up."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from models.cache import Cache


@dataclass(frozen=True)
class CacheView:
    """How the requests of one pass lie in the cache.

    rows [B] int64: their rows; start_lens [B] int64: tokens in the cache before this pass; accept_lens [B] int64: how
    many of these the GDN state has not folded yet; page_table [B, P] int64. `is_verify`: the tokens are a guess (one
    token and its drafts), so the GDN layers record them and leave the state before them.
    """

    cache: Cache
    rows: Tensor
    start_lens: Tensor
    accept_lens: Tensor
    page_table: Tensor
    is_verify: bool


@dataclass(frozen=True)
class ForwardBatch:
    """N tokens of B requests, request after request.

    token_ids, positions [N] int64; query_lens: the B token counts. Without a `view` the tokens are whole sequences from
    position 0, nothing is stored, and gradients flow (training).
    """

    token_ids: Tensor
    positions: Tensor
    query_lens: tuple[int, ...]
    view: CacheView | None = None

    @staticmethod
    def whole_sequences(token_ids: Tensor) -> "ForwardBatch":
        """token_ids [B, T]: B whole sequences of one length."""
        batch, length = token_ids.shape
        positions = torch.arange(length, device=token_ids.device).repeat(batch)
        return ForwardBatch(token_ids.flatten(), positions, (length,) * batch)

    @cached_property
    def slots(self) -> Tensor:
        """Flat KV slot of every token [N] int64: page · page_size + offset. Positions past the table fall on page 0."""
        assert self.view is not None
        page_size = self.view.cache.kv.page_size
        table = self.view.page_table
        if len(set(self.query_lens)) == 1:
            owner = torch.arange(len(self.query_lens), device=table.device).repeat_interleave(self.query_lens[0])
        else:
            counts = torch.tensor(self.query_lens, device=table.device)
            owner = torch.arange(len(counts), device=table.device).repeat_interleave(counts)
        pages = table[owner, self.positions // page_size]
        return pages * page_size + self.positions % page_size

    @cached_property
    def is_uniform(self) -> bool:
        """All requests have the same number of tokens."""
        return len(set(self.query_lens)) == 1

    def spans(self) -> list[tuple[int, slice]]:
        """(request index, its slice of the N tokens) in order."""
        spans, start = [], 0
        for index, length in enumerate(self.query_lens):
            spans.append((index, slice(start, start + length)))
            start += length
        return spans

    def with_tokens(self, token_ids: Tensor) -> "ForwardBatch":
        """The same pass over other tokens [N]."""
        return replace(self, token_ids=token_ids)

    def next_tokens(self, token_ids: Tensor, positions: Tensor) -> "ForwardBatch":
        """One more token per request at positions [B], over the same cache."""
        return replace(self, token_ids=token_ids, positions=positions, query_lens=(1,) * len(self.query_lens))
