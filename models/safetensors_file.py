"""Reads one safetensors file with plain reads, a block of rows at a time.

The file is not mapped into memory: mapped pages count as the process's memory until the map is closed, and one
embedding can be 2 GB. Format: 8 bytes little-endian header length, a JSON header, the data. Knows nothing of models.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import CheckpointError

BLOCK_BYTES = 64 << 20
MAX_HEADER_BYTES = 100 << 20
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class FileTensor:
    """A tensor that is still in its file. `dtype` is the file's name for it; only FLOAT_TYPES can be read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    num_bytes: int

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, values [rows, ...]) of at most BLOCK_BYTES each, but of one row at least. Raises CheckpointError."""
        num_rows = self.shape[0]
        row_bytes = self.num_bytes // num_rows
        step = max(1, BLOCK_BYTES // row_bytes)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            for row in range(0, num_rows, step):
                rows = slice(row, min(row + step, num_rows))
                yield rows, self._read(file, rows.stop - row, row_bytes)

    def _read(self, file: Any, num_rows: int, row_bytes: int) -> Tensor:
        raw = torch.empty(num_rows * row_bytes, dtype=torch.uint8)
        target, done = raw.numpy().data, 0
        while done < len(target):
            count = file.readinto(target[done:])
            if not count:
                raise CheckpointError(f"{self.file} ended while it was read: download it again")
            done += count
        return raw.view(FLOAT_TYPES[self.dtype]).view(num_rows, *self.shape[1:])


def read_tensor_index(file: Path) -> dict[str, FileTensor]:
    """Every tensor of a safetensors file by name, in file order. Raises CheckpointError unless the file is whole."""
    try:
        header, data_start = _read_header(file)
        tensors = {name: _parse_entry(file, entry, data_start) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(file, f"its header is not readable: {error}") from None
    end = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=data_start)
    size = file.stat().st_size
    if size < end:
        raise _broken(file, f"it has {size} bytes of {end}")
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header's tensor entries and the offset of the data."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, file.stat().st_size - 8):
            raise ValueError(f"it claims to be {length} bytes long")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"it is a JSON {type(header).__name__}")
    header.pop("__metadata__", None)
    return header, 8 + length


def _parse_entry(file: Path, entry: dict[str, Any], data_start: int) -> FileTensor:
    shape, dtype = tuple(int(size) for size in entry["shape"]), str(entry["dtype"])
    start, end = entry["data_offsets"]
    is_sized_right = dtype not in FLOAT_TYPES or end - start == math.prod(shape) * FLOAT_TYPES[dtype].itemsize
    if not 0 <= start <= end or not is_sized_right:
        raise ValueError(f"{dtype} {list(shape)} at bytes {start}..{end}")
    return FileTensor(file, shape, dtype, data_start + start, end - start)


def _broken(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a complete safetensors file, {what}: download it again")
