from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.conversion import lazy_tensor
from models.errors import CheckpointError
from models.safetensors_file import read_tensor_index

A, B = torch.arange(6.0).view(2, 3), torch.ones(2, 3)


def test_parts_join_when_they_are_loaded() -> None:
    a, b = lazy_tensor.from_tensor("a", A), lazy_tensor.from_tensor("b", B)
    stacked, joined = lazy_tensor.stack([a, b]), lazy_tensor.concat([a, b])
    assert (stacked.shape, joined.shape, stacked.origin) == ((2, 2, 3), (4, 3), "a, b")
    assert torch.equal(stacked.load(), torch.stack([A, B])) and torch.equal(joined.load(), torch.cat([A, B]))
    assert torch.equal(stacked.select(1).load(), B) and stacked.select(1).shape == (2, 3)


def test_parts_that_do_not_fit_are_refused_by_name() -> None:
    a, b = lazy_tensor.from_tensor("a", A), lazy_tensor.from_tensor("b", B.half())
    with pytest.raises(CheckpointError, match=r"a \(torch.float32, \[2, 3\]\) and b \(torch.float16"):
        lazy_tensor.stack([a, b])
    with pytest.raises(CheckpointError, match="do not fit"):
        lazy_tensor.concat([a, b])


def test_a_file_is_read_when_it_is_loaded(tmp_path: Path) -> None:
    save_file({"a": A.bfloat16(), "codes": torch.ones(4, dtype=torch.int8)}, tmp_path / "f.safetensors")
    index = read_tensor_index(tmp_path / "f.safetensors")
    lazy = lazy_tensor.from_file("a", index["a"])
    assert lazy.dtype == torch.bfloat16 and torch.equal(lazy.load(), A.bfloat16())
    with pytest.raises(CheckpointError, match=r"codes .* is I8: quantised"):
        lazy_tensor.from_file("codes", index["codes"])
