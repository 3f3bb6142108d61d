"""Weights from safetensors: a checkpoint directory or file on disk or in shared memory, or bytes."""

import os
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from models.errors import WeightUpdateError
from models.safetensors_file import read_tensor_index
from models.weight_update import WeightUpdate, update_errors
from models.weights import list_weight_files


def stage_directory(directory: str | Path, update: WeightUpdate) -> None:
    """Bring a checkpoint directory, or one safetensors file, to an update, streaming. Raises WeightUpdateError, also
    for a file that changes meanwhile."""
    path = Path(directory)
    try:
        with update_errors():
            for file in list_weight_files(path) if path.is_dir() else [path]:
                _stage_file(file, update)
    except OSError as error:
        raise WeightUpdateError(f"{path} cannot be read: {error}") from None


def stage_bytes(data: bytes, update: WeightUpdate) -> None:
    """Bring the tensors of a safetensors file that is in memory to an update. Raises WeightUpdateError."""
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError) as error:
        raise WeightUpdateError(f"{len(data)} bytes of tensors are no whole safetensors file: {error}") from None
    for name, tensor in tensors.items():
        update.add(name, tensor)


def _stage_file(file: Path, update: WeightUpdate) -> None:
    before = _state(file)
    try:
        for name, tensor in read_tensor_index(file).items():
            update.add(name, tensor)
    finally:  # a change explains whatever else is wrong
        if _state(file) != before:
            raise WeightUpdateError(
                f"{file} was changed while it was read: write weights to a new file, and rename it when it is complete"
            )


def _state(file: Path) -> tuple[int, ...]:
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns
