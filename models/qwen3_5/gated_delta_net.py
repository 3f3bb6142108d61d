"""Qwen3.5's Gated DeltaNet layer: convolution, gated delta rule, gated norm.

B requests, T tokens each, HK key heads, HV value heads, DK / DV their dimensions, C = 2·HK·DK + HV·DV channels.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_cached
from kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_prefill, gated_delta_rule_verify
from kernels.rms_norm import gated_rms_norm, l2_norm
from models.config import ModelConfig
from models.forward_batch import CacheView, ForwardBatch
from models.layers.linear import Linear, StackedLinear
from models.weight_slot import WeightSlot


class GatedDeltaNet(nn.Module):
    """x [N, H] -> [N, H]. `layer` is the index in the GDN cache."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        self.layer, self.eps = layer, config.rms_norm_eps
        self.key_heads, self.value_heads = config.delta_key_heads, config.delta_value_heads
        self.key_dim, self.value_dim = config.delta_key_dim, config.delta_value_dim
        value_size = self.value_heads * self.value_dim
        channels = config.conv_channels
        parts = {
            "in_proj_qkv": channels,
            "in_proj_z": value_size,
            "in_proj_b": self.value_heads,
            "in_proj_a": self.value_heads,
        }
        wide = torch.promote_types(dtype, torch.float32)
        self.in_proj = StackedLinear(config.hidden_size, parts, dtype)
        self.conv_weight = nn.Parameter(torch.empty(channels, config.conv_width, dtype=dtype))
        self.A_log = nn.Parameter(torch.empty(self.value_heads, dtype=wide))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads, dtype=wide))
        self.norm_weight = nn.Parameter(torch.empty(self.value_dim, dtype=wide))
        self.out = Linear(value_size, config.hidden_size, dtype)

    def forward(self, x: Tensor, forward: ForwardBatch) -> Tensor:
        qkv, z, b, a = self.in_proj(x)
        beta = b.to(self.A_log.dtype).sigmoid()
        log_alpha = -self.A_log.exp() * F.softplus(a + self.dt_bias)
        mixed = self._mix(qkv, log_alpha, beta, forward)
        z = z.unflatten(-1, (self.value_heads, self.value_dim))
        return self.out(gated_rms_norm(mixed, z, self.norm_weight, self.eps).flatten(-2))

    def _mix(self, qkv: Tensor, log_alpha: Tensor, beta: Tensor, forward: ForwardBatch) -> Tensor:
        """The sequence mixing [N, HV, DV], per group of requests with equally many tokens."""
        batch = len(forward.query_lens)
        if forward.is_uniform:
            parts = (x.unflatten(0, (batch, -1)) for x in (qkv, log_alpha, beta))
            return self._mix_uniform(*parts, forward.view, slice(None)).flatten(0, 1)
        return torch.cat(
            [
                self._mix_uniform(qkv[None, span], log_alpha[None, span], beta[None, span], forward.view, only)[0]
                for only, span in ((slice(index, index + 1), span) for index, span in forward.spans())
            ]
        )

    def _mix_uniform(
        self, qkv: Tensor, log_alpha: Tensor, beta: Tensor, view: CacheView | None, which: slice
    ) -> Tensor:
        """qkv [B, T, C], log_alpha, beta [B, T, HV] of the requests `which` -> [B, T, HV, DV]."""
        if view is None:
            return gated_delta_rule(*self._split(causal_conv1d(qkv, self.conv_weight)), log_alpha, beta)
        rows, start_lens = view.rows[which], view.start_lens[which]
        gdn, layer = view.cache.gdn, self.layer
        qkv = causal_conv1d_cached(qkv, self.conv_weight, gdn.conv_ring[layer], rows, start_lens)
        rule = gated_delta_rule_verify if view.is_verify else gated_delta_rule_prefill
        state, ring = gdn.state[layer], gdn.layer_ring(layer)
        return rule(*self._split(qkv), log_alpha, beta, state, ring, rows, start_lens, view.accept_lens[which])

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Convolved channels [B, T, C] -> normed, scaled q and k [B, T, HK, DK] and v [B, T, HV, DV], wide."""
        qk_size = 2 * self.key_heads * self.key_dim
        qk, v = qkv.to(self.A_log.dtype).split([qk_size, qkv.shape[-1] - qk_size], dim=-1)
        q, k = l2_norm(qk.unflatten(-1, (2, self.key_heads, self.key_dim))).unbind(-3)
        return q * self.key_dim**-0.5, k, v.unflatten(-1, (self.value_heads, self.value_dim))

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.in_proj.weight_slots(prefix)
        channels, width = self.conv_weight.shape
        yield WeightSlot(f"{prefix}.conv1d.weight", self.conv_weight, shape=(channels, 1, width))
        yield WeightSlot(f"{prefix}.A_log", self.A_log)
        yield WeightSlot(f"{prefix}.dt_bias", self.dt_bias)
        yield WeightSlot(f"{prefix}.norm.weight", self.norm_weight)
        yield from self.out.weight_slots(f"{prefix}.out_proj")
