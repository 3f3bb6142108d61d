import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.conversion.rank_files import FILE_NAME, read_rank_files, write_rank_file
from models.errors import CheckpointError

ONE = torch.ones(2)


def save(directory: Path, rank: str, model: dict[str, Any], **others: Any) -> Path:
    (directory / f"mp_rank_{rank}").mkdir(parents=True)
    torch.save({"model": model, **others}, directory / f"mp_rank_{rank}" / FILE_NAME)
    return directory


def values(tensors: dict[str, Any]) -> dict[str, list[float]]:
    return {name: lazy.load().tolist() for name, lazy in tensors.items()}


def test_tensor_parallel_ranks_stay_apart(tmp_path: Path) -> None:
    for rank in (1, 0):
        write_rank_file(tmp_path, rank, {"a": rank * ONE})
    ranks, num_others = read_rank_files(tmp_path)
    assert [values(rank) for rank in ranks] == [{"a": [0, 0]}, {"a": [1, 1]}] and num_others == 0


def test_pipeline_stages_are_numbered_through(tmp_path: Path) -> None:
    save(tmp_path, "00_000", {"embedding.word_embeddings.weight": ONE, **layers(2, 0)})
    save(tmp_path, "00_001", {**layers(2, 10), "decoder.final_layernorm.weight": ONE, "mtp.layers.0.enorm.weight": ONE})
    (merged,), _ = read_rank_files(tmp_path)
    assert [merged[f"decoder.layers.{i}.w"].load()[0].item() for i in range(4)] == [0, 1, 10, 11]
    assert "mtp.layers.0.enorm.weight" in merged and len(merged) == 7


def layers(count: int, start: int) -> dict[str, Tensor]:
    return {f"decoder.layers.{index}.w": (start + index) * ONE for index in range(count)}


@pytest.mark.parametrize("names", [("00_000", "00_001"), ("00_000_000", "00_000_001")])
@pytest.mark.parametrize("name", ["local_experts.{}.linear_fc1.weight", "linear_fc1.weight{}"])
def test_expert_ranks_are_numbered_through(tmp_path: Path, names: tuple[str, str], name: str) -> None:
    for index, rank in enumerate(names):
        experts = {f"decoder.layers.0.mlp.experts.{name.format(i)}": (10 * index + i) * ONE for i in range(3)}
        save(tmp_path, rank, {"decoder.layers.0.mlp.router.weight": ONE, **experts})
    (merged,), _ = read_rank_files(tmp_path)
    found = [merged[f"decoder.layers.0.mlp.experts.{name.format(i)}"].load()[0].item() for i in range(6)]
    assert found == [0, 1, 2, 10, 11, 12]


def test_ranks_that_should_agree_must(tmp_path: Path) -> None:
    for index in range(2):
        save(tmp_path, f"00_000_00{index}", {"decoder.layers.0.mlp.router.weight": index * ONE})
    with pytest.raises(CheckpointError, match=r"router.weight differs between ranks"):
        read_rank_files(tmp_path)


class Trap:
    """What a pickle runs when it is read carelessly."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_foreign_objects_are_read_past_and_never_run(tmp_path: Path) -> None:
    extra = {"args": Namespace(a=1), "trap": Trap(tmp_path / "touched"), "rng_state": [{"np": pickle.dumps(1)}]}
    save(tmp_path, "00", {"a": torch.nn.Parameter(ONE), "a._extra_state": None, "b": Trap(tmp_path / "b")}, **extra)
    (rank,), num_others = read_rank_files(tmp_path)
    assert values(rank) == {"a": [1, 1]} and num_others == 2
    assert not (tmp_path / "touched").exists() and not (tmp_path / "b").exists()


def test_partial_and_broken_directories_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "hole", "00", {"a": ONE})
    save(tmp_path / "hole", "02", {"a": ONE})
    with pytest.raises(CheckpointError, match=r"lacks model_optim_rng\.pt of rank 1_0_0"):
        read_rank_files(tmp_path / "hole")
    (tmp_path / "empty" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"lacks model_optim_rng\.pt of rank 0_0_0"):
        read_rank_files(tmp_path / "empty")
    file = save(tmp_path / "short", "00", {"a": torch.ones(1000)}) / "mp_rank_00" / FILE_NAME
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        read_rank_files(tmp_path / "short")
    (save(tmp_path / "name", "00", {"a": ONE}) / "mp_rank_x").mkdir()
    with pytest.raises(CheckpointError, match="no rank's name"):
        read_rank_files(tmp_path / "name")


def test_what_is_no_megatron_file_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "none", "00", {})
    with pytest.raises(CheckpointError, match="no 'model' with tensors"):
        read_rank_files(tmp_path / "none")
    save(tmp_path / "virtual", "00", {}, model0={"a": ONE})
    with pytest.raises(CheckpointError, match="virtual pipeline stages"):
        read_rank_files(tmp_path / "virtual")
