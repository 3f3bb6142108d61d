"""A Qwen3.5 checkpoint -> GGUF: `python -m benchmarks.peers.gguf_converter CHECKPOINT FILE [Q8_0 | Q4_0]`.

Runs in llama.cpp's environment: needs gguf and numpy, to quantise also llama_cpp, and no torch. Dense models with their
draft head, in the checkpoint's own precision; quantised ones are made from that by llama.cpp's own quantiser.

What llama.cpp wants otherwise: norm weights with their 1, decay rates as -exp(A_log), and value heads so that head i
has key head i mod num_key_heads. It has one size for keys and values of a delta net. Where keys are shorter, zeros make
them as long, which changes neither norms nor products; the queries' scale is another then, and the norm behind takes it
out again but for its epsilon.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# bfloat16 stays as it is stored: whatever is done to its values is done in float32.
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2")}
_DRAFT = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head_norm"}


class NotConvertible(Exception):
    """llama.cpp cannot hold the checkpoint: what was seen, the limit."""


def convert(checkpoint: Path, target: Path) -> None:
    """Write the GGUF. Raises NotConvertible."""
    outer = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config = outer | outer.get("text_config", {})
    if "num_experts" in config:
        raise NotConvertible(f"{checkpoint} has experts; only dense models are converted")
    if config["linear_key_head_dim"] > config["linear_value_head_dim"]:
        raise NotConvertible(
            f"{checkpoint} has delta net keys that are longer than its values; llama.cpp holds none such"
        )
    writer = gguf.GGUFWriter(target, "qwen35")
    tensors = [pair for path in sorted(checkpoint.glob("*.safetensors")) for pair in read_tensors(path)]
    has_draft = any(name == "mtp.fc.weight" for name, _ in tensors)
    _add_settings(writer, config, has_draft)
    _add_vocabulary(writer, checkpoint, config)
    for name, array in tensors:
        if "visual." in name:
            continue
        array = _arrange(name, array, config)
        is_raw = array.dtype == np.uint16
        stored = np.ascontiguousarray(array)
        writer.add_tensor(
            rename(name, config["num_hidden_layers"]),
            stored.view(np.uint8) if is_raw else stored,
            raw_dtype=gguf.GGMLQuantizationType.BF16 if is_raw else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """Tensors of a safetensors file, which stay on the disk; bfloat16 as its bits."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise NotConvertible(f"{name} is {entry['dtype']}, weights must be {' or '.join(_DTYPES)}")
        start, end = entry["data_offsets"]
        yield name, data[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def rename(name: str, num_layers: int) -> str:
    """llama.cpp's name of a weight; the draft head is a layer behind the last one."""
    name = name.replace("language_model.", "").replace("dt_bias", "dt_proj.bias")
    if name.startswith("mtp."):
        name = name.removeprefix("mtp.")
        own = _DRAFT.get(name.removesuffix(".weight"))
        if own is not None:
            return f"blk.{num_layers}.nextn.{own}.weight"
        _, number, inner = name.split(".", 2)
        name = f"model.layers.{num_layers + int(number)}.{inner}"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN35, num_layers + 1)
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise NotConvertible(f"{name} is no weight of a Qwen3.5 that llama.cpp knows")
    return str(found)


def _arrange(name: str, array: Array, config: dict[str, Any]) -> Array:
    """Values and order as llama.cpp wants them; what is no matrix is float32."""
    inner = name.removesuffix(".weight").rpartition(".")[2]
    if "linear_attn." in name:
        array = _arrange_delta_net(inner, array, config)
    if array.ndim > 1 and inner != "conv1d":
        return array
    values = to_float32(array)
    if inner == "A_log":
        return -np.exp(values)
    is_centred = "norm" in name and not name.endswith("linear_attn.norm.weight")
    return values + np.float32(1) if is_centred else values


def to_float32(array: Array) -> Array:
    """The values, of bits of bfloat16 as well."""
    if array.dtype != np.uint16:
        return array
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _arrange_delta_net(inner: str, array: Array, config: dict[str, Any]) -> Array:
    """One of its weights with value heads in llama.cpp's order and keys as long as values."""
    num_keys, num_values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_size, value_size = config["linear_key_head_dim"], config["linear_value_head_dim"]
    order = np.arange(num_values).reshape(num_keys, -1).T.ravel()
    if inner in ("in_proj_b", "in_proj_a", "A_log", "dt_bias"):
        return array[order]
    if inner == "in_proj_z":
        return array.reshape(num_values, value_size, -1)[order].reshape(array.shape)
    if inner == "out_proj":
        return array.reshape(-1, num_values, value_size)[:, order].reshape(array.shape)
    if inner == "norm":
        return array
    array = array.reshape(array.shape[0], -1)  # in_proj_qkv, and conv1d, which has an axis of one channel
    keys = array[: 2 * num_keys * key_size].reshape(2 * num_keys, key_size, -1)
    values = array[2 * num_keys * key_size :].reshape(num_values, value_size, -1)[order]
    keys = np.pad(keys, ((0, 0), (0, value_size - key_size), (0, 0)))
    return np.concatenate([part.reshape(-1, array.shape[1]) for part in (keys, values)])


def _add_settings(writer: gguf.GGUFWriter, config: dict[str, Any], has_draft: bool) -> None:
    rope, value_size = config["rope_parameters"], config["linear_value_head_dim"]
    writer.add_block_count(config["num_hidden_layers"] + has_draft)
    writer.add_nextn_predict_layers(int(has_draft))
    writer.add_full_attention_interval(config.get("full_attention_interval", 4))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(value_size)
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_num_value_heads"] * value_size)


def _add_vocabulary(writer: gguf.GGUFWriter, checkpoint: Path, config: dict[str, Any]) -> None:
    """The tokenizer; rows of the embedding that have no token get one that no text gives."""
    path = checkpoint / "tokenizer.json"
    if not path.exists():
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(config["vocab_size"])
        return
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokens = [f"[PAD{number}]" for number in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    )
    writer.add_eos_token_id(config["eos_token_id"])
    template = checkpoint / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def quantize(source: Path, target: Path, kind: str) -> None:
    """Another GGUF with the weights in Q8_0 or Q4_0, as llama.cpp's own program would make it."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) != 0:
        raise NotConvertible(f"llama.cpp cannot quantise {source} to {kind}")


def main(source: Path, target: Path, kind: str = "") -> None:
    """Convert a directory or quantise a file; nothing is left of what fails."""
    partial = target.with_suffix(".partial")
    try:
        if kind:
            quantize(source, partial, kind)
        else:
            convert(source, partial)
        partial.replace(target)
    except NotConvertible as error:
        sys.exit(str(error))
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
