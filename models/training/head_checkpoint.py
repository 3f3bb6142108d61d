"""A checkpoint whose draft head is trained: target and head out of it, and a copy of it with other head weights.

What training did not touch is copied byte for byte: other files, other tensors, and of trained tensors the elements
that still have their value. Tensors are found under the names and in the expert layout (fused or one by one) that the
checkpoint has them in. Knows files and tensors, never how they were trained.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.config import MTP_COUNTS, ModelConfig, read_json
from models.qwen3_5.model import Qwen35
from models.qwen3_5_moe_mtp.model import build_draft as build_moe_draft
from models.qwen3_5_mtp.model import Qwen35MTP
from models.registry import build
from models.safetensors_file import FLOAT_TYPES, FileTensor, read_tensor_index
from models.training.demo_trainer import initialize
from models.training.mtp_settings import TrainingError
from models.weight_slot import WeightSlot
from models.weights import list_weight_files, load_weights, normalise_name

_DIGESTED_BYTES = 1 << 12  # of each tensor; training changes numbers everywhere
_DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}


def load_models(
    directory: Path,
    config: ModelConfig,
    random_head: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Qwen35, Qwen35MTP]:
    """The target in `dtype` and its head in float32 or wider, from the checkpoint or random.

    Raises CheckpointError, and TrainingError naming the head's tensors that the checkpoint lacks.
    """
    target, _ = build(config, mtp=False, dtype=dtype, device=device)
    load_weights(directory, target, None, show_progress=False)
    return target, load_head(directory, config, target, random_head, device)


def load_head(
    directory: Path | None, config: ModelConfig, target: Qwen35, random_head: bool = False, device: str = "cpu"
) -> Qwen35MTP:
    """The head of a target, from `directory` or random. Raises TrainingError naming the tensors that are missing."""
    wide = torch.promote_types(target.lm_head.weight.dtype, torch.float32)
    with torch.device(device):
        draft = (build_moe_draft if config.is_moe else Qwen35MTP)(config, wide, target)
    if random_head or directory is None:
        initialize(draft)
        return draft
    stored = {normalise_name(name): tensor for name, tensor in read_tensors(directory).items()}
    names = choose_layout(draft, stored)
    if missing := [name for name in names if name not in stored]:
        more = f" and {len(missing) - 16} more" if len(missing) > 16 else ""
        raise TrainingError(
            f"{directory} lacks {', '.join(missing[:16])}{more}: config.json promises {config.num_mtp_layers} "
            "MTP layers; get the complete checkpoint, or start from a new head (--mtp-init random)"
        )
    for name, slot in names.items():
        if tuple(stored[name].shape) != slot.checkpoint_shape:
            found, expected = list(stored[name].shape), list(slot.checkpoint_shape)
            raise TrainingError(f"tensor {name} has shape {found}, config.json asks for {expected}")
        slot.load(stored[name])
    return draft


def read_tensors(directory: Path) -> dict[str, FileTensor]:
    """Every tensor of a checkpoint by its name there. Raises CheckpointError."""
    return {name: tensor for file in list_weight_files(directory) for name, tensor in read_tensor_index(file).items()}


def digest_checkpoint(directory: Path) -> str:
    """Changes with config.json, and with name, type, shape and first bytes of every tensor. Raises CheckpointError."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for name, tensor in read_tensors(directory).items():
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            digest.update(file.read(min(tensor.num_bytes, _DIGESTED_BYTES)))
    return digest.hexdigest()[:16]


def choose_layout(model: nn.Module, stored: Mapping[str, Any]) -> dict[str, WeightSlot]:
    """The model's slots by name, of the two expert layouts the one that the (normalised) stored names have: the same
    matrix's, else that of any other layer, else fused."""
    slots = {slot.name: slot for slot in model.weight_slots()}  # type: ignore[operator]
    split_somewhere = any(_is_of_one_expert(name) for name in stored) and not any(_is_fused(name) for name in stored)
    chosen = {}
    for name, slot in slots.items():
        stem = name.split(".experts.")[0]
        is_split = any(other.startswith(f"{stem}.experts.0.") for other in stored) or (
            split_somewhere and f"{stem}.experts.gate_up_proj" not in stored
        )
        if not (_is_of_one_expert(name) and not is_split) and not (_is_fused(name) and is_split):
            chosen[name] = slot
    return chosen


