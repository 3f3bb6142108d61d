"""Triton kernels of kernels/moe.py: route, sort by expert, two grouped products, sum.

A pair is a token with one of its choices: pair p is choice p % k of token p // k. `order` lists the pairs by expert,
and `offsets` says where each expert's begin. Both stay on the device: the grids of the products have room for the worst
routing, and a program without work returns.

N tokens, E experts, k choices per token, P = N·k pairs, I expert width, H hidden size.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.dispatch import is_interpreted
from kernels.gpu.launch import num_warps_for, power_of_two

MAX_DECODE_TOKENS = 1024  # up to here one tile shape, so that a token has the same bits in every batch
MAX_COUNTED_PAIRS = 8192  # the most that a program of _sort_kernel holds in registers


def route(router_logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """The k best experts of each token, best first, ties to the lowest id, and the softmax over their logits.

    router_logits [N, E] (bfloat16 or float32, rows may be strided) -> weights [N, k] float32, experts [N, k] int64.
    A row of NaN gives NaN weights and valid experts.
    """
    num_tokens, num_experts = router_logits.shape
    weights = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=router_logits.device)
    experts = torch.empty(num_tokens, num_chosen, dtype=torch.int64, device=router_logits.device)
    if num_tokens:
        block = power_of_two(num_experts)
        _route_kernel[(num_tokens,)](
            router_logits, weights, experts, router_logits.stride(0), num_experts,
            NUM_CHOSEN=num_chosen, BLOCK_K=power_of_two(num_chosen), BLOCK_E=block, num_warps=num_warps_for(block),
        )  # fmt: skip
    return weights, experts


def run_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, shared: Tensor, shared_gate: Tensor
) -> Tensor:
    """`Σ_k weight_k · SwiGLU_{expert_k}(x) + sigmoid(shared_gate) · shared`, summed in float32, choice by choice.

    x [N, H]; gate_up [E, 2I, H] (gate rows first); down [E, H, I]; weights (float32), experts (int64) [N, k]; shared
    [N, H]; shared_gate [N, 1] logits, rows may be strided; all else contiguous. Returns [N, H] in x's dtype. Up to
    MAX_DECODE_TOKENS tokens the bits of a token do not depend on the others.
    """
    num_tokens, hidden = x.shape
    num_chosen, num_experts = experts.shape[1], len(gate_up)
    out = torch.empty_like(x)
    if not num_tokens:
        return out
    order, offsets = sort_pairs(experts, num_experts)
    parts = _run_pairs(x, gate_up, down, order, offsets, num_chosen)
    block = min(1024, power_of_two(hidden))
    _combine_kernel[(num_tokens, triton.cdiv(hidden, block))](
        parts, weights, shared, shared_gate, out, shared_gate.stride(0), hidden,
        NUM_CHOSEN=num_chosen, BLOCK=block, num_warps=num_warps_for(block),
    )  # fmt: skip
    return out


def sort_pairs(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """experts [N, k] -> order [P], the pairs by expert and then by number; offsets [E + 1] into it. Both int64.

    Up to MAX_COUNTED_PAIRS one launch.
    """
    flat = experts.flatten()
    if flat.numel() > MAX_COUNTED_PAIRS:
        values, order = torch.sort(flat, stable=True)
        return order, torch.searchsorted(values, torch.arange(num_experts + 1, device=flat.device))
    order, offsets = torch.empty_like(flat), torch.empty(num_experts + 1, dtype=flat.dtype, device=flat.device)
    block = power_of_two(max(128, flat.numel()))
    _sort_kernel[(num_experts + 1,)](
        flat, order, offsets, flat.numel(), num_experts, BLOCK=block, num_warps=num_warps_for(block)
    )
    return order, offsets


class _Tile(NamedTuple):
    """What a program of a grouped product works on: pairs, rows of the weight, and columns of both at a time."""

    num_pairs: int
    num_rows: int
    num_columns: int
    num_warps: int
    num_stages: int


def _choose_tile(num_tokens: int, dtype: torch.dtype) -> _Tile:
    """A decode step reads a weight for a pair or two: a stage carries few pairs, and 16 KiB of weights. In a long
    prefill a weight serves many pairs. float32 has no exact tensor core; it is there to be compared with."""
    if dtype == torch.float32:
        return _Tile(16, 64, 64, num_warps=4, num_stages=3)
    if num_tokens <= MAX_DECODE_TOKENS:
        return _Tile(16, 64, 128, num_warps=4, num_stages=4)
    return _Tile(128, 128, 32, num_warps=8, num_stages=4)


def _run_pairs(x: Tensor, gate_up: Tensor, down: Tensor, order: Tensor, offsets: Tensor, num_chosen: int) -> Tensor:
    """What each pair's expert makes of its token: [P, H], in the order of the pairs."""
    (num_pairs,), (num_experts, hidden, size) = order.shape, down.shape
    inner = torch.empty(num_pairs, size, dtype=x.dtype, device=x.device)
    parts = torch.empty(num_pairs, hidden, dtype=x.dtype, device=x.device)
    tile = _choose_tile(len(x), x.dtype)
    num_tiles = min(num_pairs, num_pairs // tile.num_pairs + num_experts)
    block_i = tile.num_rows // 2  # of gate, and as many of up
    for_both = {
        "num_experts": num_experts, "SIZE": size, "HIDDEN": hidden, "BLOCK_E": power_of_two(num_experts),
        "BLOCK_P": tile.num_pairs, "BLOCK_C": tile.num_columns, "WIDE": is_interpreted(),
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    _gate_up_kernel[(num_tiles, triton.cdiv(size, block_i))](
        x, gate_up, order, offsets, inner, NUM_CHOSEN=num_chosen, BLOCK_I=block_i, **for_both
    )
    _down_kernel[(num_tiles, triton.cdiv(hidden, tile.num_rows))](
        inner, down, order, offsets, parts, BLOCK_H=tile.num_rows, **for_both
    )
    return parts


@triton.jit
def _route_kernel(
    logits_ptr, weights_ptr, experts_ptr, logits_stride, num_experts,
    NUM_CHOSEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns, choices = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    logits = tl.load(logits_ptr + row * logits_stride + columns, mask=columns < num_experts, other=float("-inf"))
    logits = logits.to(tl.float32)
    # A comparison with NaN is false: it could make the best a column beyond E.
    logits = tl.where(logits == logits, logits, float("-inf"))
    chosen = tl.full([BLOCK_K], float("-inf"), tl.float32)
    experts = tl.zeros([BLOCK_K], tl.int32)
    for choice in tl.static_range(NUM_CHOSEN):
        best, expert = tl.max(logits, 0, return_indices=True, return_indices_tie_break_left=True)
        chosen = tl.where(choices == choice, best, chosen)
        experts = tl.where(choices == choice, expert, experts)
        logits = tl.where(columns == expert, float("-inf"), logits)
    weights = tl.exp(chosen - tl.max(chosen, 0))
    weights = weights / tl.sum(weights, 0)
    pairs, mask = row * NUM_CHOSEN + choices, choices < NUM_CHOSEN
    tl.store(weights_ptr + pairs, weights, mask=mask)
    tl.store(experts_ptr + pairs, experts.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["num_pairs"])
def _sort_kernel(
    experts_ptr, order_ptr, offsets_ptr, num_pairs, num_experts, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per expert, which finds its pairs and how many pairs come before; the last one, E, has none."""
    expert = tl.program_id(0)
    pairs = tl.arange(0, BLOCK)
    mask = pairs < num_pairs
    experts = tl.load(experts_ptr + pairs, mask=mask, other=num_experts).to(tl.int32)
    num_before = tl.sum((experts < expert).to(tl.int32), 0)
    mine = mask & (experts == expert)
    places = num_before + tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(order_ptr + places, pairs.to(tl.int64), mask=mine)
    tl.store(offsets_ptr + expert, num_before.to(tl.int64))


@triton.jit
def _find_places(offsets_ptr, num_experts, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):
    """The program's expert, and the first place and the limit of its pairs in `order`; 0, 0, 0 where there is none."""
    tile = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    mask = experts < num_experts
    first = tl.load(offsets_ptr + experts, mask=mask, other=0).to(tl.int32)
    limit = tl.load(offsets_ptr + experts + 1, mask=mask, other=0).to(tl.int32)
    num_tiles = tl.cdiv(limit - first, BLOCK_P)
    num_before = tl.cumsum(num_tiles, 0) - num_tiles
    mine = (num_before <= tile) & (tile < num_before + num_tiles)
    expert = tl.sum(tl.where(mine, experts, 0), 0)
    begin = tl.sum(tl.where(mine, first + (tile - num_before) * BLOCK_P, 0), 0)
    return expert, begin, tl.sum(tl.where(mine, limit, 0), 0)


@triton.jit
def _gate_up_kernel(
    x_ptr, gate_up_ptr, order_ptr, offsets_ptr, inner_ptr, num_experts,
    NUM_CHOSEN: tl.constexpr, SIZE: tl.constexpr, HIDDEN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """inner[place] = silu(gate · x) · (up · x) of the pair at that place of the order."""
    expert, begin, limit = _find_places(offsets_ptr, num_experts, BLOCK_E, BLOCK_P)
    if begin >= limit:
        return
    places = begin + tl.arange(0, BLOCK_P)
    has_pair = places < limit
    tokens = tl.load(order_ptr + places, mask=has_pair, other=0) // NUM_CHOSEN
    rows = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    columns = tl.arange(0, BLOCK_C)
    has_row = rows < SIZE
    x_ptrs = x_ptr + tokens[:, None] * HIDDEN + columns[None, :]
    gate_ptrs = gate_up_ptr + expert.to(tl.int64) * (2 * SIZE * HIDDEN) + rows[None, :] * HIDDEN + columns[:, None]
    gate = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    up = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)
    for column in range(0, HIDDEN, BLOCK_C):
        has_column = column + columns < HIDDEN
        weight_mask = has_column[:, None] & has_row[None, :]
        x = tl.load(x_ptrs + column, mask=has_pair[:, None] & has_column[None, :], other=0.0)
        gate_weight = tl.load(gate_ptrs + column, mask=weight_mask, other=0.0)
        up_weight = tl.load(gate_ptrs + SIZE * HIDDEN + column, mask=weight_mask, other=0.0)
        if WIDE:
            x, gate_weight, up_weight = x.to(tl.float32), gate_weight.to(tl.float32), up_weight.to(tl.float32)
        gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
        up = tl.dot(x, up_weight, up, input_precision="ieee")
    # Rounded wherever the law has a tensor.
    dtype = inner_ptr.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    inner = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up
    inner_ptrs = inner_ptr + places.to(tl.int64)[:, None] * SIZE + rows[None, :]
    tl.store(inner_ptrs, inner.to(dtype), mask=has_pair[:, None] & has_row[None, :])


@triton.jit
def _down_kernel(
    inner_ptr, down_ptr, order_ptr, offsets_ptr, parts_ptr, num_experts,
    SIZE: tl.constexpr, HIDDEN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """parts[pair] = down · inner[place], from the order of the experts back to that of the pairs."""
    expert, begin, limit = _find_places(offsets_ptr, num_experts, BLOCK_E, BLOCK_P)
    if begin >= limit:
        return
    places = begin + tl.arange(0, BLOCK_P)
    has_pair = places < limit
    pairs = tl.load(order_ptr + places, mask=has_pair, other=0)
    rows = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = tl.arange(0, BLOCK_C)
    has_row = rows < HIDDEN
    inner_ptrs = inner_ptr + places.to(tl.int64)[:, None] * SIZE + columns[None, :]
    down_ptrs = down_ptr + expert.to(tl.int64) * (HIDDEN * SIZE) + rows[None, :] * SIZE + columns[:, None]
    part = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
    for column in range(0, SIZE, BLOCK_C):
        has_column = column + columns < SIZE
        inner = tl.load(inner_ptrs + column, mask=has_pair[:, None] & has_column[None, :], other=0.0)
        weight = tl.load(down_ptrs + column, mask=has_column[:, None] & has_row[None, :], other=0.0)
        if WIDE:
            inner, weight = inner.to(tl.float32), weight.to(tl.float32)
        part = tl.dot(inner, weight, part, input_precision="ieee")
    parts_ptrs = parts_ptr + pairs[:, None] * HIDDEN + rows[None, :]
    tl.store(parts_ptrs, part.to(parts_ptr.dtype.element_ty), mask=has_pair[:, None] & has_row[None, :])


@triton.jit
def _combine_kernel(
    parts_ptr, weights_ptr, shared_ptr, shared_gate_ptr, out_ptr, gate_stride, hidden,
    NUM_CHOSEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = Σ_choice weight · part + sigmoid(shared_gate) · shared, for some columns of a token."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(NUM_CHOSEN):
        pair = row * NUM_CHOSEN + choice
        part = tl.load(parts_ptr + pair * hidden + columns, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(weights_ptr + pair) * part
    gate = tl.load(shared_gate_ptr + row * gate_stride).to(tl.float32)
    shared = tl.load(shared_ptr + row * hidden + columns, mask=mask, other=0.0).to(tl.float32)
    total += tl.sigmoid(gate) * shared
    tl.store(out_ptr + row * hidden + columns, total.to(out_ptr.dtype.element_ty), mask=mask)
