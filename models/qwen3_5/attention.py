"""Qwen3.5's full-attention layer: grouped queries, q/k norm, partial rotary, sigmoid output gate.

N tokens, HQ query heads, HKV key-value heads, D head dimension.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.attention import causal_attention, paged_attention, store_kv
from kernels.linear import linear
from kernels.quantized_linear import QuantizedWeight, Weight
from kernels.rotary import norm_rope_store, norm_rotary
from models.config import ModelConfig
from models.forward_batch import ForwardBatch
from models.layers.linear import Linear, StackedLinear
from models.layers.norm import RMSNorm
from models.weight_slot import WeightSlot

Rotary = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """x [N, H] -> [N, H]. `layer` is the index in the KV cache."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        parts = {"q_proj": 2 * self.num_heads * self.head_dim, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv = StackedLinear(config.hidden_size, parts, dtype)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
        self.out = Linear(self.num_heads * self.head_dim, config.hidden_size, dtype)

    def forward(self, x: Tensor, forward: ForwardBatch, rotary: Rotary) -> Tensor:
        if forward.view is not None and forward.view.cache.backends.attention != "torch":
            return self.out(self._attend_gpu(self.qkv.forward_stacked(x), forward, rotary))
        q_gate, k, v = self.qkv(x)
        q, gate = q_gate.view(-1, self.num_heads, 2 * self.head_dim).chunk(2, dim=-1)  # [N, HQ, D] each
        k, v = (part.view(-1, self.num_kv_heads, self.head_dim) for part in (k, v))  # [N, HKV, D] each
        q = norm_rotary(q, self.q_norm.scale, self.q_norm.eps, *rotary)
        k = norm_rotary(k, self.k_norm.scale, self.k_norm.eps, *rotary)
        out = self._attend(q, k, v, forward) * gate.sigmoid()
        return self.out(out.flatten(-2))

    def store_keys(self, x: Tensor, forward: ForwardBatch, rotary: Rotary) -> None:
        """Keys and values of x [N, H] to the cache, and nothing else of the layer."""
        assert forward.view is not None
        kv, num_query_columns = forward.view.cache.kv.data[self.layer], self.qkv.parts["q_proj"]
        weight = self.qkv.weight
        if isinstance(weight, QuantizedWeight):
            keys_values = linear(x, weight.outputs(num_query_columns, weight.out_size))
        else:
            keys_values = linear(x, weight[num_query_columns:])
        scales = (self.q_norm.scale, self.k_norm.scale, self.k_norm.eps)
        norm_rope_store(keys_values, *scales, *rotary, kv, forward.kv_slots)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, forward: ForwardBatch) -> Tensor:
        view = forward.view
        if view is None:
            q, k, v = (x.view(forward.num_requests, -1, *x.shape[1:]) for x in (q, k, v))
            return causal_attention(q, k, v).flatten(0, 1)
        kv = view.cache.kv.data[self.layer]
        store_kv(k, v, kv, forward.kv_slots)
        out = [
            paged_attention(q[span], kv, part.view.page_table, part.positions.view(part.num_requests, -1))
            for span, part in forward.parts
            if part.view is not None
        ]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _attend_gpu(self, qkv: Tensor, forward: ForwardBatch, rotary: Rotary) -> Tensor:
        """From the projection [N, ...] to what the output projection reads, [N, HQ · D]."""
        from kernels.gpu.attention import prefill_attention, verify_attention

        view, (q_norm, k_norm) = forward.view, (self.q_norm, self.k_norm)
        assert view is not None and view.cache.scratch is not None
        kv = view.cache.kv.data[self.layer]
        q = norm_rope_store(qkv, q_norm.scale, k_norm.scale, q_norm.eps, *rotary, kv, forward.kv_slots)
        gate = qkv[:, : q[0].numel() * 2].unflatten(1, (self.num_heads, -1))[..., self.head_dim :]
        if not view.is_verify and view.cache.planner is not None and forward.page_spans is not None:
            from kernels.gpu.flashinfer import prefill_attention as planned_attention

            return planned_attention(q, kv, forward.page_spans, gate, view.cache.planner).flatten(1)
        if not view.is_verify:
            where = (view.page_table, view.start_lens, forward.query_starts, max(forward.query_lens))
            return prefill_attention(q, kv, *where, gate).flatten(1)
        out = [
            verify_attention(
                q[span], kv, part.view.page_table, part.view.start_lens, gate[span], view.cache.scratch
            ).flatten(1)
            for span, part in forward.parts
            if part.view is not None
        ]
        return out[0] if len(out) == 1 else torch.cat(out)

    def kernel_weights(self) -> dict[str, Weight]:
        """By the names of kernels/cpu/decoder.py."""
        norms = {"q_norm": self.q_norm.scale, "k_norm": self.k_norm.scale}
        return {"in_proj": self.qkv.weight, "out_proj": self.out.weight, **norms}

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.qkv.weight_slots(prefix)
        yield from self.q_norm.weight_slots(f"{prefix}.q_norm")
        yield from self.k_norm.weight_slots(f"{prefix}.k_norm")
        yield from self.out.weight_slots(f"{prefix}.o_proj")
