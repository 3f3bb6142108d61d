"""config.json -> ModelConfig: the numbers a Qwen3.5 checkpoint is built from, checked and under one spelling.

Vision-language checkpoints nest the text fields under `text_config`; text-only exports have them at the top level.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import CheckpointError

SUPPORTED = {
    "Qwen3_5ForConditionalGeneration": False,
    "Qwen3_5ForCausalLM": False,
    "Qwen3_5MoeForConditionalGeneration": True,
    "Qwen3_5MoeForCausalLM": True,
}
# Names of one number, the layers of the draft head: Hugging Face's, Megatron's, DeepSeek's and transformers' own.
MTP_COUNTS = ("mtp_num_hidden_layers", "mtp_num_layers", "num_nextn_predict_layers", "num_mtp_layers")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of one checkpoint. Dense models have num_experts 0; MoE models have intermediate_size 0."""

    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    delta_key_heads: int
    delta_value_heads: int
    delta_key_dim: int
    delta_value_dim: int
    conv_width: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    intermediate_size: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    num_mtp_layers: int = 0

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def num_full_layers(self) -> int:
        return self.layer_types.count("full_attention")

    @property
    def num_delta_layers(self) -> int:
        return self.layer_types.count("linear_attention")

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: all query, key and value heads of a delta-net layer."""
        return 2 * self.delta_key_heads * self.delta_key_dim + self.delta_value_heads * self.delta_value_dim


def load_config(directory: str | Path) -> ModelConfig:
    """Read `directory/config.json`. Raises CheckpointError naming the file, the field and what is supported."""
    return parse_config(read_json(Path(directory) / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError when it is missing, unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: --model must be a Hugging Face checkpoint directory") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, a JSON object is needed")
    return value


def parse_config(outer: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json object. Raises CheckpointError for another family or a missing or odd field."""
    is_moe = _is_moe(outer)
    text = _Fields(outer.get("text_config", outer))
    rope = _Fields({**text.object("rope_scaling"), **text.object("rope_parameters")})
    head_dim = text.size("head_dim", 256)
    factor = rope.number("partial_rotary_factor", text.number("partial_rotary_factor", 0.25))
    config = ModelConfig(
        vocab_size=text.size("vocab_size"),
        hidden_size=text.size("hidden_size"),
        layer_types=_layer_types(text),
        num_heads=text.size("num_attention_heads"),
        num_kv_heads=text.size("num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=int(head_dim * factor),
        rope_theta=rope.number("rope_theta", text.number("rope_theta", 1e7)),
        delta_key_heads=text.size("linear_num_key_heads"),
        delta_value_heads=text.size("linear_num_value_heads"),
        delta_key_dim=text.size("linear_key_head_dim"),
        delta_value_dim=text.size("linear_value_head_dim"),
        conv_width=text.size("linear_conv_kernel_dim", 4),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        max_position_embeddings=text.size("max_position_embeddings", 262144),
        tie_word_embeddings=_is_tied(outer, text),
        dtype=str(text.get("dtype", text.get("torch_dtype", outer.get("dtype", "bfloat16")))),
        intermediate_size=0 if is_moe else text.size("intermediate_size"),
        num_experts=text.size("num_experts") if is_moe else 0,
        experts_per_token=text.size("num_experts_per_tok") if is_moe else 0,
        expert_size=text.size("moe_intermediate_size") if is_moe else 0,
        shared_expert_size=text.size("shared_expert_intermediate_size") if is_moe else 0,
        num_mtp_layers=_num_mtp_layers(text),
    )
    _check(config, text, rope)
    _refuse_quantised(outer, text)
    return config


class _Fields:
    """The text fields, where null counts as absent and every size is checked."""

    def __init__(self, values: Any):
        if not isinstance(values, dict):
            raise CheckpointError(f"config.json: text_config is a {type(values).__name__}, an object is needed")
        self.values = values

    def get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def object(self, name: str) -> dict[str, Any]:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise CheckpointError(f"config.json: '{name}' is {value!r}, an object is needed")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"config.json: '{name}' is {value!r}, a positive number is needed")
        return float(value)

    def size(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if value is None:
            raise CheckpointError(f"config.json: the text field '{name}' is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: '{name}' is {value!r}, a positive integer is needed")
        return value


def _is_moe(outer: dict[str, Any]) -> bool:
    names = outer.get("architectures") or ["(none)"]
    names = names if isinstance(names, list) else [names]
    for name in map(str, names):
        if name in SUPPORTED:
            return SUPPORTED[name]
    raise CheckpointError(
        f"config.json: architecture {', '.join(map(str, names))} is not served; supported: {', '.join(SUPPORTED)}"
    )


def _is_tied(outer: dict[str, Any], text: _Fields) -> bool:
    """The outer flag rules: released checkpoints may leave it out of text_config."""
    flag = outer.get("tie_word_embeddings")
    return bool(text.get("tie_word_embeddings", False) if flag is None else flag)


def _layer_types(text: _Fields) -> tuple[str, ...]:
    count = text.size("num_hidden_layers")
    interval = text.size("full_attention_interval", 4)
    default = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    types = text.get("layer_types", default)
    known = ("linear_attention", "full_attention")
    if not isinstance(types, list) or len(types) != count or not all(kind in known for kind in types):
        raise CheckpointError(
            f"config.json: layer_types is {types}, a list of num_hidden_layers = {count} times one of {known} is needed"
        )
    return tuple(types)


def _num_mtp_layers(text: _Fields) -> int:
    """Absent, null and 0 mean no head. An explicit 0 contradicts any other number."""
    found = {name: text.values[name] for name in MTP_COUNTS if text.values.get(name) is not None}
    if len(set(map(str, found.values()))) > 1:
        listed = ", ".join(f"{name} = {value}" for name, value in found.items())
        raise CheckpointError(f"config.json: {listed} are names of one thing, but differ: keep the right one")
    name = next(iter(found), None)
    return text.size(name) if name is not None and found[name] != 0 else 0


def _refuse_quantised(outer: dict[str, Any], text: _Fields) -> None:
    found = outer.get("quantization_config") or text.object("quantization_config")
    if found:
        method = found.get("quant_method", "unnamed") if isinstance(found, dict) else found
        raise CheckpointError(
            f"config.json: the weights are quantised ({method}), only bf16, fp16 and fp32 weights are served: "
            "use the original checkpoint"
        )


def _check(config: ModelConfig, text: _Fields, rope: _Fields) -> None:
    """Refuse settings that would be served wrongly rather than ignored."""
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"config.json: {config.num_heads} attention heads do not divide into {config.num_kv_heads} kv heads"
        )
    if config.delta_value_heads % config.delta_key_heads:
        raise CheckpointError(
            f"config.json: {config.delta_value_heads} linear value heads do not divide into "
            f"{config.delta_key_heads} key heads"
        )
    expected = {"attention_bias": False, "attn_output_gate": True, "hidden_act": "silu"}
    for name, value in expected.items():
        if text.get(name, value) != value:
            raise CheckpointError(f"config.json: '{name}' is {text.get(name, None)!r}, only {value!r} is served")
    if config.experts_per_token > config.num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok is {config.experts_per_token} of num_experts = {config.num_experts}"
        )
    if (kind := rope.get("rope_type", rope.get("type", "default"))) not in ("default", "mrope"):
        raise CheckpointError(f"config.json: rope_type is {kind!r}, only 'default' is served")
    if config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim:
        raise CheckpointError(f"config.json: the rotary dimension {config.rotary_dim} must be even and in the head")
