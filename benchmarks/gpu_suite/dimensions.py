"""The sizes of a model that kernels and rooflines are counted with, from a config.json object."""

from dataclasses import dataclass
from typing import Any

from benchmarks.random_checkpoint import make_config


@dataclass(frozen=True)
class Dimensions:
    """H hidden, L_delta and L_full layers, HQ / HKV heads of D, HK / HV delta heads of DK / DV, W taps, V vocabulary.
    Dense models have no experts; MoE models have intermediate_size 0."""

    hidden: int
    num_delta_layers: int
    num_full_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    vocab: int
    intermediate: int = 0
    experts: int = 0
    chosen: int = 0
    expert_size: int = 0
    shared_size: int = 0

    @property
    def num_layers(self) -> int:
        return self.num_delta_layers + self.num_full_layers

    @property
    def channels(self) -> int:
        """Of the convolution: all query, key and value heads of a delta-net layer."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def value_size(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def delta_projection(self) -> int:
        """Rows of a delta-net layer's input projection: qkv | z | b | a."""
        return self.channels + self.value_size + 2 * self.value_heads

    @property
    def attention_projection(self) -> int:
        """Rows of an attention layer's input projection: (query | gate) of each head, keys, values."""
        return 2 * (self.heads + self.kv_heads) * self.head_dim


def parse_dimensions(config: dict[str, Any]) -> Dimensions:
    """Of a text-only config.json object, as benchmarks.random_checkpoint makes them."""
    num_layers, interval = config["num_hidden_layers"], config["full_attention_interval"]
    return Dimensions(
        hidden=config["hidden_size"],
        num_delta_layers=num_layers - num_layers // interval,
        num_full_layers=num_layers // interval,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        rotary_dim=int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"]),
        key_heads=config["linear_num_key_heads"],
        value_heads=config["linear_num_value_heads"],
        key_dim=config["linear_key_head_dim"],
        value_dim=config["linear_value_head_dim"],
        taps=config["linear_conv_kernel_dim"],
        vocab=config["vocab_size"],
        intermediate=config.get("intermediate_size", 0),
        experts=config.get("num_experts", 0),
        chosen=config.get("num_experts_per_tok", 0),
        expert_size=config.get("moe_intermediate_size", 0),
        shared_size=config.get("shared_expert_intermediate_size", 0),
    )


def dimensions_of(preset: str) -> Dimensions:
    """The sizes of a preset of benchmarks.random_checkpoint."""
    return parse_dimensions(make_config(preset))
