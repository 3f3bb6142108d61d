"""Stream safetensors into a model. Loading and updating in place are the same function; export is its inverse.

Checkpoint names are normalised to the text-only spelling (`model.layers.0...`, `mtp.*`); every tensor that is
unexpected, missing, given twice or misshapen is an error that names it.
"""

import logging
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from kernels.quantized_linear import QuantizedWeight
from models.config import read_json
from models.errors import CheckpointError
from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from models.safetensors_file import FLOAT_TYPES, FileTensor, read_tensor_index
from models.weight_slot import WeightSlot

logger = logging.getLogger(__name__)

_PREFIXES = ("model.language_model.", "language_model.model.")
_SERVED_TYPES = {*FLOAT_TYPES.keys(), *FLOAT_TYPES.values()}
_SKIPPED_PREFIXES = ("model.visual.", "visual.", "model.language_model.visual.")


def load_weights(directory: str | Path, target: Qwen35, draft: Qwen35MTP | None, show_progress: bool = True) -> None:
    """Fill both models from the checkpoint in `directory`, streaming tensor by tensor.

    Raises CheckpointError. Peak memory is that of the models and one block of rows.
    """
    update_weights(_with_progress(_list_tensors(directory, draft), show_progress), target, draft)


def check_weights(directory: str | Path, target: Qwen35, draft: Qwen35MTP | None) -> int:
    """Raise CheckpointError for what `load_weights` would refuse, from the files' headers alone; returns how many
    tensors there are. The models are on the meta device."""
    tensors = _list_tensors(directory, draft)
    update_weights(((name, _without_memory(tensor)) for name, tensor in tensors), target, draft)
    return len(tensors)


@torch.no_grad()
def update_weights(tensors: Iterable[tuple[str, Tensor | FileTensor]], target: Qwen35, draft: Qwen35MTP | None) -> None:
    """Copy (checkpoint name, tensor) pairs into the models, in place; all parameters must be covered exactly once.

    Raises CheckpointError naming the tensor; the models may then be half updated.
    """
    filler = _Filler(target, draft)
    for name, tensor in tensors:
        filler.fill(name, tensor)
    filler.finish()


@torch.no_grad()
def fill_randomly(target: Qwen35, draft: Qwen35MTP | None, seed: int = 0) -> None:
    """Random weights made where they lie, under which activations stay of ordinary size: for speed only."""
    for model in (target, draft):
        for name, param in model.named_parameters() if model else ():
            if name.endswith((".words", ".scales")):
                continue
            generator = torch.Generator(param.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            if name.endswith(("scale", "norm_weight")):
                param.fill_(1.0)
            else:
                param.normal_(0, param.shape[-1] ** -0.5 if param.dim() > 1 else 0.5, generator=generator)
        for name, weight in model.named_modules() if model else ():
            if isinstance(weight, QuantizedWeight):
                weight.fill_randomly(torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())))


def export_tensors(target: Qwen35, draft: Qwen35MTP | None) -> dict[str, Tensor]:
    """The models' weights by checkpoint name (fused experts), as copies in the parameters' dtypes."""
    slots = [*target.weight_slots(), *(draft.weight_slots() if draft else ())]
    return {slot.name: slot.export() for slot in slots if not _is_per_expert(slot.name)}


def save_weights(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file as Hugging Face does."""
    save_file(tensors, path, metadata={"format": "pt"})


def list_weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or those of its index. Raises CheckpointError for a missing one."""
    if (single := directory / "model.safetensors").exists():
        return [single]
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory} has no *.safetensors file, the only weight format that is served")
        return files
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
    files = [directory / name for name in sorted(set(weight_map.values()))]
    if missing := [file for file in files if not file.exists()]:
        raise CheckpointError(f"{missing[0]} is named by {index.name} but missing: download the shard again")
    return files


