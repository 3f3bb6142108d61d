"""Batch (host) -> ForwardBatch (device)."""

from dataclasses import replace

import torch
from torch import Tensor

from models.forward_batch import ForwardBatch, to_device
from server.backend.request_table import RequestTable
from server.request import Batch


def update_table(batch: Batch, table: RequestTable) -> None:
    """Write what the host decided for the batch: new rows, new pages."""
    for work in batch.works:
        if work.output_ids is not None:
            table.admit(work)
    table.write_pages(batch.works)


def build_forward_batch(batch: Batch, table: RequestTable) -> ForwardBatch:
    """Gather what the device already knows: a verify batch takes its tokens and lengths from the table, a prefill batch
    brings its tokens from the host."""
    num_pages = max(work.first_page + len(work.pages) for work in batch.works)
    view = table.view([work.row for work in batch.works], batch.is_verify, num_pages)
    counts = tuple(work.num_tokens for work in batch.works)
    if batch.is_verify:
        token_ids, where = _gather_windows(table.next_ids[view.row_ids], view.start_lens, counts)
        return ForwardBatch(token_ids, where, counts, view)
    ids = [token_id for work in batch.works for token_id in work.token_ids]
    positions = [work.start + index for work in batch.works for index in range(work.num_tokens)]
    token_ids, where = (to_device(values, table.device) for values in (ids, positions))
    starts = tuple(work.start for work in batch.works)
    return ForwardBatch(token_ids, where, counts, replace(view, host_starts=starts))


def _gather_windows(next_ids: Tensor, start_lens: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Tokens and positions [N]: the first counts[i] of next_ids [B, K + 1], from start_lens [B] on."""
    if min(counts) == max(counts):
        ahead = torch.arange(counts[0], device=next_ids.device)
        return next_ids[:, : counts[0]].flatten(), (start_lens[:, None] + ahead).flatten()
    pairs = [(request, ahead) for request, count in enumerate(counts) for ahead in range(count)]
    requests, ahead = to_device(pairs, next_ids.device).unbind(1)
    return next_ids[requests, ahead], start_lens[requests] + ahead


def last_indices(forward: ForwardBatch) -> Tensor:
    """Flat index [B] of each request's last token of the pass."""
    return forward.query_starts[1:] - 1


def drawn_rows(batch: Batch, forward: ForwardBatch, hidden: Tensor) -> Tensor:
    """Of hidden [N, H] what tokens are drawn from: all rows of a verify, each chunk's last one, or none where no chunk
    ends a prompt."""
    if batch.is_verify:
        return hidden
    return hidden[last_indices(forward)] if batch.ends_any_prompt else hidden[:0]


def following_ids(batch: Batch, count: int) -> list[list[int]]:
    """Per request of a prefill batch, the `count` known tokens after its chunk; -1 where the prompt has ended."""
    known = [list(work.following_ids[:count]) for work in batch.works]
    return [ids + [-1] * (count - len(ids)) for ids in known]
