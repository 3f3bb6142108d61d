"""What Megatron is told about a checkpoint."""

import json
from pathlib import Path
from typing import Any

from models.config import ModelConfig

LOSS_SCALING_FACTOR = 0.1


def describe_for_megatron(config: ModelConfig) -> dict[str, Any]:
    """The arguments under which Megatron builds this model; the MTP ones only if there is a head."""
    settings: dict[str, Any] = {
        "num_layers": len(config.layer_types),
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "qk_layernorm": True,
        "attention_output_gate": True,
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(kind == "linear_attention") for kind in config.layer_types],
        "linear_num_key_heads": config.delta_key_heads,
        "linear_num_value_heads": config.delta_value_heads,
        "linear_key_head_dim": config.delta_key_dim,
        "linear_value_head_dim": config.delta_value_dim,
        "linear_conv_kernel_dim": config.conv_width,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "rotary_percent": config.rotary_dim / config.head_dim,
        "rotary_base": config.rope_theta,
        "vocab_size": config.vocab_size,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
        "hetereogenous_dist_checkpoint": True,
    }
    return settings | _describe_feed_forward(config) | _describe_head(config)


def save_settings(path: Path, config: ModelConfig, norms: str) -> None:
    """Write `describe_for_megatron` as JSON."""
    settings = describe_for_megatron(config) | {"layernorm_zero_centered_gamma": norms == "zero_centred"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _describe_feed_forward(config: ModelConfig) -> dict[str, Any]:
    if not config.is_moe:
        return {"ffn_hidden_size": config.intermediate_size}
    return {
        "num_moe_experts": config.num_experts,
        "moe_router_topk": config.experts_per_token,
        "moe_ffn_hidden_size": config.expert_size,
        "moe_shared_expert_intermediate_size": config.shared_expert_size,
        "moe_shared_expert_gate": True,
    }


def _describe_head(config: ModelConfig) -> dict[str, Any]:
    if not config.num_mtp_layers:
        return {}
    return {"mtp_num_layers": config.num_mtp_layers, "mtp_loss_scaling_factor": LOSS_SCALING_FACTOR}
