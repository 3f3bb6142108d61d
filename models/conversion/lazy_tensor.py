"""Tensors that are read when they are needed: shape and dtype are known before, so that all of a conversion is checked
before any of it is done."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import CheckpointError
from models.safetensors_file import FLOAT_TYPES, FileTensor


@dataclass(frozen=True)
class LazyTensor:
    """`load()` gives the tensor of this shape and dtype; `origin` is its name where it lies."""

    origin: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    def select(self, index: int) -> "LazyTensor":
        """Entry `index` along the first axis."""
        return LazyTensor(self.origin, self.shape[1:], self.dtype, lambda: self.load()[index])


def from_tensor(origin: str, tensor: Tensor) -> LazyTensor:
    """A tensor that is in memory, or mapped."""
    return LazyTensor(origin, tuple(tensor.shape), tensor.dtype, lambda: tensor.detach())


def from_file(origin: str, tensor: FileTensor) -> LazyTensor:
    """A tensor of a safetensors file. Raises CheckpointError for one that is no plain floating-point tensor."""
    if tensor.dtype not in FLOAT_TYPES:
        raise CheckpointError(
            f"tensor {origin} in {tensor.file} is {tensor.dtype}: quantised weights are not converted, "
            "use the original checkpoint"
        )
    return LazyTensor(origin, tensor.shape, FLOAT_TYPES[tensor.dtype], lambda: _read(tensor))


def stack(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The parts along a new first axis. Raises CheckpointError where they differ in shape or dtype."""
    first = parts[0]
    for part in parts:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise CheckpointError(f"{_describe(first)} and {_describe(part)} are parts of one tensor, but differ")
    shape = (len(parts), *first.shape)
    return LazyTensor(_origins(parts), shape, first.dtype, lambda: torch.stack([part.load() for part in parts]))


def concat(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The parts along their first axis. Raises CheckpointError where they differ in another size or in dtype."""
    first = parts[0]
    for part in parts:
        if (part.shape[1:], part.dtype) != (first.shape[1:], first.dtype):
            raise CheckpointError(f"{_describe(first)} and {_describe(part)} are parts of one tensor, but do not fit")
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return LazyTensor(_origins(parts), shape, first.dtype, lambda: torch.cat([part.load() for part in parts]))


def _read(tensor: FileTensor) -> Tensor:
    whole = torch.empty(tensor.shape, dtype=FLOAT_TYPES[tensor.dtype])
    for rows, values in tensor.row_blocks():
        whole[rows] = values
    return whole


def _describe(part: LazyTensor) -> str:
    return f"{part.origin} ({part.dtype}, {list(part.shape)})"


def _origins(parts: Sequence[LazyTensor]) -> str:
    return ", ".join(dict.fromkeys(part.origin for part in parts))
