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
from models.forward_batch import ForwardBatch
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
        z = z.view(-1, self.value_heads, self.value_dim)
        return self.out(gated_rms_norm(mixed, z, self.norm_weight, self.eps).flatten(-2))

    def _mix(self, qkv: Tensor, log_alpha: Tensor, beta: Tensor, forward: ForwardBatch) -> Tensor:
        """The sequence mixing: qkv [N, C], log_alpha, beta [N, HV] -> [N, HV, DV]."""
        mixed = []
        for span, part in forward.parts:
            u, g, b = (x[span].view(part.num_requests, -1, x.shape[-1]) for x in (qkv, log_alpha, beta))
            mixed.append(self._mix_part(u, g, b, part).flatten(0, 1))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _mix_part(self, qkv: Tensor, log_alpha: Tensor, beta: Tensor, part: ForwardBatch) -> Tensor:
        """Requests with T tokens each: qkv [B, T, C], log_alpha, beta [B, T, HV] -> [B, T, HV, DV]."""
        conv_weight = self.conv_weight.to(self.A_log.dtype)
        if part.view is None:
            return gated_delta_rule(*self._split(causal_conv1d(qkv, conv_weight)), log_alpha, beta)
        gdn, layer = part.view.cache.gdn, self.layer
        q, k, v = self._split(causal_conv1d_cached(qkv, conv_weight, gdn.conv_ring[layer], *part.conv_slots))
        memory = (gdn.state[layer], gdn.layer_ring(layer), part.view.fold)
        if part.view.is_verify:
            return gated_delta_rule_verify(q, k, v, log_alpha, beta, *memory, part.delta_slots)
        return gated_delta_rule_prefill(q, k, v, log_alpha, beta, *memory)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Convolved channels [B, T, C] -> normed, scaled q and k [B, T, HK, DK] and v [B, T, HV, DV], wide."""
        qk_size = 2 * self.key_heads * self.key_dim
        qk, v = qkv.split([qk_size, qkv.shape[-1] - qk_size], dim=-1)
        q, k = l2_norm(qk.reshape(*qk.shape[:2], 2, self.key_heads, self.key_dim)).unbind(2)
        return q * self.key_dim**-0.5, k, v.view(*v.shape[:2], self.value_heads, self.value_dim)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.in_proj.weight_slots(prefix)
        channels, width = self.conv_weight.shape
        yield WeightSlot(f"{prefix}.conv1d.weight", self.conv_weight, shape=(channels, 1, width))
        yield WeightSlot(f"{prefix}.A_log", self.A_log)
        yield WeightSlot(f"{prefix}.dt_bias", self.dt_bias)
        yield WeightSlot(f"{prefix}.norm.weight", self.norm_weight)
        yield from self.out.weight_slots(f"{prefix}.out_proj")
