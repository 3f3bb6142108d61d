"""Where one checkpoint tensor lives in the model: loading, updating and exporting all go through it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.quantized_linear import QuantizedWeight
from models.safetensors_file import FileTensor


@dataclass(frozen=True)
class WeightSlot:
    """Checkpoint tensor `name` is `param[index]` minus `shift` (norms are stored as 1 + w).

    `shape` is the checkpoint's shape where it differs from that of the part (the convolution's [C, 1, W]). `unshifted`
    keeps what was loaded, because (1 + w) - 1 is not w. A quantized weight takes whole rows, and quantizes them anew
    whenever they are loaded.
    """

    name: str
    param: nn.Parameter | QuantizedWeight
    index: Any = ...
    shift: float = 0.0
    shape: tuple[int, ...] | None = None
    unshifted: Tensor | None = None

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        return self.shape or tuple(self._part_shape)

    def numel(self) -> int:
        """Numbers of the parameter that this tensor fills."""
        return self._part_shape.numel()

    @property
    def _part_shape(self) -> torch.Size:
        return torch.empty(self.param.shape, device="meta")[self.index].shape

    def load(self, tensor: Tensor | FileTensor) -> None:
        """Copy a checkpoint tensor of `checkpoint_shape`, any float dtype, into the model, in place."""
        for rows, values in row_blocks(tensor):
            self.load_rows(rows, values)

    @torch.no_grad()
    def load_rows(self, rows: slice, values: Tensor) -> None:
        """The same of these rows of the checkpoint tensor."""
        if isinstance(self.param, QuantizedWeight):
            self.param.store(self._rows(self.param)[rows].flatten(), values.reshape(-1, self.param.in_size))
            return
        part = self.param.data[self.index][rows]
        part.copy_(values.reshape(part.shape))
        if self.unshifted is not None:
            self.unshifted[rows].copy_(part)
        if self.shift:
            part.add_(self.shift)

    @torch.no_grad()
    def export(self) -> Tensor:
        """The checkpoint tensor, a copy in the parameter's dtype; of a quantized weight what is left of it."""
        if isinstance(self.param, QuantizedWeight):
            return self.param.dequantize(self._rows(self.param)).contiguous()
        part = self.param.data[self.index]
        values = part - self.shift if self.shift else part.clone()
        if self.unshifted is not None:  # a trained parameter has moved away from it
            values = torch.where(self.unshifted + self.shift == part, self.unshifted, values)
        return values.reshape(self.checkpoint_shape).contiguous()

    def shadow(self) -> "WeightSlot":
        """A slot for the same tensor in host memory of its own, whose content means nothing yet."""
        assert isinstance(self.param, Tensor)
        part = self.param.data[self.index]
        memory = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        unshifted = None if self.unshifted is None else torch.empty_like(self.unshifted, device="cpu")
        return replace(self, param=nn.Parameter(memory, requires_grad=False), index=..., unshifted=unshifted)

    def memory(self) -> list[Tensor]:
        """All that a tensor which is not quantized fills, each flat and in place."""
        assert isinstance(self.param, Tensor)
        parts = [self.param.data[self.index], *([] if self.unshifted is None else [self.unshifted])]
        return [part.view(-1) for part in parts]

    def _rows(self, weight: QuantizedWeight) -> Tensor:
        """Which rows of a quantized weight the tensor fills."""
        outputs = weight.shape[:-1]
        return torch.arange(outputs.numel()).view(outputs)[self.index]


def row_blocks(tensor: Tensor | FileTensor) -> Iterable[tuple[slice, Tensor]]:
    """(rows, their values): all at once of a tensor in memory, some after the other of one in a file."""
    return tensor.row_blocks() if isinstance(tensor, FileTensor) else [(slice(None), tensor)]
