"""Triton kernels of kernels/attention.py: causal grouped-query attention over a paged cache.

    out[t, h] = Σ_{s ≤ position of t} softmax(q[t, h] · k[s, h // G] / √D) v[s, h // G], · sigmoid(gate[t, h])

N tokens of B requests, HQ query heads, HKV key-value heads, G = HQ/HKV, D head dimension, P pages of a request.
A program works for one kv head: its rows are (token, query head of the group), row r ↔ (r // G, r % G), BM at a time.

`verify_attention` has few rows, so the keys of a request are shared out: splits of SPLIT positions each give a partial
softmax (maximum m, sum l, unscaled acc), and a tree of fixed fan joins them. Whoever finishes the last child of a node
joins the node, hence no second launch and no waiting. Splits and tree depend on positions only, and a split that a row
does not see joins as an exact zero: a row's bits depend neither on the batch nor on the tokens verified with it (up to
_SAME_TOKENS, which share a tile shape).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.dispatch import is_interpreted
from kernels.gpu.launch import power_of_two

SPLIT = 512  # positions of a split, a multiple of _KV_TILE
_FAN = 16  # partials that a node of the tree joins
_KV_TILE = 32
_MAX_ROWS = 64  # rows of a program
_SAME_TOKENS = 4  # a scratch for up to so many tokens per request takes the same tile shape, hence the same bits
_PROGRAMS = 512  # of a verify launch, about: three or four per multiprocessor
_JOIN_VALUES = 512  # of each child, at a time
_LOG2_E = 1.4426950408889634


class SplitScratch(NamedTuple):
    """Partial softmaxes and arrival counters of `verify_attention`. Layers run one after the other and share it.

    S nodes of the tree: the splits of the longest request and everything above them. R = max_query_len · G rows.
    """

    acc: Tensor  # [requests, HKV, S, R, D] float32
    stats: Tensor  # [requests, HKV, S, 2, R] float32: m and l
    counters: Tensor  # [requests, HKV, row tiles, S] int32: children that have arrived, zero between launches

    @staticmethod
    def allocate(
        max_requests: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_len: int,
        max_query_len: int,
        device: torch.device | str,
    ) -> "SplitScratch":
        """max_len: positions a page table covers, P · page_size. max_query_len: tokens of a request in one launch."""
        num_rows, num_nodes = max_query_len * num_heads // num_kv_heads, _num_nodes(triton.cdiv(max_len, SPLIT))
        nodes = (max_requests, num_kv_heads, num_nodes)
        tiles = (max_requests, num_kv_heads, triton.cdiv(num_rows, _MAX_ROWS))
        return SplitScratch(
            torch.empty(*nodes, num_rows, head_dim, dtype=torch.float32, device=device),
            torch.empty(*nodes, 2, num_rows, dtype=torch.float32, device=device),
            torch.zeros(*tiles, num_nodes, dtype=torch.int32, device=device),
        )


def verify_attention(
    q: Tensor, kv: Tensor, page_table: Tensor, start_lens: Tensor, gate: Tensor | None, scratch: SplitScratch
) -> Tensor:
    """Attend T tokens of each request, q [B · T, HQ, D] contiguous, to the cache, which already holds their own keys.

    kv [2, pages, page_size, HKV, D] of q's dtype and page_table [B, P] int64, both contiguous; start_lens [B] int64:
    token t stands at position start_lens[b] + t and sees positions 0..itself. gate [B · T, HQ, D] of unit stride in D,
    or None: the attention, in q's dtype, times sigmoid(gate). D is a power of two ≥ 16. Returns [B · T, HQ, D] in q's
    dtype. Raises ValueError when the scratch is too small.
    """
    out = torch.empty_like(q)
    batch, num_pages = page_table.shape
    if batch == 0:
        return out
    (num_tokens, num_heads, dim), (page_size, num_kv_heads) = q.shape, kv.shape[2:4]
    query_len, group = num_tokens // batch, num_heads // num_kv_heads
    num_rows, num_splits = query_len * group, triton.cdiv(num_pages * page_size, SPLIT)
    _check_scratch(scratch, batch, num_rows, num_splits)
    rows_tile = min(_MAX_ROWS, power_of_two(max(16, scratch.acc.shape[3], _SAME_TOKENS * group)))
    num_tiles = triton.cdiv(num_rows, rows_tile)
    num_programs = max(1, min(num_splits, _PROGRAMS // (batch * num_kv_heads * num_tiles)))
    _verify_kernel[(num_programs, num_kv_heads * num_tiles, batch)](
        q,
        kv,
        page_table,
        start_lens,
        *_gate_arguments(gate, q),
        out,
        *scratch,
        kv.stride(0),
        num_pages,
        num_heads,
        num_kv_heads,
        query_len,
        num_splits,
        scratch.acc.shape[2],
        scratch.acc.shape[3],
        _LOG2_E / dim**0.5,
        HAS_GATE=gate is not None,
        PAGE_SIZE=page_size,
        G=group,
        D=dim,
        BM=rows_tile,
        BN=_KV_TILE,
        SPLIT=SPLIT,
        FAN=_FAN,
        BJ=min(rows_tile, triton.cdiv(_JOIN_VALUES, dim)),
        WIDE=q.dtype == torch.float32 or is_interpreted(),
        **_pipeline(rows_tile),
    )
    return out


def prefill_attention(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    start_lens: Tensor,
    query_starts: Tensor,
    max_query_len: int,
    gate: Tensor | None,
) -> Tensor:
    """As `verify_attention`, for q [N, HQ, D] of requests with different numbers of tokens, max_query_len at most.

    query_starts [B + 1] int64: the tokens of request b are query_starts[b]..query_starts[b + 1] - 1.
    """
    out = torch.empty_like(q)
    batch, num_pages = page_table.shape
    (_, num_heads, dim), (page_size, num_kv_heads) = q.shape, kv.shape[2:4]
    group = num_heads // num_kv_heads
    _prefill_kernel[(triton.cdiv(max_query_len * group, _MAX_ROWS), num_kv_heads, batch)](
        q,
        kv,
        page_table,
        start_lens,
        query_starts,
        *_gate_arguments(gate, q),
        out,
        kv.stride(0),
        num_pages,
        num_heads,
        num_kv_heads,
        _LOG2_E / dim**0.5,
        HAS_GATE=gate is not None,
        PAGE_SIZE=page_size,
        G=group,
        D=dim,
        BM=_MAX_ROWS,
        BN=_KV_TILE,
        WIDE=q.dtype == torch.float32 or is_interpreted(),
        num_warps=4,  # spills a little, and is 1.8 times as fast on an H100 as eight, which do not
        num_stages=3,
        maxnreg=255,
    )
    return out


def _gate_arguments(gate: Tensor | None, unused: Tensor) -> tuple[Tensor, int, int]:
    return (unused, 0, 0) if gate is None else (gate, gate.stride(0), gate.stride(1))


def _pipeline(rows_tile: int) -> dict[str, int]:
    """Page ids are loaded one tile ahead of their keys (3 stages) or two (5): what fits into 99 KiB at D = 256."""
    shape = {"num_warps": 8, "num_stages": 3} if rows_tile == _MAX_ROWS else {"num_warps": 4, "num_stages": 5}
    return shape | {"maxnreg": 255}  # shared memory bounds the programs at a time: fewer registers only spill


def _num_nodes(num_splits: int) -> int:
    """Nodes of the tree over so many leaves, level after level up to the root."""
    total = num_splits
    while num_splits > 1:
        num_splits = triton.cdiv(num_splits, _FAN)
        total += num_splits
    return total


def _check_scratch(scratch: SplitScratch, batch: int, num_rows: int, num_splits: int) -> None:
    """Host integers only: a smaller scratch would be written past its end."""
    needed, given = (batch, _num_nodes(num_splits), num_rows), tuple(scratch.acc.shape[i] for i in (0, 2, 3))
    if any(need > limit for need, limit in zip(needed, given, strict=True)):
        raise ValueError(f"the launch has (requests, tree nodes, rows) {needed}, the scratch holds {given}")


# One binary for every T and table width: nothing is compiled anew between requests, and no sum is ordered anew.
@triton.jit(do_not_specialize=["T", "num_pages", "max_splits", "num_nodes", "scratch_rows"])
def _verify_kernel(
    q_ptr, kv_ptr, table_ptr, start_lens_ptr, gate_ptr, gate_stride, gate_head_stride, out_ptr,
    acc_ptr, stats_ptr, counters_ptr,
    values_offset, num_pages, HQ, HKV, T, max_splits, num_nodes, scratch_rows, scale,
    HAS_GATE: tl.constexpr, PAGE_SIZE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SPLIT: tl.constexpr, FAN: tl.constexpr, BJ: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (programs that share the splits, HKV · row tiles, B)."""
    first_split, num_tiles = tl.program_id(0), tl.num_programs(1) // HKV
    kv_head, first_row = tl.program_id(1) // num_tiles, tl.program_id(1) % num_tiles * BM
    request = tl.program_id(2).to(tl.int64)
    start = tl.load(start_lens_ptr + request).to(tl.int32)
    num_splits = tl.cdiv(start + T, SPLIT)
    if first_split >= num_splits:
        return
    rows = first_row + tl.arange(0, BM)
    first_token = request * T
    q = _load_rows(q_ptr, rows, first_token, T, kv_head, HQ, G, D, WIDE)
    positions = start + tl.minimum(rows // G, T - 1)
    pair = request * HKV + kv_head
    acc_ptr += pair * num_nodes * scratch_rows * D
    stats_ptr += pair * num_nodes * 2 * scratch_rows
    counters_ptr += (request * tl.num_programs(1) + tl.program_id(1)) * num_nodes
    keys_ptr, table_ptr, step = kv_ptr + kv_head * D, table_ptr + request * num_pages, tl.num_programs(0)
    if num_splits == 1:
        _, total, acc = _attend(
            q, positions, keys_ptr, values_offset, table_ptr, 0, start + T, HKV * D, scale, PAGE_SIZE, D, BM, BN, WIDE
        )  # fmt: skip
        _write_rows(
            out_ptr, gate_ptr, acc / total[:, None], rows, rows < T * G, first_token, kv_head,
            gate_stride, gate_head_stride, HQ, G, D, HAS_GATE,
        )  # fmt: skip
        return
    for split in range(first_split, num_splits, step):
        m, total, acc = _attend(
            q, positions, keys_ptr, values_offset, table_ptr,
            split * SPLIT, tl.minimum(split * SPLIT + SPLIT, start + T), HKV * D, scale, PAGE_SIZE, D, BM, BN, WIDE,
        )  # fmt: skip
        _store_partial(acc_ptr, stats_ptr, m, total, acc, split, rows, rows < T * G, scratch_rows, D)
    # Climb: whoever brings the last child of a node joins its children and goes on as that node. `level` is the first
    # node of a level, `width` the room it has, `nodes` how many of it the request uses.
    end_row = tl.minimum(first_row + BM, T * G)
    for split in range(first_split, num_splits, step):
        node, nodes, level, width = split, num_splits, 0, max_splits
        while nodes > 1:
            parent, next_level = node // FAN, level + width
            children = tl.minimum(FAN, nodes - parent * FAN)
            counter_ptr = counters_ptr + next_level + parent
            tl.debug_barrier()  # the whole program has stored before one of its threads releases that to the others
            if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == children - 1:
                tl.store(counter_ptr, 0)
                _join(
                    acc_ptr, stats_ptr, out_ptr, gate_ptr, level + parent * FAN, children, next_level + parent,
                    nodes <= FAN, first_row, end_row, first_token, kv_head, scratch_rows,
                    gate_stride, gate_head_stride, HQ, G, D, HAS_GATE, FAN, BJ,
                )  # fmt: skip
                node, nodes, level, width = parent, tl.cdiv(nodes, FAN), next_level, tl.cdiv(width, FAN)
            else:
                nodes = 0


@triton.jit(do_not_specialize=["num_pages"])
def _prefill_kernel(
    q_ptr, kv_ptr, table_ptr, start_lens_ptr, query_starts_ptr, gate_ptr, gate_stride, gate_head_stride, out_ptr,
    values_offset, num_pages, HQ, HKV, scale,
    HAS_GATE: tl.constexpr, PAGE_SIZE: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, HKV, B). The tiles with most keys start first."""
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    kv_head, request = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_token = tl.load(query_starts_ptr + request)
    T = (tl.load(query_starts_ptr + request + 1) - first_token).to(tl.int32)
    if first_row >= T * G:
        return
    start = tl.load(start_lens_ptr + request).to(tl.int32)
    rows = first_row + tl.arange(0, BM)
    q = _load_rows(q_ptr, rows, first_token, T, kv_head, HQ, G, D, WIDE)
    last = tl.minimum((first_row + BM - 1) // G, T - 1)
    _, total, acc = _attend(
        q, start + tl.minimum(rows // G, T - 1), kv_ptr + kv_head * D, values_offset, table_ptr + request * num_pages,
        0, start + last + 1, HKV * D, scale, PAGE_SIZE, D, BM, BN, WIDE,
    )  # fmt: skip
    _write_rows(
        out_ptr, gate_ptr, acc / total[:, None], rows, rows < T * G, first_token, kv_head,
        gate_stride, gate_head_stride, HQ, G, D, HAS_GATE,
    )  # fmt: skip


@triton.jit
def _attend(
    q, positions, keys_ptr, values_offset, table_ptr, begin, end, token_stride, scale,
    PAGE_SIZE: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows q [BM, D] at `positions` over the keys begin..end-1 -> m [BM] (of base-2 exponents), l [BM], acc [BM, D].
    `scale` contains log2(e). A row that sees none of the keys gives -inf, 0, 0."""
    columns = tl.arange(0, D)
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for first in range(begin, end, BN):
        seen = first + tl.arange(0, BN)
        inside = seen < end
        page = tl.load(table_ptr + seen // PAGE_SIZE, mask=inside, other=0)
        tokens = (page * PAGE_SIZE + seen % PAGE_SIZE) * token_stride
        pointers = keys_ptr + tokens[:, None] + columns[None, :]
        k = tl.load(pointers, mask=inside[:, None], other=0.0)
        v = tl.load(pointers + values_offset, mask=inside[:, None], other=0.0)
        if WIDE:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :] <= positions[:, None], scores, float("-inf"))
        largest = tl.maximum(m, tl.max(scores, 1))
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(m - shift)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        m = largest
    return m, total, acc


