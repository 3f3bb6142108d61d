"""The weights that serve, by checkpoint name: loaded, updated in sessions, given back exactly as they came."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels.quantized_linear import QuantizedWeight
from models.errors import WeightUpdateError
from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from models.weight_slot import WeightSlot
from models.weight_update import TensorSpec, WeightUpdate, combine_checksums, hash_tensor
from models.weights import fused_name, load_weights, normalise_name


class WeightStore:
    """Target and draft head as one set of tensors. `generation` counts how often they changed.

    Tensors are given back in the dtype in which they came, if the models keep all of it, else in that of the models;
    quantized ones as what is left of them.
    """

    def __init__(self, target: Qwen35, draft: Qwen35MTP | None, is_quantized: bool = False):
        self.target, self.draft, self.is_quantized, self.generation = target, draft, is_quantized, 0
        self._dtypes: dict[str, torch.dtype] = {}
        assert is_quantized == any(isinstance(slot.param, QuantizedWeight) for slot in self._slots().values())

    def load(self, directory: str | Path, show_progress: bool = True) -> None:
        """Fill the models from a checkpoint. Raises CheckpointError; they may then be half filled."""
        self.record(load_weights(directory, self.target, self.draft, show_progress))

    def begin(
        self,
        *,
        tensors: Sequence[TensorSpec] = (),
        is_partial: bool = False,
        is_delta: bool = False,
        needs_mtp: bool = False,
        result_sha256: str = "",
    ) -> WeightUpdate:
        """Open a session. `tensors`, if there are any, are all that will come, checked here. Raises WeightUpdateError.

        An update that `is_partial` may leave tensors out, one that `is_delta` overwrites some numbers of them. With
        `needs_mtp` the target's alone are refused where a draft head is loaded. `result_sha256`, if given, must be the
        checksum of all tensors afterwards, together with the declared ones that are skipped here; a tensor that is
        served in fewer bits than it comes in counts as it came, for which a quantized one must come whole.
        """
        return WeightUpdate(self, tensors, is_partial, is_delta, needs_mtp, result_sha256)

    def export(self, name: str) -> Tensor:
        """A copy of the tensor of this checkpoint name, in any spelling and expert layout. Raises WeightUpdateError."""
        slots, key = self._slots(), normalise_name(name)
        if key == "lm_head.weight" and self.target.config.tie_word_embeddings:
            key = "model.embed_tokens.weight"
        if key not in slots:
            raise WeightUpdateError(f"there is no tensor {name}: the served ones are named like {next(iter(slots))}")
        return self.export_slot(slots[key])

    def export_slot(self, slot: WeightSlot) -> Tensor:
        """The same of the tensor in this place."""
        return slot.export().to(self.dtype_of(slot))

    def dtype_of(self, slot: WeightSlot) -> torch.dtype:
        """In which dtype it is given back."""
        came = self._dtypes.get(fused_name(slot.name), slot.param.dtype)
        served = slot.param.dtype
        is_kept = not isinstance(slot.param, QuantizedWeight) and torch.promote_types(came, served) == served
        return came if is_kept else served

    def checksums(self) -> dict[str, str]:
        """SHA-256 of each tensor's bytes by the names of `export_tensors`."""
        slots = self._slots().values()
        return {slot.name: hash_tensor(self.export_slot(slot)) for slot in slots if fused_name(slot.name) == slot.name}

    def checksum(self) -> str:
        """One SHA-256 of all: see `combine_checksums`."""
        return combine_checksums(self.checksums())

    def record(self, dtypes: dict[str, torch.dtype]) -> None:
        """Note that these tensors have changed, and in which dtypes they came."""
        self._dtypes |= dtypes
        self.generation += 1

    def _slots(self) -> dict[str, WeightSlot]:
        draft = self.draft.weight_slots() if self.draft else ()
        return {slot.name: slot for slot in (*self.target.weight_slots(), *draft)}
