"""Stream safetensors into a model; export is its inverse.

Checkpoint names are normalised to the text-only spelling (`model.layers.0...`, `mtp.*`); every tensor that is
unexpected, missing, given twice or misshapen is an error that names it.
"""

import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
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
_SCALE_NAMES = ("_scale", "_scale_inv")
_SKIPPED_PREFIXES = ("model.visual.", "visual.", "model.language_model.visual.")


def load_weights(
    directory: str | Path, target: Qwen35, draft: Qwen35MTP | None, show_progress: bool = True
) -> dict[str, torch.dtype]:
    """Fill both models from the checkpoint in `directory`, streaming tensor by tensor; gives the files' dtypes by the
    names of `export_tensors`.

    Raises CheckpointError; the models may then be half filled. Peak memory is that of the models and one block of rows.
    """
    return _fill(_with_progress(_list_tensors(directory, draft), show_progress), target, draft).dtypes


def check_weights(directory: str | Path, target: Qwen35, draft: Qwen35MTP | None) -> int:
    """Raise CheckpointError for what `load_weights` would refuse, from the files' headers alone; returns how many
    tensors there are. The models are on the meta device."""
    tensors = _list_tensors(directory, draft)
    _fill(((name, _without_memory(tensor)) for name, tensor in tensors), target, draft)
    return len(tensors)


def _fill(
    tensors: Iterable[tuple[str, Tensor | FileTensor]], target: Qwen35, draft: Qwen35MTP | None
) -> "WeightCoverage":
    coverage = WeightCoverage(target, draft)
    for name, tensor in tensors:
        slot = coverage.place(name, tensor.shape, tensor.dtype)
        if slot is not None:
            slot.load(tensor)
    coverage.finish()
    coverage.log_skipped()
    return coverage


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
    return {slot.name: slot.export() for slot in slots if fused_name(slot.name) == slot.name}


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


class WeightCoverage:
    """Knows which checkpoint tensor goes where, and what is still missing of the checkpoint, or of what `source` is.

    `slots` are all tensors by name, in both expert layouts; `placed` are the names that came, and `dtypes` theirs by
    the names of `export_tensors`.
    """

    def __init__(self, target: Qwen35, draft: Qwen35MTP | None, source: str = "checkpoint"):
        slots = [*target.weight_slots(), *(draft.weight_slots() if draft else ())]
        self.slots = {slot.name: slot for slot in slots}
        self.source, self.has_draft, self.is_tied = source, draft is not None, target.config.tie_word_embeddings
        self.placed: set[str] = set()
        self.dtypes: dict[str, torch.dtype] = {}
        self.num_skipped: dict[str, int] = {}
        self._num_filled: dict[nn.Parameter | QuantizedWeight, int] = {slot.param: 0 for slot in slots}

    def place(self, raw_name: str, shape: Sequence[int], dtype: torch.dtype | str) -> WeightSlot | None:
        """Where a tensor goes that came; None: nowhere, it is skipped. Raises CheckpointError."""
        name = normalise_name(raw_name)
        if (reason := self.skip_reason(name)) is not None:
            self.num_skipped[reason] = self.num_skipped.get(reason, 0) + 1
            return None
        slot = self.slots.get(name)
        if slot is None:
            is_scale = name.endswith(_SCALE_NAMES)
            why = "it belongs to quantized weights: send unquantized ones" if is_scale else "Qwen3.5 has no such weight"
            raise CheckpointError(f"unexpected tensor {raw_name} {list(shape)}: {why}")
        if dtype not in _SERVED_TYPES:
            raise CheckpointError(f"tensor {raw_name} is {dtype}: only BF16, F16, F32 and F64 are served")
        if tuple(shape) != slot.checkpoint_shape:
            raise CheckpointError(
                f"tensor {raw_name} has shape {list(shape)}, config.json asks for {list(slot.checkpoint_shape)}"
            )
        if name in self.placed:
            raise CheckpointError(f"tensor {raw_name} is in the {self.source} twice")
        self.placed.add(name)
        self._num_filled[slot.param] += slot.numel()
        stored = FLOAT_TYPES[dtype] if isinstance(dtype, str) else dtype
        key = fused_name(name)
        self.dtypes[key] = torch.promote_types(self.dtypes.get(key, stored), stored)
        return slot

    def finish(self, is_partial: bool = False, needs_draft: bool = True) -> None:
        """Raises CheckpointError unless every parameter was filled exactly once.

        What `is_partial` may leave tensors out; without `needs_draft` the draft's may be missing all together.
        """
        for param, count in self._num_filled.items():
            if count > param.numel():
                names = [name for name in self.placed if self.slots[name].param is param]
                raise CheckpointError(f"tensors overlap (fused and per-expert): {', '.join(sorted(names)[:4])}")
        lacks_draft = not needs_draft and not self.has_draft_come
        names = [slot.name for slot in self.slots.values() if not is_partial and self._is_missing(slot)]
        names = [name for name in names if not (lacks_draft and name.startswith("mtp."))]
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise CheckpointError(f"the {self.source} lacks {', '.join(names[:8])}{more}")

    def log_skipped(self) -> None:
        """Say what was skipped, and why."""
        for reason, count in self.num_skipped.items():
            logger.info("skipped %d %s tensors", count, reason)

    @property
    def has_draft_come(self) -> bool:
        """Whether any tensor of the draft head did."""
        return any(name.startswith("mtp.") for name in self.placed)

    def is_filled(self, name: str) -> bool:
        """Whether all of the tensor came, in one piece or expert by expert."""
        slot = self.slots[name]
        return self._num_filled[slot.param] >= slot.param.numel() or name in self.placed

    def _is_missing(self, slot: WeightSlot) -> bool:
        """Of two expert layouts, name the per-expert tensors only where some of them came."""
        if self.is_filled(slot.name):
            return False
        some_came = self._num_filled[slot.param] > 0
        is_fused_alternative = slot.numel() == slot.param.numel() and slot.param.dim() == 3
        return is_fused_alternative != some_came if slot.param.dim() == 3 else True

    def skip_reason(self, name: str) -> str | None:
        """Why a tensor of this normalised name is not looked at; None: it is."""
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


def fused_name(name: str) -> str:
    """The exported tensor that a normalised name is a part of: that of all experts for one expert's, else itself."""
    stem, _, rest = name.partition(".experts.")
    expert, _, matrix = rest.partition(".")
    if not expert.isdigit():
        return name
    return f"{stem}.experts.{'down_proj' if matrix.startswith('down_proj') else 'gate_up_proj'}"


def _list_tensors(directory: str | Path, draft: Qwen35MTP | None) -> list[tuple[str, FileTensor]]:
    files = list_weight_files(Path(directory))
    tensors = [item for file in files for item in read_tensor_index(file).items()]
    if draft is not None and not any(normalise_name(name) == "mtp.fc.weight" for name, _ in tensors):
        raise CheckpointError(f"{directory} has no mtp.fc.weight: it carries no draft head, serve it with --mtp-step 0")
    return tensors


def _without_memory(tensor: FileTensor) -> Tensor | FileTensor:
    dtype = FLOAT_TYPES.get(tensor.dtype)
    return tensor if dtype is None else torch.empty(tensor.shape, dtype=dtype, device="meta")


def _with_progress(tensors: list[tuple[str, FileTensor]], show_progress: bool) -> Iterator[tuple[str, FileTensor]]:
    total = sum(tensor.num_bytes for _, tensor in tensors)
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not show_progress) as bar:
        for name, tensor in tensors:
            yield name, tensor
            bar.update(tensor.num_bytes)
