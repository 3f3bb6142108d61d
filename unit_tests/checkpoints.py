"""Tiny random Qwen3.5 checkpoints in Hugging Face's layout, built without a network.

The values depend on the seed and a tensor's name alone: the same model comes out for every prefix, expert layout and
number of shards, so one layout can be the oracle of another. The sizes are chosen to show mistakes: dk != dv, more
value than key heads, more query than key-value heads, and a rotary part that is a quarter of the head.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INTERMEDIATE = 64, 96
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 32
DELTA_KEY_HEADS, DELTA_VALUE_HEADS, DELTA_KEY_DIM, DELTA_VALUE_DIM = 2, 6, 16, 24
NUM_EXPERTS, EXPERTS_PER_TOKEN, EXPERT_SIZE, SHARED_EXPERT_SIZE = 8, 3, 24, 40

ENDOFTEXT, IM_START, IM_END, THINK, END_THINK = 256, 257, 258, 263, 264
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
TOKENIZER_SIZE = 256 + len(SPECIAL_TOKENS) + len(PLAIN_TOKENS)

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{{- '<think>\\n' if enable_thinking is defined and enable_thinking else '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}"""

_PREFIXES = {
    "text": ("model.", ""),
    "vl": ("model.language_model.", ""),
    "language_model.model": ("language_model.model.", "language_model."),
}


