"""How Megatron arranges the rows of a weight that Hugging Face arranges in another way. Tensors only, no names.

n query heads, g key-value heads (groups), per = n / g, d head size, H hidden size, F feed-forward size.
Source: megatron-core 0.16.1, whose own files are the fixtures of the tests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def keep(tensor: Tensor) -> Tensor:
    """Weights that are the same on both sides, `eh_proj` = `mtp.fc` among them: columns [embedding, hidden]."""
    return tensor


def join_qkv(q: Tensor, k: Tensor, v: Tensor, num_groups: int, head_dim: int) -> Tensor:
    """q [2 n d, H] (each head: d query, then d gate rows), k and v [g d, H] -> [(2 n + 2 g) d, H].

    Megatron's rows, for each group: its query heads, their gates, its key, its value.
    """
    queries = q.unflatten(0, (num_groups, -1, 2, head_dim)).transpose(1, 2).flatten(1, 3)
    keys, values = k.unflatten(0, (num_groups, head_dim)), v.unflatten(0, (num_groups, head_dim))
    return torch.cat([queries, keys, values], dim=1).flatten(0, 1)


def split_qkv(qkv: Tensor, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of join_qkv."""
    groups = qkv.unflatten(0, (num_groups, -1, head_dim))
    queries, keys, values = groups[:, :-2], groups[:, -2], groups[:, -1]
    q = queries.unflatten(1, (2, -1)).transpose(1, 2).flatten(0, 3)
    return q.contiguous(), keys.flatten(0, 1).contiguous(), values.flatten(0, 1).contiguous()


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """[gate; up], or a delta net's [q, k, v; z; b; a]: one below the other."""
    return torch.cat(list(parts))


def split_rows(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The inverse of join_rows."""
    return [part.contiguous() for part in tensor.split(list(sizes))]


def shift(weight: Tensor, by: int) -> Tensor:
    """weight + by in the narrowest dtype, from its own up, from which `unshift` brings back the same weight.

    A zero-centred norm and a ones-based one differ by 1; in bfloat16 only a quarter of such weights survives the way.
    Where not even float64 has the digits (a weight next to 0) the sum is rounded to float32.
    """
    moved = weight.double() + by
    for dtype in (weight.dtype, torch.float32, torch.float64):
        if torch.equal(unshift(moved.to(dtype), by, weight.dtype), weight):
            return moved.to(dtype)
    return moved.float()


def unshift(weight: Tensor, by: int, dtype: torch.dtype) -> Tensor:
    """The inverse of shift, rounded to `dtype` once."""
    return (weight.double() - by).to(dtype)


def shard(tensor: Tensor, rank: int, num_ranks: int, axis: int, blocks: Sequence[int]) -> Tensor:
    """What one tensor-parallel rank holds: its share of each block (sizes along `axis`), one after the other."""
    parts = (block.chunk(num_ranks, axis)[rank] for block in tensor.split(list(blocks), axis))
    return torch.cat(list(parts), axis)


def merge(shards: Sequence[Tensor], axis: int, blocks: Sequence[int]) -> Tensor:
    """The inverse of shard, for all ranks' tensors in order."""
    sizes = [size // len(shards) for size in blocks]
    parts = zip(*(shard.split(sizes, axis) for shard in shards), strict=True)
    return torch.cat([piece for block in parts for piece in block], axis)
