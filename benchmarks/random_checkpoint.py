"""Random checkpoints with the dimensions of a preset, for speed only: the weights mean nothing.

Written shape by shape from `config.json` fields, so that Tandem and its peers load the very same files.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = Iterator[tuple[str, tuple[int, ...]]]

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
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "vocab_size": 248320,
        "intermediate_size": 3584,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "dtype": "bfloat16",
    },
}


def write_random_checkpoint(directory: Path, preset: str) -> None:
    """A text-only, tied, dense checkpoint with one MTP layer in `directory`: config.json and model.safetensors."""
    config = _config(PRESETS[preset])
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, config["dtype"])
    tensors = {name: _draw(name, shape, dtype, generator) for name, shape in _shapes(config)}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _config(sizes: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    rope |= {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 32768,
        "mtp_num_hidden_layers": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        **sizes,
    }


def _draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape, dtype=dtype)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)


def _shapes(config: dict[str, Any]) -> Shapes:
    hidden, interval = config["hidden_size"], config["full_attention_interval"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        yield from _layer(f"model.layers.{layer}", config, is_full=(layer + 1) % interval == 0)
    yield "mtp.fc.weight", (hidden, 2 * hidden)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        yield f"mtp.{name}.weight", (hidden,)
    yield from _layer("mtp.layers.0", config, is_full=True)


def _layer(prefix: str, config: dict[str, Any], is_full: bool) -> Shapes:
    hidden, size = config["hidden_size"], config["intermediate_size"]
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield from _attention(f"{prefix}.self_attn", config) if is_full else _delta_net(f"{prefix}.linear_attn", config)
    yield f"{prefix}.mlp.gate_proj.weight", (size, hidden)
    yield f"{prefix}.mlp.up_proj.weight", (size, hidden)
    yield f"{prefix}.mlp.down_proj.weight", (hidden, size)


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