def make_checkpoint(
    directory: str | Path,
    *,
    moe: bool = False,
    expert_layout: str = "fused",
    prefix: str = "text",
    tied: str = "outer",
    mtp_layers: int = 1,
    shards: int = 1,
    dtype: str = "float32",
    vocab_size: int = 320,
    num_layers: int = 8,
    seed: int = 0,
    vision: bool = False,
    close_draft: bool = False,
) -> Path:
    """Write a checkpoint directory and return its path.

    expert_layout: "fused", "per_expert" or "mixed" (even layers fused, odd layers and the draft per expert). prefix:
    "text", "vl" or "language_model.model"; the last two nest the text fields in config.json. tied: "outer", "inner"
    (the flag stands in text_config; without nesting the two are one) or "no". vision adds `model.visual.*` tensors.
    close_draft makes the MTP head guess right about half of the time along a greedy continuation.

    Token ids below 256 are bytes; a vocabulary smaller than TOKENIZER_SIZE lacks some of the tokenizer's ids.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    config = make_config(
        moe=moe,
        nested=prefix != "text",
        tied=tied,
        mtp_layers=mtp_layers,
        dtype=dtype,
        vocab_size=vocab_size,
        num_layers=num_layers,
    )
    tensors = make_tensors(config, seed=seed, close_draft=close_draft)
    tensors = dict(_split_experts(tensors, expert_layout))
    tensors = {_prefixed(name, prefix): tensor for name, tensor in tensors.items()}
    if vision:
        tensors |= _vision_tensors(getattr(torch, dtype))
    write_json(path / "config.json", config)
    write_json(path / "generation_config.json", {"eos_token_id": [IM_END, ENDOFTEXT], "pad_token_id": ENDOFTEXT})
    write_weights(path, tensors, shards)
    write_tokenizer(path)
    return path


def make_config(
    *,
    moe: bool = False,
    nested: bool = False,
    tied: str = "outer",
    mtp_layers: int = 1,
    dtype: str = "float32",
    vocab_size: int = 320,
    num_layers: int = 8,
) -> dict[str, Any]:
    """The config.json object, spelled and nested as Hugging Face does."""
    family = "Qwen3_5Moe" if moe else "Qwen3_5"
    model_type = "qwen3_5_moe" if moe else "qwen3_5"
    text = _text_fields(moe, mtp_layers, dtype, vocab_size, num_layers) | {"model_type": f"{model_type}_text"}
    if not nested:
        return text | {"architectures": [f"{family}ForCausalLM"], "tie_word_embeddings": tied != "no"}
    outer: dict[str, Any] = {
        "architectures": [f"{family}ForConditionalGeneration"],
        "model_type": model_type,
        "image_token_id": vocab_size - 4,
        "video_token_id": vocab_size - 3,
        "vision_start_token_id": vocab_size - 2,
        "vision_end_token_id": vocab_size - 1,
        "vision_config": _vision_fields(model_type),
    }
    if tied == "inner":
        text["tie_word_embeddings"] = True
    else:
        outer["tie_word_embeddings"] = tied == "outer"
    return outer | {"text_config": text}


def _text_fields(moe: bool, mtp_layers: int, dtype: str, vocab_size: int, num_layers: int) -> dict[str, Any]:
    types = ["linear_attention" if (layer + 1) % 4 else "full_attention" for layer in range(num_layers)]
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "linear_num_key_heads": DELTA_KEY_HEADS,
        "linear_num_value_heads": DELTA_VALUE_HEADS,
        "linear_key_head_dim": DELTA_KEY_DIM,
        "linear_value_head_dim": DELTA_VALUE_DIM,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "layer_types": types,
        "attn_output_gate": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": mtp_layers,
        "mtp_use_dedicated_embeddings": False,
        "dtype": dtype,
        "eos_token_id": ENDOFTEXT,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    }
    if not moe:
        return fields | {"intermediate_size": INTERMEDIATE}
    return fields | {
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "moe_intermediate_size": EXPERT_SIZE,
        "shared_expert_intermediate_size": SHARED_EXPERT_SIZE,
    }


def _vision_fields(model_type: str) -> dict[str, Any]:
    return {
        "model_type": f"{model_type}_vision",
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": HIDDEN,
    }


def make_tensors(config: dict[str, Any], *, seed: int = 0, close_draft: bool = False) -> dict[str, Tensor]:
    """All weights under the text-only prefix, experts fused, in the config's dtype."""
    text = config.get("text_config", config)
    dtype = getattr(torch, text["dtype"])
    is_tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    shapes = dict(_shapes(text))
    if is_tied:
        del shapes["lm_head.weight"]
    tensors = {name: _draw(name, shape, seed) for name, shape in shapes.items()}
    if close_draft:
        _bring_draft_close(tensors)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _shapes(text: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    is_moe = "num_experts" in text
    yield "model.embed_tokens.weight", (text["vocab_size"], HIDDEN)
    yield "lm_head.weight", (text["vocab_size"], HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    for layer, kind in enumerate(text["layer_types"]):
        yield from _layer_shapes(f"model.layers.{layer}", kind, is_moe)
    if text["mtp_num_hidden_layers"]:
        yield "mtp.fc.weight", (HIDDEN, 2 * HIDDEN)
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            yield f"mtp.{name}.weight", (HIDDEN,)
    for layer in range(text["mtp_num_hidden_layers"]):
        yield from _layer_shapes(f"mtp.layers.{layer}", "full_attention", is_moe)


def _layer_shapes(layer: str, kind: str, is_moe: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{layer}.input_layernorm.weight", (HIDDEN,)
    yield f"{layer}.post_attention_layernorm.weight", (HIDDEN,)
    yield from _attention_shapes(layer + ".self_attn") if kind == "full_attention" else _delta_shapes(layer)
    yield from _moe_shapes(layer + ".mlp") if is_moe else _mlp_shapes(layer + ".mlp", INTERMEDIATE)


def _attention_shapes(prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.q_proj.weight", (2 * NUM_HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}.k_proj.weight", (NUM_KV_HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}.v_proj.weight", (NUM_KV_HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}.o_proj.weight", (HIDDEN, NUM_HEADS * HEAD_DIM)
    yield f"{prefix}.q_norm.weight", (HEAD_DIM,)
    yield f"{prefix}.k_norm.weight", (HEAD_DIM,)


def _delta_shapes(layer: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix, value_size = layer + ".linear_attn", DELTA_VALUE_HEADS * DELTA_VALUE_DIM
    channels = 2 * DELTA_KEY_HEADS * DELTA_KEY_DIM + value_size
    yield f"{prefix}.in_proj_qkv.weight", (channels, HIDDEN)
    yield f"{prefix}.in_proj_z.weight", (value_size, HIDDEN)
    yield f"{prefix}.in_proj_b.weight", (DELTA_VALUE_HEADS, HIDDEN)
    yield f"{prefix}.in_proj_a.weight", (DELTA_VALUE_HEADS, HIDDEN)
    yield f"{prefix}.conv1d.weight", (channels, 1, 4)
    yield f"{prefix}.A_log", (DELTA_VALUE_HEADS,)
    yield f"{prefix}.dt_bias", (DELTA_VALUE_HEADS,)
    yield f"{prefix}.norm.weight", (DELTA_VALUE_DIM,)
    yield f"{prefix}.out_proj.weight", (HIDDEN, value_size)


def _mlp_shapes(prefix: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (size, HIDDEN)
    yield f"{prefix}.up_proj.weight", (size, HIDDEN)
    yield f"{prefix}.down_proj.weight", (HIDDEN, size)


def _moe_shapes(prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate.weight", (NUM_EXPERTS, HIDDEN)
    yield f"{prefix}.experts.gate_up_proj", (NUM_EXPERTS, 2 * EXPERT_SIZE, HIDDEN)
    yield f"{prefix}.experts.down_proj", (NUM_EXPERTS, HIDDEN, EXPERT_SIZE)
    yield from _mlp_shapes(f"{prefix}.shared_expert", SHARED_EXPERT_SIZE)
    yield f"{prefix}.shared_expert_gate.weight", (1, HIDDEN)


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random values in float64 from (seed, name). Every parameter differs from its neutral value.

    What writes to the residual stream is scaled down, which keeps rounding differences from growing with the depth.
    """
    source = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    normal = torch.randn(shape, generator=source, dtype=torch.float64)
    uniform = torch.rand(shape, generator=source, dtype=torch.float64)
    if name.endswith("A_log"):
        return (0.02 + 8 * uniform**3).log()  # decays from almost 1 to almost 0 per token
    if name.endswith("dt_bias"):
        return 4 * uniform - 3
    if name.endswith("linear_attn.norm.weight"):
        return 0.5 + uniform
    if name in ("model.norm.weight", "mtp.norm.weight"):
        return 2 * uniform - 2  # scales of both signs: a tied head would otherwise repeat its input
    if name.endswith("norm.weight") or "layernorm" in name or ".pre_fc_norm" in name:
        return uniform - 0.5
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return 0.3 * normal
    if name.endswith("conv1d.weight"):
        return 0.5 * normal
    gain = 0.1 if _writes_to_residual(name) else 1.0
    return gain * shape[-1] ** -0.5 * normal


def _writes_to_residual(name: str) -> bool:
    return any(part in name for part in ("o_proj", "out_proj", "down_proj"))


def _bring_draft_close(tensors: dict[str, Tensor]) -> None:
    """Make the state of target and draft mostly the embedding of the newest token."""
    for name in filter(_writes_to_residual, tensors):
        tensors[name] *= 0.5
    mix = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], dim=1)
    tensors["mtp.fc.weight"] = 0.3 * mix.double() + 0.1 * tensors["mtp.fc.weight"]
    tensors["mtp.pre_fc_norm_embedding.weight"] *= 0.1
    tensors["mtp.norm.weight"] = tensors["model.norm.weight"] + 0.1 * tensors["mtp.pre_fc_norm_hidden.weight"]


def _split_experts(tensors: dict[str, Tensor], layout: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if ".experts." in name and _is_split(name, layout):
            yield from _per_expert(name, tensor)
        else:
            yield name, tensor


def _is_split(name: str, layout: str) -> bool:
    if layout == "mixed":
        return name.startswith("mtp.") or int(name.split(".")[2]) % 2 == 1
    return layout == "per_expert"


def _per_expert(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    stem, matrix = name.rsplit(".", 1)
    for expert, weight in enumerate(tensor):
        if matrix == "down_proj":
            yield f"{stem}.{expert}.down_proj.weight", weight
        else:
            gate, up = weight.chunk(2)
            yield f"{stem}.{expert}.gate_proj.weight", gate
            yield f"{stem}.{expert}.up_proj.weight", up


def _prefixed(name: str, prefix: str) -> str:
    body, head = _PREFIXES[prefix]
    return body + name.removeprefix("model.") if name.startswith("model.") else head + name


def _vision_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {
        "patch_embed.proj.weight": (16, 3, 2, 16, 16),
        "patch_embed.proj.bias": (16,),
        "blocks.0.attn.qkv.weight": (48, 16),
    }
    return {f"model.visual.{name}": torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


def write_weights(directory: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """model.safetensors, or with several shards the numbered files and their index."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": weight_map},
    )


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: ids 0..255 are the bytes, then the named tokens; and a ChatML template."""
    alphabet = _byte_alphabet()
    model = tokenizers.models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=False) for token in PLAIN_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
    write_json(directory / "tokenizer_config.json", names)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level BPE: printable Latin-1 as it is, the others from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as an indented JSON file."""
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
