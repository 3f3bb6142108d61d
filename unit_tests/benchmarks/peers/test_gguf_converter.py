"""What llama.cpp finds in a converted file is the checkpoint, in its order and under its names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unit_tests.checkpoints import (
    DELTA_KEY_DIM,
    DELTA_KEY_HEADS,
    DELTA_VALUE_DIM,
    DELTA_VALUE_HEADS,
    HEAD_DIM,
    make_checkpoint,
    make_config,
    make_tensors,
)

gguf = pytest.importorskip("gguf")

from benchmarks.peers import gguf_converter  # noqa: E402

KEY_CHANNELS = 2 * DELTA_KEY_HEADS * DELTA_KEY_DIM


def read(path: Path) -> dict[str, Any]:
    """Tensors as arrays, rows first; of bfloat16 the bits."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        is_raw = tensor.tensor_type == gguf.GGMLQuantizationType.BF16
        data = tensor.data.view(np.uint16) if is_raw else tensor.data
        tensors[tensor.name] = data.reshape(tuple(reversed(tensor.shape.tolist())))
    return tensors


def settings(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def convert(directory: Path, **options: Any) -> Path:
    checkpoint, target = make_checkpoint(directory / "checkpoint", **options), directory / "model.gguf"
    gguf_converter.main(checkpoint, target)
    return target


def test_every_weight_has_its_name_and_the_draft_head_is_the_layer_behind_the_last(tmp_path: Path) -> None:
    names = set(read(convert(tmp_path, num_layers=4, tied="no")))
    outside = {"token_embd.weight", "output_norm.weight", "output.weight"}
    each = {"attn_norm", "post_attention_norm", "ffn_gate", "ffn_up", "ffn_down"}
    full = each | {"attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm"}
    delta = each | {"attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha", "ssm_conv1d", "ssm_norm", "ssm_out"}
    draft = full | {"nextn.eh_proj", "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm"}
    layers = [delta, delta, delta, full, draft]
    expected = {f"blk.{number}.{name}.weight" for number, layer in enumerate(layers) for name in layer}
    expected |= {f"blk.{number}.{name}" for number in range(3) for name in ("ssm_a", "ssm_dt.bias")}
    assert names == outside | expected


def test_norms_have_their_one_and_decay_rates_are_ready(tmp_path: Path) -> None:
    found, given = read(convert(tmp_path)), make_tensors(make_config())
    for ours, theirs in (
        ("norm", "output_norm"),
        ("layers.3.self_attn.q_norm", "blk.3.attn_q_norm"),
        ("layers.7.post_attention_layernorm", "blk.7.post_attention_norm"),
    ):
        np.testing.assert_array_equal(found[f"{theirs}.weight"], given[f"model.{ours}.weight"].numpy() + 1)
    np.testing.assert_array_equal(found["blk.8.nextn.hnorm.weight"], given["mtp.pre_fc_norm_hidden.weight"].numpy() + 1)
    plain = given["model.layers.0.linear_attn.norm.weight"].numpy()
    np.testing.assert_array_equal(found["blk.0.ssm_norm.weight"], plain)
    rates = -given["model.layers.0.linear_attn.A_log"].exp().numpy()
    np.testing.assert_allclose(np.sort(found["blk.0.ssm_a"]), np.sort(rates), rtol=1e-6)


def test_value_head_i_has_key_head_i_mod_their_number(tmp_path: Path) -> None:
    found, given = read(convert(tmp_path)), make_tensors(make_config())
    layer = {name.removeprefix("model.layers.1.linear_attn."): tensor.numpy() for name, tensor in given.items()}
    qkv, conv, gate, out = (
        found[f"blk.1.{name}.weight"] for name in ("attn_qkv", "ssm_conv1d", "attn_gate", "ssm_out")
    )
    start = 2 * DELTA_KEY_HEADS * DELTA_VALUE_DIM
    for head in range(DELTA_VALUE_HEADS):
        group, place = head % DELTA_KEY_HEADS, head // DELTA_KEY_HEADS
        old = group * (DELTA_VALUE_HEADS // DELTA_KEY_HEADS) + place
        new_rows = slice(head * DELTA_VALUE_DIM, (head + 1) * DELTA_VALUE_DIM)
        old_rows = slice(old * DELTA_VALUE_DIM, (old + 1) * DELTA_VALUE_DIM)
        np.testing.assert_array_equal(qkv[start:][new_rows], layer["in_proj_qkv.weight"][KEY_CHANNELS:][old_rows])
        np.testing.assert_array_equal(conv[start:][new_rows], layer["conv1d.weight"][KEY_CHANNELS:, 0][old_rows])
        np.testing.assert_array_equal(gate[new_rows], layer["in_proj_z.weight"][old_rows])
        np.testing.assert_array_equal(out[:, new_rows], layer["out_proj.weight"][:, old_rows])
        np.testing.assert_array_equal(found["blk.1.ssm_beta.weight"][head], layer["in_proj_b.weight"][old])
        np.testing.assert_array_equal(found["blk.1.ssm_alpha.weight"][head], layer["in_proj_a.weight"][old])
        assert found["blk.1.ssm_dt.bias"][head] == layer["dt_bias"][old]


def test_keys_are_as_long_as_values_by_zeros(tmp_path: Path) -> None:
    target = convert(tmp_path)
    rows, given = read(target)["blk.0.attn_qkv.weight"], make_tensors(make_config())
    heads = rows[: 2 * DELTA_KEY_HEADS * DELTA_VALUE_DIM].reshape(2 * DELTA_KEY_HEADS, DELTA_VALUE_DIM, -1)
    keys = given["model.layers.0.linear_attn.in_proj_qkv.weight"].numpy()[:KEY_CHANNELS]
    np.testing.assert_array_equal(heads[:, :DELTA_KEY_DIM].reshape(keys.shape), keys)
    assert not heads[:, DELTA_KEY_DIM:].any()
    found = settings(target)
    assert found["qwen35.ssm.state_size"] == DELTA_VALUE_DIM
    assert found["qwen35.ssm.inner_size"] == DELTA_VALUE_DIM * DELTA_VALUE_HEADS
    assert (found["qwen35.block_count"], found["qwen35.nextn_predict_layers"]) == (9, 1)
    assert found["qwen35.attention.key_length"] == HEAD_DIM


def test_bfloat16_matrices_keep_their_bits_and_vision_is_left_out(tmp_path: Path) -> None:
    target = convert(tmp_path, dtype="bfloat16", prefix="vl", vision=True, shards=2)
    found = read(target)
    assert found.keys() == read(convert(tmp_path / "text", dtype="bfloat16")).keys()
    stored = make_tensors(make_config(dtype="bfloat16"))["model.embed_tokens.weight"].to(torch.bfloat16)
    np.testing.assert_array_equal(found["token_embd.weight"], stored.view(torch.uint16).numpy())
    assert found["output_norm.weight"].dtype == found["blk.0.ssm_conv1d.weight"].dtype == np.float32


def test_the_vocabulary_has_a_token_for_every_row(tmp_path: Path) -> None:
    target = convert(tmp_path)
    found, tokenizer = settings(target), json.loads((tmp_path / "checkpoint" / "tokenizer.json").read_text())
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == 320
    assert all(tokens[number] == token for token, number in tokenizer["model"]["vocab"].items())
    added = {entry["content"]: entry["special"] for entry in tokenizer["added_tokens"]}
    assert {
        tokens[number]: kind == gguf.TokenType.CONTROL for number, kind in enumerate(types) if kind in (3, 4)
    } == added


def test_what_llama_cpp_cannot_hold_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has experts; only dense models"):
        convert(tmp_path / "moe", moe=True)
    checkpoint = make_checkpoint(tmp_path / "long")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"linear_key_head_dim": 2 * DELTA_VALUE_DIM}))
    with pytest.raises(SystemExit, match="keys that are longer than its values"):
        gguf_converter.main(checkpoint, tmp_path / "long.gguf")
    (checkpoint / "config.json").write_text(json.dumps(config))
    for path in checkpoint.glob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(SystemExit, match=r"is F16, weights must be F32 or BF16"):
        gguf_converter.main(checkpoint, tmp_path / "half.gguf")
    assert not [*tmp_path.glob("*.gguf"), *tmp_path.glob("*.partial")]
