"""Causal grouped-query attention: over whole sequences, and over paged keys and values.

N tokens of B requests, HQ query heads, HKV key-value heads (query head h uses key-value head h // (HQ/HKV)), D head
dimension, P pages of a request. Softmax in float32 or wider inside torch's scaled_dot_product_attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Whole sequences: q [B, T, HQ, D], k, v [B, T, HKV, D] -> [B, T, HQ, D]. Differentiable."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def store_kv(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    """Write k, v [N, HKV, D] to slots [N] int64 (page · page_size + offset) of kv [2, pages, page_size, HKV, D]."""
    kv[0].flatten(0, 1)[slots] = k
    kv[1].flatten(0, 1)[slots] = v


def paged_attention(q: Tensor, kv: Tensor, page_table: Tensor, positions: Tensor, query_lens: tuple[int, ...]) -> Tensor:
    """Attend q [N, HQ, D] to the paged cache; the token at position p sees slots of positions 0..p of its request.

    kv [2, pages, page_size, HKV, D] already holds the tokens' own keys and values; page_table [B, P] int64 covers the
    longest request; positions [N] int64; query_lens are the B requests' token counts, in order. Returns [N, HQ, D].
    """
    if len(set(query_lens)) == 1:
        return _attend(q, kv, page_table, positions.view(len(query_lens), -1))
    parts, start = [], 0
    for request, query_len in enumerate(query_lens):
        part = slice(start, start + query_len)
        parts.append(_attend(q[part], kv, page_table[request : request + 1], positions[None, part]))
        start += query_len
    return torch.cat(parts)


def _attend(q: Tensor, kv: Tensor, page_table: Tensor, positions: Tensor) -> Tensor:
    """Requests with T tokens each: q [B·T, HQ, D], positions [B, T]."""
    num_requests, num_tokens = positions.shape
    page_size, num_kv_heads, dim = kv.shape[2:]
    group = q.shape[1] // num_kv_heads
    longest = int(positions[:, -1].max()) + 1
    pages = page_table[:, : -(-longest // page_size)]
    keys, values = (x[pages].flatten(1, 2)[:, :longest].transpose(1, 2) for x in kv)
    q = q.view(num_requests, num_tokens, num_kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    mask = torch.arange(longest, device=q.device) <= positions[:, None, None, :, None]
    mask = mask.expand(-1, 1, group, -1, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(q.flatten(2, 3), keys, values, attn_mask=mask)
    out = out.view(num_requests, num_kv_heads, group, num_tokens, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(num_requests * num_tokens, num_kv_heads * group, dim)