class _Filler:
    """Knows which checkpoint tensor goes where, and what is still missing."""

    def __init__(self, target: Qwen35, draft: Qwen35MTP | None):
        slots = [*target.weight_slots(), *(draft.weight_slots() if draft else ())]
        self.slots = {slot.name: slot for slot in slots}
        self.has_draft = draft is not None
        self.is_tied = target.config.tie_word_embeddings
        self.seen: set[str] = set()
        self.num_filled: dict[nn.Parameter | QuantizedWeight, int] = {slot.param: 0 for slot in slots}
        self.num_skipped: dict[str, int] = {}

    def fill(self, raw_name: str, tensor: Tensor | FileTensor) -> None:
        name = normalise_name(raw_name)
        if (reason := self._skip_reason(name)) is not None:
            self.num_skipped[reason] = self.num_skipped.get(reason, 0) + 1
            return
        slot = self.slots.get(name)
        if slot is None:
            raise CheckpointError(f"unexpected tensor {raw_name} {list(tensor.shape)}: Qwen3.5 has no such weight")
        if tuple(tensor.shape) != slot.checkpoint_shape:
            raise CheckpointError(
                f"tensor {raw_name} has shape {list(tensor.shape)}, config.json asks for {list(slot.checkpoint_shape)}"
            )
        if tensor.dtype not in _SERVED_TYPES:
            raise CheckpointError(f"tensor {raw_name} is {tensor.dtype}: only BF16, F16, F32 and F64 are served")
        if name in self.seen:
            raise CheckpointError(f"tensor {raw_name} is in the checkpoint twice")
        self.seen.add(name)
        self.num_filled[slot.param] += slot.numel()
        slot.load(tensor)

    def finish(self) -> None:
        """Raises CheckpointError unless every parameter was filled exactly once; logs what was skipped."""
        for param, count in self.num_filled.items():
            if count > param.numel():
                names = [name for name in self.seen if self.slots[name].param is param]
                raise CheckpointError(f"tensors overlap (fused and per-expert): {', '.join(sorted(names)[:4])}")
        missing = [slot for slot in self.slots.values() if self._is_missing(slot)]
        if missing:
            names = [slot.name for slot in missing]
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise CheckpointError(f"the checkpoint lacks {', '.join(names[:8])}{more}")
        for reason, count in self.num_skipped.items():
            logger.info("skipped %d %s tensors", count, reason)

    def _is_missing(self, slot: WeightSlot) -> bool:
        """Of two expert layouts, name the per-expert tensors only where some of them came."""
        if self.num_filled[slot.param] == slot.param.numel() or slot.name in self.seen:
            return False
        some_came = self.num_filled[slot.param] > 0
        is_fused_alternative = slot.numel() == slot.param.numel() and slot.param.dim() == 3
        return is_fused_alternative != some_came if slot.param.dim() == 3 else True

    def _skip_reason(self, name: str) -> str | None:
        if name.startswith(_SKIPPED_PREFIXES):
            return "vision"
        if name.startswith("mtp.") and not self.has_draft:
            return "draft head (mtp.*)"
        if name == "lm_head.weight" and self.is_tied:
            return "tied lm_head"
        return None


def normalise_name(name: str) -> str:
    """`model.language_model.x` and `language_model.model.x` -> `model.x`; `language_model.lm_head.x` -> `lm_head.x`."""
    if name.startswith(_SKIPPED_PREFIXES):
        return name
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name.removeprefix("language_model.")


def _list_tensors(directory: str | Path, draft: Qwen35MTP | None) -> list[tuple[str, FileTensor]]:
    files = list_weight_files(Path(directory))
    tensors = [item for file in files for item in read_tensor_index(file).items()]
    if draft is not None and not any(normalise_name(name) == "mtp.fc.weight" for name, _ in tensors):
        raise CheckpointError(f"{directory} has no mtp.fc.weight: it carries no draft head, serve it with --mtp-step 0")
    return tensors


def _without_memory(tensor: FileTensor) -> Tensor | FileTensor:
    dtype = FLOAT_TYPES.get(tensor.dtype)
    return tensor if dtype is None else torch.empty(tensor.shape, dtype=dtype, device="meta")


def _is_per_expert(name: str) -> bool:
    return ".experts." in name and name.split(".experts.")[1].split(".")[0].isdigit()


def _with_progress(tensors: list[tuple[str, FileTensor]], show_progress: bool) -> Iterator[tuple[str, FileTensor]]:
    total = sum(tensor.num_bytes for _, tensor in tensors)
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not show_progress) as bar:
        for name, tensor in tensors:
            yield name, tensor
            bar.update(tensor.num_bytes)
