"""Accepting drafts and committing what a verify step emits, in Triton: the law of kernels/speculative.py.

One program per request. B requests of T rows each, R rows of the table, S stop ids, V vocabulary.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import power_of_two


class CommitTable(NamedTuple):
    """What a verify step reads and writes of the requests, one row each; row 0 is padding and never written.

    int64: seq_len, accept_len, longest_len [R], which may be strided; next_ids [R, K + 1]; stop_ids [R, S] (-1: none).
    output_counts [R, V] int32, contiguous, kept for the rows where has_rules [R] (bool or int32, may be strided).
    """

    seq_len: Tensor
    accept_len: Tensor
    longest_len: Tensor
    next_ids: Tensor
    stop_ids: Tensor
    output_counts: Tensor
    has_rules: Tensor


def accept_and_commit(
    token_ids: Tensor, window: Tensor, widths: Tensor, rows: Tensor, table: CommitTable
) -> tuple[Tensor, Tensor]:
    """match_lens and accept_lens [B] int64 of kernels.speculative.accept; a request may emit up to its longest_len.

    All int64. token_ids, window [B * T]: the target's tokens and those that the rows were run on; widths [B]: how many
    of its T rows a request has, 1..T; rows [B]: its row of the table, 0 if it is padding. The table's rows advance:
    seq_len, accept_len, the newest token in next_ids[:, 0], and output_counts of every emitted token.
    """
    num_requests = len(rows)
    width = len(token_ids) // max(1, num_requests)
    match_lens, accept_lens = torch.empty_like(rows), torch.empty_like(rows)
    columns = (table.seq_len, table.accept_len, table.longest_len, table.has_rules, table.next_ids, table.stop_ids)
    _accept_kernel[(num_requests,)](
        token_ids, window, widths, rows, *(argument for column in columns for argument in (column, column.stride(0))),
        table.output_counts, match_lens, accept_lens, width, table.stop_ids.shape[1], table.output_counts.shape[1],
        ROWS=power_of_two(width), STOPS=power_of_two(table.stop_ids.shape[1]), num_warps=1,
    )  # fmt: skip
    return match_lens, accept_lens


@triton.jit
def _accept_kernel(
    token_ids_ptr, window_ptr, widths_ptr, rows_ptr, seq_len_ptr, seq_len_stride, accept_len_ptr, accept_len_stride,
    longest_len_ptr, longest_len_stride, has_rules_ptr, has_rules_stride, next_ids_ptr, next_ids_stride,
    stop_ids_ptr, stop_ids_stride, counts_ptr, match_lens_ptr, accept_lens_ptr, width, num_stops, vocab_size,
    ROWS: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + b)
    own_width = tl.load(widths_ptr + b)
    t, s = tl.arange(0, ROWS), tl.arange(0, STOPS)
    has_draft = t + 1 < own_width
    token_ids = tl.load(token_ids_ptr + b * width + t, mask=t < own_width, other=-2)
    drafts = tl.load(window_ptr + b * width + t + 1, mask=has_draft, other=-1)
    match_len = 1 + tl.min(tl.where(has_draft & (token_ids == drafts), ROWS, t))

    stop_ids = tl.load(stop_ids_ptr + row * stop_ids_stride + s, mask=s < num_stops, other=-1)
    is_stop = tl.max((token_ids[:, None] == stop_ids[None, :]).to(tl.int32), axis=1) > 0
    first_stop = tl.min(tl.where(is_stop, t + 1, ROWS))
    seq_len = tl.load(seq_len_ptr + row * seq_len_stride)
    room = tl.load(longest_len_ptr + row * longest_len_stride) - seq_len - 1
    accept_len = tl.maximum(tl.minimum(tl.minimum(match_len, first_stop), room), 1)
    tl.store(match_lens_ptr + b, match_len)
    tl.store(accept_lens_ptr + b, accept_len)

    if row != 0:
        tl.store(seq_len_ptr + row * seq_len_stride, seq_len + accept_len)
        tl.store(accept_len_ptr + row * accept_len_stride, accept_len)
        tl.store(next_ids_ptr + row * next_ids_stride, tl.sum(tl.where(t == accept_len - 1, token_ids, 0)))
        if tl.load(has_rules_ptr + row * has_rules_stride) != 0:
            tl.atomic_add(counts_ptr + row * vocab_size + token_ids, 1, mask=t < accept_len, sem="relaxed")
