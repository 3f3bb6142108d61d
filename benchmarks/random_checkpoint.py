"""Random checkpoints with the dimensions of a preset, for speed only: the weights mean nothing.

Written shape by shape from `config.json` fields, so that Tandem and its peers load the very same files.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = Iterator[tuple[str, tuple[int, ...]]]

# In all published sizes heads of attention have 256 dimensions, and delta nets 16 key heads, of 128 dimensions.
_PUBLISHED: dict[str, Any] = {
    "vocab_size": 248320,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "dtype": "bfloat16",
}
_PUBLISHED_MOE = {**_PUBLISHED, "num_experts": 256, "num_experts_per_tok": 8, "num_key_value_heads": 2}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 8,
        "vocab_size": 4096,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "dtype": "float32",
    },
    "0.8B": {
        **_PUBLISHED,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "intermediate_size": 3584,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "linear_num_value_heads": 16,
    },
}

# Of these only config.json is needed as a rule: their weights are made on the device (`load_format="dummy"`).
OTHER_PRESETS: dict[str, dict[str, Any]] = {
    "tiny-moe": {
        **{name: value for name, value in PRESETS["tiny"].items() if name != "intermediate_size"},
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
    },
    "2B": {
        **_PUBLISHED,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "intermediate_size": 6144,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "linear_num_value_heads": 16,
    },
    "4B": {
        **_PUBLISHED,
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "intermediate_size": 9216,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "linear_num_value_heads": 32,
    },
    "9B": {
        **_PUBLISHED,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 12288,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "linear_num_value_heads": 32,
        "tie_word_embeddings": False,
    },
    "27B": {
        **_PUBLISHED,
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "intermediate_size": 17408,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "linear_num_value_heads": 48,
        "tie_word_embeddings": False,
    },
    "35B-A3B": {
        **_PUBLISHED_MOE,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_attention_heads": 16,
        "linear_num_value_heads": 32,
        "tie_word_embeddings": False,
    },
    "122B-A10B": {
        **_PUBLISHED_MOE,
        "hidden_size": 3072,
        "num_hidden_layers": 48,
        "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
        "num_attention_heads": 32,
        "linear_num_value_heads": 64,
        "tie_word_embeddings": False,
    },
    "397B-A17B": {
        **_PUBLISHED_MOE,
        "hidden_size": 4096,
        "num_hidden_layers": 60,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
        "num_attention_heads": 32,
        "linear_num_value_heads": 64,
        "tie_word_embeddings": False,
    },
}


def write_random_checkpoint(directory: Path, preset: str) -> None:
    """A text-only checkpoint with one MTP layer in `directory`: config.json and model.safetensors."""
    config = make_config(preset)
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, config["dtype"])
    tensors = {name: _draw(name, shape, dtype, generator) for name, shape in _shapes(config)}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def make_config(preset: str) -> dict[str, Any]:
    """The config.json object of a preset, with one MTP layer; all that `load_format="dummy"` needs."""
    sizes = {**PRESETS, **OTHER_PRESETS}[preset]
    is_moe = "num_experts" in sizes
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    rope |= {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    return {
        "architectures": ["Qwen3_5MoeForCausalLM" if is_moe else "Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_moe_text" if is_moe else "qwen3_5_text",
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 262144,
        "mtp_num_hidden_layers": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        **sizes,
    }


def count_weights(config: dict[str, Any], has_mtp: bool = False) -> int:
    """Numbers in a text-only checkpoint, with or without its MTP layer."""
    return sum(math.prod(shape) for name, shape in _shapes(config) if has_mtp or not name.startswith("mtp."))


def writing_bytes(config: dict[str, Any]) -> int:
    """The most memory that `write_random_checkpoint` takes: all weights, and the largest one drawn in float32."""
    largest = max(math.prod(shape) for _, shape in _shapes(config))
    return count_weights(config, has_mtp=True) * getattr(torch, config["dtype"]).itemsize + 2 * 4 * largest


def _draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape, dtype=dtype)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)


def _shapes(config: dict[str, Any]) -> Shapes:
    hidden, interval = config["hidden_size"], config["full_attention_interval"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        yield from _layer(f"model.layers.{layer}", config, is_full=(layer + 1) % interval == 0)
    yield "mtp.fc.weight", (hidden, 2 * hidden)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        yield f"mtp.{name}.weight", (hidden,)
    yield from _layer("mtp.layers.0", config, is_full=True)


def _layer(prefix: str, config: dict[str, Any], is_full: bool) -> Shapes:
    hidden = config["hidden_size"]
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield from _attention(f"{prefix}.self_attn", config) if is_full else _delta_net(f"{prefix}.linear_attn", config)
    yield from (
        _experts(f"{prefix}.mlp", config)
        if "num_experts" in config
        else _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
    )


def _mlp(prefix: str, hidden: int, size: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (size, hidden)
    yield f"{prefix}.up_proj.weight", (size, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, size)


def _experts(prefix: str, config: dict[str, Any]) -> Shapes:
    hidden, count, size = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    yield f"{prefix}.gate.weight", (count, hidden)
    yield f"{prefix}.experts.gate_up_proj", (count, 2 * size, hidden)
    yield f"{prefix}.experts.down_proj", (count, hidden, size)
    yield from _mlp(f"{prefix}.shared_expert", hidden, config["shared_expert_intermediate_size"])
    yield f"{prefix}.shared_expert_gate.weight", (1, hidden)


def _attention(prefix: str, config: dict[str, Any]) -> Shapes:
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield f"{prefix}.q_proj.weight", (2 * heads * dim, hidden)
    yield f"{prefix}.k_proj.weight", (kv_heads * dim, hidden)
    yield f"{prefix}.v_proj.weight", (kv_heads * dim, hidden)
    yield f"{prefix}.o_proj.weight", (hidden, heads * dim)
    yield f"{prefix}.q_norm.weight", (dim,)
    yield f"{prefix}.k_norm.weight", (dim,)


def _delta_net(prefix: str, config: dict[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    value_size = heads * config["linear_value_head_dim"]
    channels = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"] + value_size
    yield f"{prefix}.in_proj_qkv.weight", (channels, hidden)
    yield f"{prefix}.in_proj_z.weight", (value_size, hidden)
    yield f"{prefix}.in_proj_b.weight", (heads, hidden)
    yield f"{prefix}.in_proj_a.weight", (heads, hidden)
    yield f"{prefix}.conv1d.weight", (channels, 1, config["linear_conv_kernel_dim"])
    yield f"{prefix}.A_log", (heads,)
    yield f"{prefix}.dt_bias", (heads,)
    yield f"{prefix}.norm.weight", (config["linear_value_head_dim"],)
    yield f"{prefix}.out_proj.weight", (hidden, value_size)
