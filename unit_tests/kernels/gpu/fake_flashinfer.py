"""A stand-in for FlashInfer 0.6.12 on a CPU: what we call of it, with its arguments' names, defaults and demands.

What its documentation says is computed token by token and checked where its kernels would read something else.
"""

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def install(patch: pytest.MonkeyPatch) -> ModuleType:
    """Make `import flashinfer` give the stand-in. Its `calls` are (name, arguments, keyword arguments), in order."""
    module: Any = ModuleType("flashinfer")
    module.calls = []

    class Wrapper(_Wrapper):
        def __init__(self, *args: Any, **kwargs: Any):
            module.calls.append(("__init__", args, kwargs))
            super().__init__(*args, **kwargs)

        def plan(self, *args: Any, **kwargs: Any) -> None:
            module.calls.append(("plan", args, kwargs))
            super().plan(*args, **kwargs)

        def run(self, *args: Any, **kwargs: Any) -> Tensor:
            module.calls.append(("run", args, kwargs))
            return super().run(*args, **kwargs)

    def delta_rule(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        module.calls.append(("chunk_gated_delta_rule", args, kwargs))
        return _chunk_gated_delta_rule(*args, **kwargs)

    module.BatchPrefillWithPagedKVCacheWrapper, module.chunk_gated_delta_rule = Wrapper, delta_rule
    patch.setitem(sys.modules, "flashinfer", module)
    return module


class _Wrapper:
    """BatchPrefillWithPagedKVCacheWrapper: causal attention whose last query stands at the last key."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD"):
        assert float_workspace_buffer.dtype == torch.uint8 and len(float_workspace_buffer) >= 128 * 2**20
        assert kv_layout == "NHD"

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        q_data_type: torch.dtype = torch.float16,
    ) -> None:
        index = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in index)
        self.query_starts, self.page_starts, self.pages, self.last_lens = (tensor.tolist() for tensor in index)
        assert self.query_starts[0] == self.page_starts[0] == 0 and self.page_starts[-1] == len(self.pages)
        assert len(self.query_starts) == len(self.page_starts) == len(self.last_lens) + 1
        assert all(1 <= length <= page_size for length in self.last_lens)
        assert causal and num_qo_heads % num_kv_heads == 0
        self.shape, self.dtype = (num_qo_heads, num_kv_heads, head_dim_qk, page_size), q_data_type

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        num_heads, num_kv_heads, dim, page_size = self.shape
        assert isinstance(paged_kv_cache, tuple)
        keys, values = paged_kv_cache
        assert q.shape == out.shape == (self.query_starts[-1], num_heads, dim) and q.is_contiguous()
        assert keys.shape[1:] == values.shape[1:] == (page_size, num_kv_heads, dim)
        assert keys.stride() == values.stride() and keys.stride(-1) == 1
        assert q.dtype == keys.dtype == values.dtype == out.dtype == self.dtype
        for request, last_len in enumerate(self.last_lens):
            first, end = self.query_starts[request : request + 2]
            pages = self.pages[slice(*self.page_starts[request : request + 2])]
            length = (len(pages) - 1) * page_size + last_len
            k, v = (
                x[pages].flatten(0, 1)[:length].repeat_interleave(num_heads // num_kv_heads, 1) for x in (keys, values)
            )
            scores = torch.einsum("qhd,khd->hqk", q[first:end], k) / math.sqrt(dim)
            seen = torch.ones(end - first, length, dtype=torch.bool).tril(length - (end - first))
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[first:end] = torch.einsum("hqk,khd->qhd", weights, v)
        return out


def _chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """chunk_gated_delta_rule: g is α itself, states are [B, HV, DV, DK], q and k are taken as they are."""
    assert g is not None and beta is not None and scale and initial_state is not None and output_final_state
    assert cu_seqlens is not None and cu_seqlens.dtype == torch.int64
    num_tokens, num_heads, value_dim = v.shape
    assert q.dtype == k.dtype == v.dtype and q.shape == k.shape and len(q) == num_tokens
    assert g.shape == beta.shape == (num_tokens, num_heads) and g.dtype == beta.dtype == torch.float32
    assert initial_state.shape == (len(cu_seqlens) - 1, num_heads, value_dim, q.shape[2])
    assert initial_state.dtype == torch.float32
    assert all(x.is_contiguous() for x in (q, k, v, g, beta, cu_seqlens, initial_state))
    assert (g >= 0).all() and (g <= 1).all(), "α, not log α"
    ratio = num_heads // q.shape[1]
    q, k = (x.float().repeat_interleave(ratio, dim=1) for x in (q, k))
    out, states = torch.empty_like(v), initial_state.clone()
    for request, (first, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
        S = states[request]  # a view
        for t in range(first, end):
            S *= g[t, :, None, None]
            u = beta[t, :, None] * (v[t].float() - torch.einsum("hvk,hk->hv", S, k[t]))
            S += u[:, :, None] * k[t, :, None]
            out[t] = scale * torch.einsum("hvk,hk->hv", S, q[t])
    return out, states
