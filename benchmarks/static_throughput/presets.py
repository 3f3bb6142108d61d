"""What is measured: the bundled demo checkpoint, or random weights with the dimensions of a published one."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_suite.dimensions import Dimensions, parse_dimensions
from benchmarks.random_checkpoint import (
    OTHER_PRESETS,
    PRESETS,
    count_weights,
    make_config,
    write_random_checkpoint,
    writing_bytes,
)
from benchmarks.static_throughput.machine import free_memory
from server.config import DEMO_MODEL

DEMO = "demo"
PRESET_NAMES = (DEMO, *PRESETS, *OTHER_PRESETS)
GIB = 2**30


class TooLarge(Exception):
    """A preset does not fit: the bytes that it needs, those that there are, and what would fit."""


@dataclass(frozen=True)
class Preset:
    """A checkpoint directory and what stands in its config.json."""

    name: str
    directory: Path
    config: dict[str, Any]

    @property
    def is_random(self) -> bool:
        """Its weights mean nothing, so its tokens need not either."""
        return self.name != DEMO

    @property
    def dtype(self) -> str:
        """Of the weights as they are stored."""
        return self.config["dtype"]

    @property
    def dimensions(self) -> Dimensions:
        """Sizes that bytes are counted with."""
        return parse_dimensions(self.config)

    @property
    def num_weights(self) -> int:
        """Numbers that the target has."""
        return count_weights(self.config)


@contextmanager
def open_preset(name: str, num_engines: int, device: str) -> Iterator[Preset]:
    """The preset's checkpoint, random ones in a temporary directory. Raises TooLarge if so many engines side by side
    cannot have its weights."""
    if name == DEMO:
        config = json.loads((Path(DEMO_MODEL) / "config.json").read_text())
        yield Preset(name, Path(DEMO_MODEL), config)
        return
    config = make_config(name)
    _check_room(name, config, num_engines, device)
    with tempfile.TemporaryDirectory(prefix="tandem-") as directory:
        write_random_checkpoint(Path(directory), name)
        yield Preset(name, Path(directory), config)


def _check_room(name: str, config: dict[str, Any], num_engines: int, device: str) -> None:
    num_bytes = count_weights(config, has_mtp=True) * getattr(torch, config["dtype"]).itemsize
    free, disk = free_memory(device), shutil.disk_usage(tempfile.gettempdir()).free
    size = f"preset {name} does not fit: its weights take {num_bytes} bytes ({num_bytes / GIB:.1f} GiB)"
    if num_bytes * num_engines > free:
        mend = "fewer --mtp-steps, no comparison, or a smaller preset" if num_engines > 1 else "a smaller preset"
        raise TooLarge(
            f"{size} in each of {num_engines} engines that stand side by side, and {free} bytes ({free / GIB:.1f} GiB) "
            f"are free: give {mend}"
        )
    if writing_bytes(config) > free_memory("cpu"):
        raise TooLarge(
            f"{size}, {writing_bytes(config)} while they are drawn, and {free_memory('cpu')} are free: give a smaller "
            "preset"
        )
    if num_bytes > disk:
        raise TooLarge(f"{size}, and {tempfile.gettempdir()} has {disk} free: set TMPDIR to a larger disk")