def save_checkpoint(source: Path, out: Path, models: list[nn.Module]) -> None:
    """Copy the checkpoint `source` to the new directory `out` with the weights of `models` (a head, a target or both).

    A head that the checkpoint had not is added to its last file and to its index and counted in config.json. `out`
    appears when it is complete; one that is there is replaced by then.
    """
    stored = read_tensors(source)
    by_name = {normalise_name(name): name for name in stored}
    slots = {by_name.get(name, name): slot for model in models for name, slot in choose_layout(model, by_name).items()}
    head, embedding = by_name.get("lm_head.weight"), by_name.get("model.embed_tokens.weight")
    if head is not None and head not in slots and embedding in slots:
        slots[head] = slots[embedding]  # a tied head that is stored all the same
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    files = list_weight_files(source)
    weights = {file.name for file in files}
    shutil.copytree(source, partial, ignore=lambda folder, _: weights if Path(folder) == source else set())
    added = {name: slot for name, slot in slots.items() if name not in stored}
    for file in files:
        changed = {name: slot for name, slot in slots.items() if name in stored and stored[name].file == file}
        copy_with_tensors(file, partial / file.name, changed, added if file == files[-1] else {})
    if added:
        _add_to_index(partial, files[-1].name, added, stored)
    _count_layers(partial / "config.json", slots)
    _replace(partial, out)


def copy_with_tensors(
    source: Path, out: Path, changed: Mapping[str, WeightSlot], added: Mapping[str, WeightSlot]
) -> None:
    """Copy a safetensors file, with the values of `changed` tensors in their stored dtypes and `added` ones behind all
    others. Without added tensors the copy differs in the changed bytes alone."""
    index = read_tensor_index(source)
    dtypes = [FLOAT_TYPES[tensor.dtype] for tensor in index.values() if tensor.dtype in FLOAT_TYPES]
    payloads = {name: slot.export().cpu().to(_dtype_for(slot, dtypes)) for name, slot in added.items()}
    with source.open("rb") as reader, out.open("wb") as writer:
        length = int.from_bytes(reader.read(8), "little")
        header, moved = reader.read(length), 0
        if payloads:
            end = source.stat().st_size - 8 - length
            header = _extend_header(header, payloads, end)
            moved = len(header) - length
        writer.write(len(header).to_bytes(8, "little") + header)
        shutil.copyfileobj(reader, writer, 1 << 24)
        for tensor in payloads.values():
            writer.write(_bytes_of(tensor))
        for name, slot in changed.items():
            writer.seek(index[name].start + moved)
            writer.write(_bytes_of(_merge(index[name], slot)))


def _merge(stored: FileTensor, slot: WeightSlot) -> Tensor:
    """The slot's values in the stored dtype; the stored ones where these come out of the model as they went in."""
    dtype = FLOAT_TYPES[stored.dtype]
    old = torch.cat([values for _, values in stored.row_blocks()])
    new = slot.export().cpu()
    return torch.where(new == old.to(slot.param.dtype), old, new.to(dtype))


def _extend_header(header: bytes, tensors: Mapping[str, Tensor], end: int) -> bytes:
    """The header with tensors that follow byte `end` of the data, padded to 8 bytes."""
    entries = json.loads(header)
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _add_to_index(folder: Path, file: str, added: Mapping[str, WeightSlot], stored: Mapping[str, FileTensor]) -> None:
    """Name the added tensors in the index, if there is one."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return
    index = read_json(path)
    index["weight_map"].update(dict.fromkeys(added, file))
    num_bytes = sum(tensor.num_bytes for tensor in read_tensor_index(folder / file).values())
    num_bytes += sum(tensor.num_bytes for tensor in stored.values() if tensor.file.name != file)
    index.setdefault("metadata", {})["total_size"] = num_bytes
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _count_layers(path: Path, slots: Mapping[str, WeightSlot]) -> None:
    """Count the head's layers in a config.json that knows of none."""
    config = read_json(path)
    text = config.get("text_config", config)
    names = [normalise_name(name).split(".") for name in slots]
    num_layers = len({name[2] for name in names if name[:2] == ["mtp", "layers"]})
    if num_layers and not any(text.get(name) for name in MTP_COUNTS):
        text["mtp_num_hidden_layers"] = num_layers
        path.write_text(json.dumps(config, indent=2) + "\n")


def _replace(partial: Path, out: Path) -> None:
    """Rename a complete directory to its place; one that stands there leaves by a rename, too."""
    old = out.with_name(f"{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def _dtype_for(slot: WeightSlot, dtypes: list[torch.dtype]) -> torch.dtype:
    """That of most tensors in the file."""
    return max(set(dtypes), key=dtypes.count) if dtypes else slot.param.dtype


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _is_of_one_expert(name: str) -> bool:
    return ".experts." in name and name.split(".experts.")[1].split(".")[0].isdigit()


def _is_fused(name: str) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
