import json
from pathlib import Path

import pytest
import torch

from models.conversion.megatron_directory import open_megatron
from models.conversion.to_megatron import SETTINGS
from models.errors import CheckpointError
from unit_tests.checkpoints import make_checkpoint, write_weights
from unit_tests.models.conversion.conversions import read_all, to_megatron


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hf"), num_layers=4, prefix="vl", vision=True)


def test_the_head_alone_has_nothing_of_the_trunk(source: Path, tmp_path: Path) -> None:
    report = to_megatron(source, tmp_path / "out", mtp_only=True)
    (names,) = open_megatron(tmp_path / "out").ranks
    assert all(name.startswith("language_model.mtp.layers.0.") for name in names)
    assert len(names) == len(report.mapped) == 12 and sum(map(len, report.mapped.values())) == 15
    assert report.set_aside["of the vision tower"] == 3 and report.set_aside["of the trunk"] > 0


def test_names_are_those_that_were_asked_for(source: Path, tmp_path: Path) -> None:
    settings = {"mtp_only": True, "format": "safetensors", "block": "mtp_model_layer", "prefix": "lm"}
    to_megatron(source, tmp_path / "out", **settings)
    assert "mtp.layers.0.mtp_model_layer.self_attention.linear_qkv.layer_norm_weight" in read_all(tmp_path / "out")


def test_the_settings_lie_beside_the_weights(source: Path, tmp_path: Path) -> None:
    to_megatron(source, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / SETTINGS).read_text())
    assert settings["mtp_num_layers"] == 1 and settings["layernorm_zero_centered_gamma"] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "mp_rank", "tensor_parallel": 4}, "4 does not divide the 6 attention heads"),
        ({"format": "mp_rank", "tensor_parallel": 3}, "3 does not divide the 2 linear key heads"),
        ({"format": "mp_rank", "tensor_parallel": 3, "mtp_only": True}, "3 does not divide the 2 key-value heads"),
        ({"format": "mp_rank", "tensor_parallel": 0}, "--tensor-parallel is 0"),
        ({"tensor_parallel": 2}, "torch_dist holds whole tensors"),
        ({"padded_vocab_size": 319}, "--padded-vocab-size is 319, the vocabulary has 320"),
        ({"format": "mp_rank", "tensor_parallel": 2, "padded_vocab_size": 321}, "does not divide the 321 rows"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(source: Path, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        to_megatron(source, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_a_head_that_is_not_there_is_refused(tmp_path: Path) -> None:
    headless = make_checkpoint(tmp_path / "hf", num_layers=4, mtp_layers=0)
    with pytest.raises(CheckpointError, match="no MTP layers, there is nothing for --mtp-only"):
        to_megatron(headless, tmp_path / "out", mtp_only=True)
    to_megatron(headless, tmp_path / "out")
    (names,) = open_megatron(tmp_path / "out").ranks
    assert not [name for name in names if "mtp" in name]


def change(path: Path, name: str, tensor: torch.Tensor | None) -> Path:
    tensors = read_all(path)
    tensors.pop(name, None)
    write_weights(path, tensors | ({} if tensor is None else {name: tensor}))
    return path


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("mtp.fc.weight", None, "missing mtp.fc.weight"),
        ("mtp.fc.weight_scale_inv", torch.ones(1), "no rule for mtp.fc.weight_scale_inv"),
        ("mtp.embed_tokens.weight", torch.ones(1), "no rule for mtp.embed_tokens.weight"),
        (
            "mtp.fc.weight",
            torch.ones(128, 64),
            r"mtp.fc.weight has shape \[128, 64\], config.json asks for \[64, 128\]",
        ),
        ("mtp.fc.weight", torch.ones(64, 128).to(torch.float8_e4m3fn), "mtp.fc.weight .* is F8_E4M3: quantised"),
        ("mtp.layers.0.mlp.up_proj.weight", torch.ones(96, 64).half(), "but both go into mtp.layers.0"),
    ],
)
def test_odd_weights_are_refused_by_name_and_nothing_is_written(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    path = change(make_checkpoint(tmp_path / "hf", num_layers=4), name, tensor)
    with pytest.raises(CheckpointError, match=message):
        to_megatron(path, tmp_path / "out", mtp_only=True)
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_a_tied_output_head_that_is_stored_all_the_same_is_set_aside(tmp_path: Path) -> None:
    path = change(make_checkpoint(tmp_path / "hf", num_layers=4), "lm_head.weight", torch.ones(320, 64))
    assert to_megatron(path, tmp_path / "out").set_aside == {"tied lm_head": 1}


def test_an_out_that_is_there_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is there already"):
        to_megatron(source, tmp_path)
