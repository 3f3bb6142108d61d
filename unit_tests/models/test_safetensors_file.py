"""Our reader gives what the safetensors library wrote, in blocks, and refuses a file that is not whole."""

import json

import pytest
import torch
from safetensors.torch import save_file

from models import safetensors_file
from models.errors import CheckpointError
from models.safetensors_file import read_tensor_index


def read(tensor) -> torch.Tensor:
    return torch.cat([values for _, values in tensor.row_blocks()])


@pytest.fixture
def tensors():
    return {
        "half": torch.randn(5, 3).half(),
        "brain": torch.randn(7).bfloat16(),
        "single": torch.randn(3, 2, 4),
        "double": torch.randn(2, 2).double(),
        "steps": torch.arange(4),
    }


@pytest.fixture
def file(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
def test_every_tensor_comes_back_whatever_the_block_size(block_bytes, file, tensors, monkeypatch):
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", block_bytes)
    index = read_tensor_index(file)
    assert index.keys() == tensors.keys()
    for name in ("half", "brain", "single", "double"):
        assert index[name].shape == tuple(tensors[name].shape)
        assert torch.equal(read(index[name]), tensors[name])
    assert index["steps"].dtype == "I64"


def test_blocks_are_small_and_cover_the_rows_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 100)
    save_file({"x": torch.arange(50.0).view(10, 5)}, tmp_path / "x.safetensors")
    blocks = list(read_tensor_index(tmp_path / "x.safetensors")["x"].row_blocks())
    assert [(rows.start, rows.stop) for rows, _ in blocks] == [(0, 5), (5, 10)]


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_refused_by_name(kept, file):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is not a complete safetensors file.*download it again"
    ):
        read_tensor_index(file)


def test_a_file_that_shrinks_while_it_is_read_is_refused(file):
    index = read_tensor_index(file)
    last = list(index)[-2]
    file.write_bytes(file.read_bytes()[: index[last].start + 1])
    with pytest.raises(CheckpointError, match="ended while it was read"):
        read(index[last])


@pytest.mark.parametrize(
    "header",
    [
        b"[1]",
        b"not json",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [2]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b'{"x": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}}',
    ],
)
def test_a_nonsense_header_is_refused(header, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        read_tensor_index(file)


def test_a_pointer_of_git_lfs_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2000\n")
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        read_tensor_index(file)


def test_tensors_come_in_file_order(tmp_path):
    entry = {"dtype": "F32", "shape": [1]}
    header = {"late": entry | {"data_offsets": [4, 8]}, "early": entry | {"data_offsets": [0, 4]}}
    raw = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    assert list(read_tensor_index(file)) == ["early", "late"]
