"""Causal grouped-query attention: over whole sequences, and over paged keys and values.

N tokens of B requests, HQ query heads, HKV key-value heads (query head h uses key-value head h // (HQ/HKV)), D head
dimension, P pages of a request. Softmax in float32 or wider inside torch's scaled_dot_product_attention.
"""

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


def paged_attention(q: Tensor, kv: Tensor, page_table: Tensor, mask: Tensor) -> Tensor:
    """Attend q [B · T, HQ, D] to the paged cache, which already holds the tokens' own keys and values.

    kv [2, pages, page_size, HKV, D]; page_table [B, P] int64; mask [B, 1, T, S] bool: which of the S <= P · page_size
    first positions of its request each token sees. Returns [B · T, HQ, D].
    """
    (batch, _, num_tokens, length), (num_kv_heads, dim) = mask.shape, kv.shape[3:]
    page_size, group = kv.shape[2], q.shape[1] // num_kv_heads
    pages = page_table[:, : -(-length // page_size)].flatten()
    keys, values = (x.index_select(0, pages).view(batch, -1, num_kv_heads, dim)[:, :length].transpose(1, 2) for x in kv)
    q = q.view(batch, num_tokens, num_kv_heads, group, dim)
    if num_tokens == 1:
        out = F.scaled_dot_product_attention(q[:, 0], keys, values, attn_mask=mask)  # the group is the query axis
        return out.view(batch, num_kv_heads * group, dim)
    q = q.permute(0, 2, 3, 1, 4).flatten(1, 2)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).reshape(batch * num_tokens, num_kv_heads * group, dim)
