import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from models.conversion import hugging_face
from models.conversion.hugging_face import INDEX, open_hugging_face, renew
from models.errors import CheckpointError
from models.weights import list_weight_files
from unit_tests.checkpoints import make_checkpoint, write_json, write_weights
from unit_tests.models.conversion.conversions import read_all, read_bytes

NEW = {"mtp.fc.weight": torch.full((64, 128), 2.0), "model.norm.weight": torch.full((64,), 3.0)}


def renew_two(path: Path, out: Path, in_place: bool = False, tensors: dict[str, Tensor] = NEW) -> None:
    base = open_hugging_face(path)
    renew(base, set(NEW), tensors.items(), out, in_place)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("prefix", ["text", "vl", "language_model.model"])
def test_other_tensors_keep_their_bytes_and_the_index_is_right(
    tmp_path: Path, shards: int, in_place: bool, prefix: str
) -> None:
    path = make_checkpoint(tmp_path / "hf", num_layers=4, shards=shards, prefix=prefix, vision=True)
    before, others = read_bytes(path), {file.name: file.read_bytes() for file in path.glob("*.json")}
    base = open_hugging_face(path)
    raw = {base.names[name]: tensor for name, tensor in NEW.items()}
    out = path if in_place else tmp_path / "out"
    renew_two(path, out, in_place)
    after, tensors = read_bytes(out), read_all(out)
    assert set(after) == set(before)
    assert {name for name in before if before[name] != after[name]} == set(raw)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in raw.items())
    index = json.loads((out / INDEX).read_text())
    assert set(index["weight_map"]) == set(after) and index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in tensors.values()
    )
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert {file.name for file in list_weight_files(out)} == set(index["weight_map"].values())
    others.pop(INDEX, None)
    assert {name: (out / name).read_bytes() for name in others} == others
    assert {file.name for file in tmp_path.iterdir()} == ({"hf"} if in_place else {"hf", "out"})
    assert in_place or read_bytes(path) == before


def test_a_file_without_a_renewed_tensor_is_not_even_read_in_place(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf", num_layers=4, shards=3)
    base = open_hugging_face(path)
    touched = {base.tensors[name].file for name in NEW}
    kept = {file.stat().st_ino for file in base.files if file not in touched}
    assert kept
    renew_two(path, path, in_place=True)
    assert kept <= {file.stat().st_ino for file in path.glob("*.safetensors")}


def test_links_into_a_cache_are_followed_or_kept(tmp_path: Path) -> None:
    real = make_checkpoint(tmp_path / "blobs", num_layers=4, shards=3)
    link = tmp_path / "snapshot"
    link.mkdir()
    for file in real.iterdir():
        (link / file.name).symlink_to(Path("..") / "blobs" / file.name)
    before = read_bytes(real)
    renew_two(link, tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    renew_two(link, link, in_place=True)
    assert read_bytes(link) == read_bytes(tmp_path / "out") != before == read_bytes(real)


def test_an_error_on_the_way_leaves_everything_as_it_was(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf", num_layers=4)
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    class Broken(dict):
        def items(self):
            yield from NEW.items()
            raise CheckpointError("unreadable")

    for out, in_place in ((path, True), (tmp_path / "out", False)):
        with pytest.raises(CheckpointError, match="unreadable"):
            renew_two(path, out, in_place, Broken())
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
        assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_new_weights_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugging_face, "MAX_FILE_BYTES", 1000)
    path = make_checkpoint(tmp_path / "hf", num_layers=4)
    renew_two(path, tmp_path / "out")
    assert [file.name for file in sorted((tmp_path / "out").glob("*.safetensors"))] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]


def test_the_form_of_experts_is_told_by_their_names(tmp_path: Path) -> None:
    mixed = open_hugging_face(make_checkpoint(tmp_path, moe=True, expert_layout="mixed", num_layers=4))
    layers = ["model.layers.0", "model.layers.1", "mtp.layers.0"]
    assert [mixed.is_packed(layer) for layer in layers] == [True, False, False]
    for file in mixed.files:
        file.unlink()
    empty = open_hugging_face(tmp_path, needs_weights=False)
    assert [empty.is_packed(layer) for layer in layers] == [True, True, False]
    assert empty.dtype_of("model.norm.weight") == torch.float32


def test_new_names_are_spelled_as_the_directory_does(tmp_path: Path) -> None:
    expected = {
        "text": ("model.norm.weight", "lm_head.weight"),
        "vl": ("model.language_model.norm.weight", "lm_head.weight"),
        "language_model.model": ("language_model.model.norm.weight", "language_model.lm_head.weight"),
    }
    for prefix, names in expected.items():
        directory = open_hugging_face(make_checkpoint(tmp_path / prefix, prefix=prefix, num_layers=4))
        directory.names = {name: raw for name, raw in directory.names.items() if name != "model.norm.weight"}
        assert (directory.spell("model.norm.weight"), directory.spell("lm_head.weight")) == names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM is not served"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"weights are quantised \(fp8\)"),
        ({"num_mtp_layers": 2}, "are names of one thing, but differ"),
    ],
)
def test_configs_that_cannot_be_converted_are_refused(tmp_path: Path, fields: dict, message: str) -> None:
    path = make_checkpoint(tmp_path, num_layers=4)
    write_json(path / "config.json", json.loads((path / "config.json").read_text()) | fields)
    with pytest.raises(CheckpointError, match=message):
        open_hugging_face(path)


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "a", num_layers=4)
    (file,) = path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_hugging_face(path)
    path = make_checkpoint(tmp_path / "b", num_layers=4)
    shutil.move(path / "model.safetensors", path / "x.safetensors")
    write_weights(tmp_path, {"model.language_model.norm.weight": torch.ones(64)})
    shutil.move(tmp_path / "model.safetensors", path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight is in .* twice"):
        open_hugging_face(path)
