"""torch_dist directories (`.metadata`, `__*.distcp`) with plain torch.distributed.checkpoint, one process, no Megatron.

Format: what megatron-core's dist_checkpointing writes by default. Its tensors are whole: any tensor-parallel size reads
them.
"""

import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from models.conversion.lazy_tensor import LazyTensor
from models.errors import CheckpointError

BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def read_torch_dist(directory: Path) -> tuple[dict[str, LazyTensor], int]:
    """(tensors by name, number of entries that are no tensors). Raises CheckpointError unless every file is whole."""
    reader = _Reader(directory)
    metadata = reader.read_metadata()
    _check_files(directory, metadata)
    entries = metadata.state_dict_metadata
    tensors = {
        name: LazyTensor(name, tuple(entry.size), entry.properties.dtype, _loader(reader, name, entry))
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    return tensors, len(entries) - len(tensors)


def write_torch_dist(directory: Path, shapes: Mapping[str, Tensor], fetch: Callable[[str], Tensor]) -> None:
    """Write the tensors that `fetch(name)` gives, one after the other; `shapes` has a tensor without data for each."""
    writer = FileSystemWriter(directory, thread_count=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is no process group, as is meant
        save(dict(shapes), storage_writer=writer, planner=_LazyPlanner(fetch), no_dist=True)
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(BACKENDS), encoding="utf-8")


class _Reader(FileSystemReader):
    """Reads the metadata once. Raises CheckpointError when it is missing or broken."""

    @cached_property
    def _metadata(self) -> Metadata:
        try:
            return super().read_metadata()
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.path} has no .metadata: its writer did not finish, take an older iteration"
            ) from None
        except (pickle.UnpicklingError, EOFError, OSError, ImportError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{self.path}/.metadata is not readable: {error}") from None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return self._metadata


class _LazyPlanner(DefaultSavePlanner):
    """Plans with tensors without data and asks for the values when they are written."""

    def __init__(self, fetch: Callable[[str], Tensor]):
        super().__init__(flatten_state_dict=False)
        self.fetch = fetch

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.fetch(index.fqn)


def _check_files(directory: Path, metadata: Metadata) -> None:
    """Every byte that the metadata names must be there; a lost file would otherwise show after hours."""
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        file = directory / name
        if not file.exists():
            raise CheckpointError(f"{file} is missing: the directory is not complete, copy it again")
        if (size := file.stat().st_size) < end:
            raise CheckpointError(f"{file} has {size} bytes of {end}: copy it again")


def _loader(reader: FileSystemReader, name: str, entry: TensorStorageMetadata) -> Callable[[], Tensor]:
    def fetch() -> Tensor:
        target = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load({name: target}, storage_reader=reader, no_dist=True)
        except (CheckpointException, OSError, RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise CheckpointError(f"{name} in {reader.path} is not readable: {reason[0]}") from None
        return target

    return fetch
