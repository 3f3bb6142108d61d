"""Hugging Face -> Megatron -> Hugging Face gives every byte back."""

from pathlib import Path

import pytest
import torch

from unit_tests import checkpoints
from unit_tests.models.conversion.conversions import from_megatron, make_pair, read_all, read_bytes, to_megatron

FORMS = {
    "dense": {"moe": False},
    "packed": {"moe": True, "expert_layout": "fused"},
    "per_expert": {"moe": True, "expert_layout": "per_expert"},
    "mixed": {"moe": True, "expert_layout": "mixed"},
}
WAYS = {
    "torch_dist": {"format": "torch_dist"},
    "torch_dist, local": {"format": "torch_dist", "layer_spec": "local", "block": "mtp_model_layer"},
    "two ranks": {"format": "mp_rank", "tensor_parallel": 2, "block": "mtp_model_layer"},
    "two ranks, local": {"format": "mp_rank", "tensor_parallel": 2, "layer_spec": "local"},
    "one rank": {"format": "mp_rank", "prefix": "lm"},
    "flat": {"format": "safetensors", "block": "mtp_model_layer", "prefix": "vl"},
}


@pytest.mark.parametrize(("prefix", "num_groups"), [("text", 1), ("text", 2), ("text", 6), ("vl", 2)])
@pytest.mark.parametrize("form", FORMS)
def test_every_byte_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, prefix: str, num_groups: int
) -> None:
    """In bfloat16, where a norm of the delta net that was moved by 1 in its own precision would not come back."""
    monkeypatch.setattr(checkpoints, "NUM_KV_HEADS", num_groups)
    source, base = make_pair(tmp_path, prefix=prefix, dtype="bfloat16", vision=prefix == "vl", **FORMS[form])
    expected = read_bytes(source)
    assert expected != read_bytes(base)
    for way, settings in WAYS.items():
        to_megatron(source, tmp_path / "megatron" / way, **settings)
        from_megatron(tmp_path / "megatron" / way, base, tmp_path / "back" / way)
        assert read_bytes(tmp_path / "back" / way) == expected, way


@pytest.mark.parametrize("form", FORMS)
def test_ones_based_norms_come_back_too(tmp_path: Path, form: str) -> None:
    source, base = make_pair(tmp_path, dtype="bfloat16", tied="no", **FORMS[form])
    report = to_megatron(source, tmp_path / "megatron", norms="ones")
    from_megatron(tmp_path / "megatron", base, tmp_path / "back", norms="ones")
    assert read_bytes(tmp_path / "back") == read_bytes(source)
    assert "wider" in report.notes[0]


def test_float32_and_float64_keep_their_dtype(tmp_path: Path) -> None:
    for dtype in ("float32", "float64", "float16"):
        source, base = make_pair(tmp_path / dtype, dtype=dtype)
        to_megatron(source, tmp_path / dtype / "megatron")
        from_megatron(tmp_path / dtype / "megatron", base, tmp_path / dtype / "back")
        back, expected = read_all(tmp_path / dtype / "back"), read_all(source)
        assert {tensor.dtype for tensor in back.values()} == {getattr(torch, dtype)}
        # A float64 norm has no wider type to be moved in.
        moved = [name for name in expected if not torch.equal(back[name], expected[name])]
        assert not moved if dtype != "float64" else all(name.endswith("linear_attn.norm.weight") for name in moved)


@pytest.mark.parametrize("mtp_layers", [2, 3])
def test_a_deeper_head_comes_back(tmp_path: Path, mtp_layers: int) -> None:
    source, base = make_pair(tmp_path, mtp_layers=mtp_layers)
    to_megatron(source, tmp_path / "megatron", mtp_only=True)
    from_megatron(tmp_path / "megatron", base, tmp_path / "back", mtp_only=True)
    back, expected = read_bytes(tmp_path / "back"), read_bytes(source)
    assert {name: back[name] for name in back if "mtp." in name} == {n: expected[n] for n in expected if "mtp." in n}


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    source, base = make_pair(tmp_path, shards=3)
    to_megatron(source, tmp_path / "megatron")
    from_megatron(tmp_path / "megatron", base, tmp_path / "back")
    assert read_bytes(tmp_path / "back") == read_bytes(source)
    assert [file.name for file in (tmp_path / "back").glob("*.safetensors")] == ["model.safetensors"]


def test_padding_rows_of_the_vocabulary_are_added_and_cut_off(tmp_path: Path) -> None:
    source, base = make_pair(tmp_path, vocab_size=321, tied="no")
    to_megatron(source, tmp_path / "megatron", format="mp_rank", tensor_parallel=2, padded_vocab_size=384)
    from_megatron(tmp_path / "megatron", base, tmp_path / "back")
    assert read_bytes(tmp_path / "back") == read_bytes(source)


def test_experts_can_be_written_in_the_other_form(tmp_path: Path) -> None:
    source, base = make_pair(tmp_path, moe=True, expert_layout="mixed")
    whole = checkpoints.make_checkpoint(tmp_path / "packed", seed=1, num_layers=4, moe=True, expert_layout="fused")
    to_megatron(source, tmp_path / "megatron")
    from_megatron(tmp_path / "megatron", base, tmp_path / "back", experts="packed")
    assert read_bytes(tmp_path / "back") == read_bytes(whole)