@triton.jit
def _join(
    acc_ptr, stats_ptr, out_ptr, gate_ptr, first_child, children, parent, is_root,
    first_row, end_row, first_token, kv_head, scratch_rows, gate_stride, gate_head_stride, HQ,
    G: tl.constexpr, D: tl.constexpr, HAS_GATE: tl.constexpr, FAN: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Join the children's partials into the parent's, or into the result. BJ rows at a time, all children at once."""
    child = tl.arange(0, FAN)
    nodes, present = first_child + child, child < children
    columns = tl.arange(0, D)
    for first in tl.range(first_row, end_row, BJ, num_stages=2):
        rows = first + tl.arange(0, BJ)
        valid = rows < end_row
        mask = present[:, None] & valid[None, :]
        stats = stats_ptr + nodes[:, None] * 2 * scratch_rows + rows[None, :]
        places = nodes[:, None] * scratch_rows + rows[None, :]
        m = tl.load(stats, mask=mask, other=float("-inf"))
        total = tl.load(stats + scratch_rows, mask=mask, other=0.0)
        acc = tl.load(
            acc_ptr + (places[:, :, None] * D + columns[None, None, :]), mask=mask[:, :, None], other=0.0
        )  # fmt: skip
        largest = tl.max(m, 0)
        factor = tl.exp2(m - tl.where(largest == float("-inf"), 0.0, largest)[None, :])
        total = tl.sum(total * factor, 0)
        acc = tl.sum(acc * factor[:, :, None], 0)
        if is_root:
            divisor = tl.where(valid, total, 1.0)
            _write_rows(
                out_ptr, gate_ptr, acc / divisor[:, None], rows, valid, first_token, kv_head,
                gate_stride, gate_head_stride, HQ, G, D, HAS_GATE,
            )  # fmt: skip
        else:
            _store_partial(acc_ptr, stats_ptr, largest, total, acc, parent, rows, valid, scratch_rows, D)


@triton.jit
def _store_partial(acc_ptr, stats_ptr, m, total, acc, node, rows, valid, scratch_rows, D: tl.constexpr):
    stats = stats_ptr + node * 2 * scratch_rows + rows
    tl.store(stats, m, mask=valid)
    tl.store(stats + scratch_rows, total, mask=valid)
    places = (node * scratch_rows + rows) * D
    tl.store(acc_ptr + (places[:, None] + tl.arange(0, D)[None, :]), acc, mask=valid[:, None])


@triton.jit
def _load_rows(q_ptr, rows, first_token, T, kv_head, HQ, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    heads = (first_token + rows // G) * HQ + kv_head * G + rows % G
    q = tl.load(
        q_ptr + heads[:, None] * D + tl.arange(0, D)[None, :], mask=(rows < T * G)[:, None], other=0.0
    )  # fmt: skip
    if WIDE:
        q = q.to(tl.float32)
    return q


@triton.jit
def _write_rows(
    out_ptr, gate_ptr, out, rows, valid, first_token, kv_head, gate_stride, gate_head_stride, HQ,
    G: tl.constexpr, D: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """out [rows, D] float32, rounded before the gate and after, and so is sigmoid(gate): as torch does."""
    columns = tl.arange(0, D)
    tokens, heads = first_token + rows // G, kv_head * G + rows % G
    mask = valid[:, None]
    dtype = out_ptr.dtype.element_ty
    out = out.to(dtype)
    if HAS_GATE:
        gates = gate_ptr + (tokens * gate_stride + heads * gate_head_stride)[:, None] + columns[None, :]
        gate = tl.sigmoid(tl.load(gates, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        out = (out.to(tl.float32) * gate.to(tl.float32)).to(dtype)
    tl.store(out_ptr + (tokens * HQ + heads)[:, None] * D + columns[None, :], out, mask=mask)
