"""A Hugging Face directory: its weights by text-only name, and a copy of it with some weights renewed.

All other tensors keep their bytes: files without a renewed tensor are copied as they are (or linked, in place), files
with one are written again without it, and the new weights get files of their own.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.config import ModelConfig, parse_config, read_json
from models.conversion.lazy_tensor import LazyTensor, from_file
from models.conversion.staging import staged
from models.errors import CheckpointError
from models.safetensors_file import FLOAT_TYPES, FileTensor, read_tensor_index
from models.weights import list_weight_files, normalise_name

INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 4 << 30
_VISION = ("model.visual.", "visual.", "model.language_model.visual.")


@dataclass
class HuggingFaceDirectory:
    """What a directory holds. `names` maps text-only names to those in the files."""

    path: Path
    config: ModelConfig
    is_nested: bool
    files: list[Path] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, FileTensor] = field(default_factory=dict)

    def lazy(self, name: str) -> LazyTensor:
        """The tensor of this text-only name. Raises CheckpointError when it is quantised."""
        return from_file(self.names[name], self.tensors[name])

    def is_packed(self, layer: str) -> bool:
        """Whether the layer's experts are in one tensor. Unseen layers follow Qwen3.5: trunk packed, head not."""
        if f"{layer}.mlp.experts.gate_up_proj" in self.names:
            return True
        is_split = f"{layer}.mlp.experts.0.gate_proj.weight" in self.names
        return not is_split and not layer.startswith("mtp.")

    def dtype_of(self, name: str) -> torch.dtype:
        """That of the tensor; of config.json where there is none."""
        if name in self.tensors and self.tensors[name].dtype in FLOAT_TYPES:
            return FLOAT_TYPES[self.tensors[name].dtype]
        found = getattr(torch, self.config.dtype, None)
        if not isinstance(found, torch.dtype):
            raise CheckpointError(
                f"{self.path}/config.json: dtype is {self.config.dtype!r}, torch has none of this name"
            )
        return found

    def spell(self, name: str) -> str:
        """A text-only name as this directory spells it; the head is always `mtp.*`."""
        if name in self.names or name.startswith("mtp."):
            return self.names.get(name, name)
        is_outer = any(raw.startswith("language_model.") for raw in self.names.values())
        if not name.startswith("model."):
            return f"language_model.{name}" if is_outer else name
        prefix = "language_model.model." if is_outer else "model.language_model." if self.is_nested else "model."
        return prefix + name.removeprefix("model.")


def open_hugging_face(path: Path, needs_weights: bool = True) -> HuggingFaceDirectory:
    """Read config and tensor names. Raises CheckpointError for an unknown family, quantised or broken weights, names of
    the MTP depth that contradict each other, and a tensor that is there twice."""
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json: a Hugging Face directory is needed")
    outer = read_json(path / "config.json")
    found = HuggingFaceDirectory(path, parse_config(outer), "text_config" in outer)
    if not needs_weights and not (path / INDEX).exists() and not any(path.glob("*.safetensors")):
        return found
    found.files = list_weight_files(path)
    for file in found.files:
        for raw_name, tensor in read_tensor_index(file).items():
            name = normalise_name(raw_name)
            if name in found.names:
                raise CheckpointError(f"tensor {raw_name} is in {path} twice, in {file.name} and {found.names[name]}")
            found.names[name], found.tensors[name] = raw_name, tensor
    return found


def is_vision(name: str) -> bool:
    """Whether a tensor belongs to the vision tower."""
    return name.startswith(_VISION)


def renew(
    base: HuggingFaceDirectory, replaced: set[str], tensors: Iterable[tuple[str, Tensor]], out: Path, in_place: bool
) -> None:
    """Write `base` to `out` (in_place: to itself) with `tensors` instead of those named in `replaced`.

    Names are text-only ones. The new directory appears whole or not at all. Raises CheckpointError.
    """
    with staged(out, replace=in_place) as folder:
        _copy_others(base, folder, in_place)
        kept = [file for file in base.files if _keep(base, file, replaced, folder, in_place)]
        files = [folder / file.name for file in kept] + list(_write_files(base, tensors, folder))
        _number(folder, files, base)


def _copy_others(base: HuggingFaceDirectory, folder: Path, in_place: bool) -> None:
    """Everything that is no weight file and no index."""
    ours = {file.name for file in base.files} | {INDEX}
    for entry in base.path.iterdir():
        if entry.name in ours:
            continue
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name, symlinks=in_place)
        else:
            _copy(entry, folder / entry.name, in_place)


def _copy(source: Path, target: Path, in_place: bool) -> None:
    """In place, a second name for the same bytes is enough: the first one goes."""
    if not in_place:
        shutil.copy2(source, target)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _keep(base: HuggingFaceDirectory, file: Path, replaced: set[str], folder: Path, in_place: bool) -> bool:
    """Put the file's other tensors into the folder under its name; whether there are any."""
    mine = [name for name, tensor in base.tensors.items() if tensor.file == file]
    others = [base.names[name] for name in mine if name not in replaced]
    if len(others) == len(mine):
        _copy(file, folder / file.name, in_place)
    elif others:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            _save({name: opened.get_tensor(name) for name in others}, folder / file.name, metadata)
    return bool(others)


def _write_files(base: HuggingFaceDirectory, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> Iterator[Path]:
    """New files of at most MAX_FILE_BYTES, or of one tensor."""
    batch: dict[str, Tensor] = {}
    num_files = num_bytes = 0
    for name, tensor in tensors:
        if batch and num_bytes + tensor.nbytes > MAX_FILE_BYTES:
            yield _save(batch, folder / f"new-{num_files}.safetensors", {"format": "pt"})
            batch, num_files, num_bytes = {}, num_files + 1, 0
        batch[base.spell(name)] = tensor.contiguous()
        num_bytes += tensor.nbytes
    if batch:
        yield _save(batch, folder / f"new-{num_files}.safetensors", {"format": "pt"})


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> Path:
    save_file(tensors, path, metadata=metadata)
    path.chmod(0o644)
    return path


def _number(folder: Path, files: list[Path], base: HuggingFaceDirectory) -> None:
    """Name the files as Hugging Face does, one `model.safetensors` or numbered ones with an index."""
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    total = 0
    waiting = [file.rename(folder / f"{index}.renamed") for index, file in enumerate(files)]
    for index, file in enumerate(waiting):
        name = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = read_tensor_index(file.rename(folder / name))
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.num_bytes for tensor in tensors.values())
    old: dict[str, Any] = read_json(base.path / INDEX) if (base.path / INDEX).exists() else {}
    index_fields = old | {"metadata": {**old.get("metadata", {}), "total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index_fields, indent=2) + "\n", encoding="utf-8")
