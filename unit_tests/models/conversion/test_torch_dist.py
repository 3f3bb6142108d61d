import shutil
from pathlib import Path

import pytest
import torch

from models.conversion.torch_dist import read_torch_dist, write_torch_dist
from models.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3).bfloat16(), "b.weight": torch.ones(5)}


def write(directory: Path) -> Path:
    directory.mkdir()
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in TENSORS.items()}
    write_torch_dist(directory, shapes, TENSORS.__getitem__)
    return directory


def test_what_is_written_is_read_back_with_its_dtype(tmp_path: Path) -> None:
    tensors, num_objects = read_torch_dist(write(tmp_path / "d"))
    assert num_objects == 0 and set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name].load(), tensor)


def test_values_are_asked_for_one_after_the_other(tmp_path: Path) -> None:
    asked: list[str] = []

    def fetch(name: str) -> torch.Tensor:
        asked.append(name)
        return TENSORS[name]

    (tmp_path / "d").mkdir()
    write_torch_dist(tmp_path / "d", {name: torch.empty_like(t, device="meta") for name, t in TENSORS.items()}, fetch)
    assert sorted(asked) == sorted(TENSORS)


def test_a_save_that_did_not_finish_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "d")
    (directory / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no .metadata: its writer did not finish"):
        read_torch_dist(directory)


def test_a_lost_a_short_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "d")
    (data,) = directory.glob("*.distcp")
    short, lost, broken = (shutil.copytree(directory, tmp_path / name) for name in ("short", "lost", "broken"))
    (short / data.name).write_bytes(data.read_bytes()[:-100])
    (lost / data.name).unlink()
    (broken / ".metadata").write_bytes(b"\x80nothing")
    for path, message in ((short, r"bytes of \d+: copy it again"), (lost, "is missing"), (broken, "is not readable")):
        with pytest.raises(CheckpointError, match=message):
            read_torch_dist(path)


def test_flipped_bytes_are_noticed_when_the_tensor_is_read(tmp_path: Path) -> None:
    directory = write(tmp_path / "d")
    (data,) = directory.glob("*.distcp")
    data.write_bytes(bytes(data.stat().st_size))
    tensors, _ = read_torch_dist(directory)
    with pytest.raises(CheckpointError, match=r"a.weight in .* is not readable"):
        tensors["a.weight"].load()
