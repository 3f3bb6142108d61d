"""Batch (host) -> ForwardBatch (device)."""

import torch
from torch import Tensor

from models.forward_batch import ForwardBatch
from server.backend.request_table import RequestTable
from server.request import Batch


def build_forward_batch(batch: Batch, table: RequestTable) -> ForwardBatch:
    """Write what the host decided (new rows, new pages) to the table, and gather what the device already knows.

    A verify batch takes its tokens and lengths from the table; a prefill batch brings its tokens from the host.
    """
    for request in batch.requests:
        if request.num_computed == 0:
            table.admit(request)
        table.write_pages(request)
    view = table.view([request.row for request in batch.requests if request.row is not None], batch.is_verify)
    if batch.is_verify:
        token_ids = table.next_ids[view.row_ids]
        where = view.start_lens[:, None] + torch.arange(token_ids.shape[1], device=table.device)
        return ForwardBatch(token_ids.flatten(), where.flatten(), tuple(batch.token_counts), view)
    ids: list[int] = []
    positions: list[int] = []
    for request, count in zip(batch.requests, batch.token_counts, strict=True):
        end = request.num_computed + count
        ids += request.known_ids(request.num_computed, end)
        positions += range(request.num_computed, end)
    token_ids, where = (torch.tensor(values, device=table.device) for values in (ids, positions))
    return ForwardBatch(token_ids, where, tuple(batch.token_counts), view)


def last_indices(forward: ForwardBatch) -> Tensor:
    """Flat index [B] of each request's last token of the pass."""
    return torch.tensor(forward.query_lens, device=forward.token_ids.device).cumsum(0) - 1


def following_ids(batch: Batch, count: int) -> list[list[int]]:
    """Per request of a prefill batch, the `count` known tokens after its chunk; -1 where the prompt has ended."""
    rows = []
    for request, length in zip(batch.requests, batch.token_counts, strict=True):
        end = request.num_computed + length
        known = request.known_ids(end, end + count)
        rows.append(known + [-1] * (count - len(known)))
    return rows
