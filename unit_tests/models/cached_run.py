"""Drives a model over the cache by hand, as an engine would: prefill, verify, accept, draft."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.cache import Cache, GDNCache, KVCache
from models.forward_batch import CacheView, ForwardBatch
from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP

PAGE_SIZE = 4
STALE = 50.0  # what memory of an earlier request may hold


class CachedRun:
    """Rows of one cache with shuffled pages. Row 0 and page 0 are padding: filled with NaN, which nothing may read."""

    def __init__(
        self,
        target: Qwen35,
        draft: Qwen35MTP | None = None,
        num_rows: int = 5,
        max_len: int = 320,
        mtp_step: int = 3,
    ):
        self.target, self.draft = target, draft
        config, dtype = target.config, target.embed_tokens.weight.dtype
        pages_per_row = -(-max_len // PAGE_SIZE)
        num_pages = 1 + num_rows * pages_per_row
        num_mtp_layers = 0 if draft is None else draft.num_layers
        kv = KVCache.allocate(config, num_mtp_layers, num_pages, PAGE_SIZE, dtype, "cpu")
        self.cache = Cache(kv, GDNCache.allocate(config, mtp_step, num_rows, dtype, "cpu"))
        order = 1 + torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(3))
        self.page_tables = order.view(num_rows, pages_per_row)
        self.seq_lens, self.accept_lens = [0] * num_rows, [0] * num_rows
        self._spoil(num_rows)

    def _spoil(self, num_rows: int) -> None:
        gdn = self.cache.gdn
        for tensor in (self.cache.kv.data, gdn.state, *gdn.ring, gdn.conv_ring):
            tensor.fill_(STALE)
        for row in range(1, num_rows):
            gdn.reset(row)
        self.cache.kv.data[:, :, 0] = torch.nan
        for tensor in (gdn.state, *gdn.ring, gdn.conv_ring):
            tensor[:, 0] = torch.nan

    def batch(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]], is_verify: bool) -> ForwardBatch:
        """The pass that appends token_ids[i] to row rows[i]."""
        starts = [self.seq_lens[row] for row in rows]
        positions = [start + i for start, ids in zip(starts, token_ids, strict=True) for i in range(len(ids))]
        accept_lens = [self.accept_lens[row] for row in rows]
        view = CacheView(
            cache=self.cache,
            rows=tuple(rows),
            start_lens=torch.tensor(starts),
            accept_lens=torch.tensor(accept_lens),
            page_table=self.page_tables[list(rows)],
            is_verify=is_verify,
            row_ids=torch.tensor(list(rows)),
            host_starts=None if is_verify else tuple(starts),
        )
        flat = torch.tensor([token for ids in token_ids for token in ids])
        return ForwardBatch(flat, torch.tensor(positions), tuple(map(len, token_ids)), view)

    def prefill(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> tuple[ForwardBatch, Tensor]:
        """Known tokens: the pass and its hidden states [N, H]."""
        forward = self.batch(rows, token_ids, is_verify=False)
        hidden = self.target(forward)
        for row, ids in zip(rows, token_ids, strict=True):
            self.seq_lens[row] += len(ids)
            self.accept_lens[row] = 0
        return forward, hidden

    def verify(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> tuple[ForwardBatch, Tensor]:
        """Guessed tokens: the pass and its hidden states [N, H]. `accept` must follow."""
        forward = self.batch(rows, token_ids, is_verify=True)
        return forward, self.target(forward)

    def accept(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Commit the first counts[i] tokens of the verify step of rows[i]."""
        for row, count in zip(rows, counts, strict=True):
            self.seq_lens[row] += count
            self.accept_lens[row] = count

    def fold(self, rows: Sequence[int]) -> None:
        """Bring the states to seq_len: run a verify step with throw-away tokens and accept none of them."""
        self.verify(rows, [[0]] * len(rows))
        self.accept(rows, [0] * len(rows))
