from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.conversion.megatron_directory import TRACKER, open_megatron
from models.errors import CheckpointError
from unit_tests.models.conversion.conversions import FIXTURES

WEIGHT = {"decoder.final_layernorm.weight": torch.ones(4)}


def test_every_layout_is_recognised(tmp_path: Path) -> None:
    save_file(WEIGHT, tmp_path / "flat.safetensors")
    found = [FIXTURES / "dense" / "torch_dist", FIXTURES / "dense" / "mp_rank", tmp_path, tmp_path / "flat.safetensors"]
    sources = [open_megatron(path) for path in found]
    assert [len(source.ranks) for source in sources] == [1, 2, 1, 1]
    kinds = ["torch_dist", "2 tensor-parallel ranks", "flat safetensors", "flat safetensors"]
    assert all(source.description.startswith(kind) for source, kind in zip(sources, kinds, strict=True))


def test_the_tracker_file_leads_to_the_iteration(tmp_path: Path) -> None:
    for word, folder in (("12", "iter_0000012"), ("release", "release")):
        (tmp_path / folder).mkdir()
        save_file(WEIGHT, tmp_path / folder / "model.safetensors")
        (tmp_path / TRACKER).write_text(word + "\n")
        assert folder in open_megatron(tmp_path).description
    (tmp_path / TRACKER).write_text("13")
    with pytest.raises(CheckpointError, match="names iter_0000013, which is missing"):
        open_megatron(tmp_path)
    (tmp_path / TRACKER).write_text("last")
    with pytest.raises(CheckpointError, match="says 'last', a number or 'release' is needed"):
        open_megatron(tmp_path)


def test_what_belongs_to_the_trainer_is_set_aside_and_counted(tmp_path: Path) -> None:
    others = {"optimizer.state.exp_avg.w": torch.ones(1), "decoder.x._extra_state": torch.ones(1)}
    save_file(WEIGHT | others, tmp_path / "model.safetensors")
    source = open_megatron(tmp_path)
    assert source.num_read == 3 and list(source.ranks[0]) == list(WEIGHT)
    assert source.set_aside == {"optimizer and trainer state": 1, "extra state": 1}


def test_anything_else_is_refused_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_megatron(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds nothing: no Megatron checkpoint"):
        open_megatron(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin: no Megatron checkpoint"):
        open_megatron(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_megatron(tmp_path)
