"""Qwen3.5's Gated DeltaNet layer: convolution, gated delta rule, gated norm.

B requests, T tokens each, HK key heads, HV value heads, DK / DV their dimensions, C = 2·HK·DK + HV·DV channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.gated_delta_net import (
    DeltaNetMemory,
    DeltaNetShape,
    DeltaNetWeights,
    gated_delta_net_prefill,
    gated_delta_net_sequence,
    gated_delta_net_verify,
)
from kernels.quantized_linear import Weight
from models.cache import GDNCache
from models.config import ModelConfig
from models.forward_batch import ForwardBatch
from models.layers.linear import Linear, StackedLinear
from models.weight_slot import WeightSlot


class GatedDeltaNet(nn.Module):
    """x [N, H] -> [N, H]. `layer` is the index in the GDN cache. All but the projections is kept float32 or wider."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        self.layer, self.eps = layer, config.rms_norm_eps
        self.shape = DeltaNetShape(
            config.delta_key_heads, config.delta_value_heads, config.delta_key_dim, config.delta_value_dim
        )
        channels, heads = config.conv_channels, config.delta_value_heads
        value_size = heads * config.delta_value_dim
        parts = {"in_proj_qkv": channels, "in_proj_z": value_size, "in_proj_b": heads, "in_proj_a": heads}
        wide = torch.promote_types(dtype, torch.float32)
        self.in_proj = StackedLinear(config.hidden_size, parts, dtype)
        self.conv_weight = nn.Parameter(torch.empty(channels, config.conv_width, dtype=wide))
        self.A_log = nn.Parameter(torch.empty(heads, dtype=wide))
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=wide))
        self.norm_weight = nn.Parameter(torch.empty(config.delta_value_dim, dtype=wide))
        self.out = Linear(value_size, config.hidden_size, dtype)

    def forward(self, x: Tensor, forward: ForwardBatch) -> Tensor:
        projected = self.in_proj.forward_stacked(x)
        weights = DeltaNetWeights(self.conv_weight, self.A_log, self.dt_bias, self.norm_weight, self.eps)
        view = forward.view
        if view is not None and view.cache.backends.gdn != "torch":
            return self.out(self._mix_gpu(projected, weights, forward))
        mixed = [self._mix(projected[span], weights, part) for span, part in forward.parts]
        return self.out(mixed[0] if len(mixed) == 1 else torch.cat(mixed))

    def _mix(self, projected: Tensor, weights: DeltaNetWeights, part: ForwardBatch) -> Tensor:
        """Requests with equally many tokens, between the projections: [B · T, ...] -> [B · T, HV · DV]."""
        view = part.view
        memory = None if view is None else self._memory(view.cache.gdn)
        if memory is not None and view is not None and view.is_verify:
            return gated_delta_net_verify(projected, self.shape, weights, memory, part.verify_place)
        by_request = projected.view(part.num_requests, -1, projected.shape[-1])
        if memory is None or view is None:
            return gated_delta_net_sequence(by_request, self.shape, weights)
        return gated_delta_net_prefill(by_request, self.shape, weights, memory, part.conv_slots, view.fold)

    def _mix_gpu(self, projected: Tensor, weights: DeltaNetWeights, forward: ForwardBatch) -> Tensor:
        """All requests, between the projections: [N, ...] -> [N, HV · DV]."""
        from kernels.gpu.gated_delta_net import gated_delta_net_prefill as prefill
        from kernels.gpu.gated_delta_net import gated_delta_net_verify as verify

        view = forward.view
        assert view is not None
        memory = self._memory(view.cache.gdn)
        if not view.is_verify:
            ends = (forward.query_starts, max(forward.query_lens))
            if view.cache.backends.gdn == "flashinfer":
                from kernels.gpu.flashinfer import gated_delta_rule_prefill

                return prefill(projected, self.shape, weights, memory, view.stand, *ends, gated_delta_rule_prefill)
            return prefill(projected, self.shape, weights, memory, view.stand, *ends)
        mixed = [
            verify(projected[span], self.shape, weights, memory, part.view.stand)
            for span, part in forward.parts
            if part.view is not None
        ]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _memory(self, gdn: GDNCache) -> DeltaNetMemory:
        layer = self.layer
        return DeltaNetMemory(gdn.conv_ring[layer], gdn.state[layer], gdn.layer_ring(layer))

    def kernel_weights(self) -> dict[str, Weight]:
        """By the names of kernels/cpu/decoder.py."""
        inner = {"conv": self.conv_weight, "a_log": self.A_log, "dt_bias": self.dt_bias, "delta_norm": self.norm_weight}
        return {"in_proj": self.in_proj.weight, "out_proj": self.out.weight, **inner}

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Checkpoint tensors of this layer."""
        yield from self.in_proj.weight_slots(prefix)
        channels, width = self.conv_weight.shape
        yield WeightSlot(f"{prefix}.conv1d.weight", self.conv_weight, shape=(channels, 1, width))
        yield WeightSlot(f"{prefix}.A_log", self.A_log)
        yield WeightSlot(f"{prefix}.dt_bias", self.dt_bias)
        yield WeightSlot(f"{prefix}.norm.weight", self.norm_weight)
        yield from self.out.weight_slots(f"{prefix}.out_proj")
