"""Causal grouped-query attention: over whole sequences, and over paged keys and values.

N tokens of B requests, HQ query heads, HKV key-value heads (query head h uses key-value head h // (HQ/HKV)), D head
dimension, P pages of a request. Softmax in float32 or wider inside torch's scaled_dot_product_attention.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.library import load_library

_MAX_TOKENS = 16
_FUNCTIONS = {
    torch.bfloat16: "attention_bfloat16",
    torch.float32: "attention_float32",
    torch.float64: "attention_float64",
}
_PARALLEL_ELEMENTS = 2**15


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Whole sequences: q [B, T, HQ, D], k, v [B, T, HKV, D] -> [B, T, HQ, D]. Differentiable."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def store_kv(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    """Write k, v [N, HKV, D] to slots [N] int64 (page · page_size + offset) of kv [2, pages, page_size, HKV, D]."""
    kv[0].flatten(0, 1)[slots] = k
    kv[1].flatten(0, 1)[slots] = v


def paged_attention(q: Tensor, kv: Tensor, page_table: Tensor, positions: Tensor) -> Tensor:
    """Attend q [B · T, HQ, D] to the paged cache, which already holds the tokens' own keys and values.

    kv [2, pages, page_size, HKV, D]; page_table [B, P] int64 covers every position; positions [B, T] int64: the token
    at position p sees positions 0..p of its request. Returns [B · T, HQ, D]. On a CPU a few tokens per request take the
    kernel in kernels/cpu, whose sums do not depend on the other tokens.
    """
    library = load_library() if q.device.type == "cpu" and positions.shape[1] <= _MAX_TOKENS else None
    if library is None or kv.dtype not in _FUNCTIONS:
        return paged_attention_torch(q, kv, page_table, positions)
    return _paged_attention_cpp(library, q, kv, page_table, positions)


def paged_attention_torch(q: Tensor, kv: Tensor, page_table: Tensor, positions: Tensor) -> Tensor:
    """The law: see `paged_attention`."""
    batch, num_tokens = positions.shape
    longest = int(positions.max()) + 1
    mask = torch.arange(longest, device=q.device) <= positions[:, None, :, None]  # [B, 1, T, longest]
    page_size, num_kv_heads, dim = kv.shape[2:]
    group = q.shape[1] // num_kv_heads
    pages = page_table[:, : -(-longest // page_size)].flatten()
    keys, values = (
        x.index_select(0, pages).view(batch, -1, num_kv_heads, dim)[:, :longest].transpose(1, 2) for x in kv
    )
    ends = positions.amax(1)
    if int(ends.min()) + 1 < longest:  # a slot that is not written yet may hold a NaN, which no weight of 0 takes away
        is_unwritten = torch.arange(longest, device=q.device)[None, None, :, None] > ends[:, None, None, None]
        keys, values = keys.masked_fill(is_unwritten, 0), values.masked_fill(is_unwritten, 0)
    q = q.view(batch, num_tokens, num_kv_heads * group, dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).reshape(batch * num_tokens, num_kv_heads * group, dim)


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim", "pages", "page_size", "table_width")]


def _paged_attention_cpp(library: ctypes.CDLL, q: Tensor, kv: Tensor, page_table: Tensor, positions: Tensor) -> Tensor:
    inputs = q.to(torch.promote_types(q.dtype, torch.float32)).contiguous()
    table, positions, out = page_table.contiguous(), positions.contiguous(), torch.empty_like(inputs)
    (batch, num_tokens), (_, num_pages, page_size, num_kv_heads, dim) = positions.shape, kv.shape
    sizes = _Sizes(q.shape[1], num_kv_heads, dim, num_pages, page_size, table.shape[1])
    getattr(library, _FUNCTIONS[kv.dtype])(
        ctypes.byref(sizes),
        batch,
        num_tokens,
        inputs.data_ptr(),
        kv.data_ptr(),
        table.data_ptr(),
        positions.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads() if inputs.numel() * page_size >= _PARALLEL_ELEMENTS else 1,
    )
    return out.to(q.dtype)
