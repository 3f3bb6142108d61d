"""Where one checkpoint tensor lives in the model: loading, updating and exporting all go through it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.quantized_linear import QuantizedWeight
from models.safetensors_file import FileTensor


@dataclass(frozen=True)
class WeightSlot:
    """Checkpoint tensor `name` is `param[index]` minus `shift` (norms are stored as 1 + w).

    `shape` is the checkpoint's shape where it differs from that of the part (the convolution's [C, 1, W]). A quantized
    weight takes whole rows, and quantizes them anew whenever they are loaded.
    """

    name: str
    param: nn.Parameter | QuantizedWeight
    index: Any = ...
    shift: float = 0.0
    shape: tuple[int, ...] | None = None

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        return self.shape or tuple(self._part_shape)

    def numel(self) -> int:
        """Numbers of the parameter that this tensor fills."""
        return self._part_shape.numel()

    @property
    def _part_shape(self) -> torch.Size:
        return torch.empty(self.param.shape, device="meta")[self.index].shape

    @torch.no_grad()
    def load(self, tensor: Tensor | FileTensor) -> None:
        """Copy a checkpoint tensor of `checkpoint_shape`, any float dtype, into the model, in place."""
        blocks = tensor.row_blocks() if isinstance(tensor, FileTensor) else [(slice(None), tensor)]
        for rows, values in blocks:
            if isinstance(self.param, QuantizedWeight):
                self.param.store(self._rows(self.param)[rows].flatten(), values.reshape(-1, self.param.in_size))
                continue
            part = self.param.data[self.index][rows]
            part.copy_(values.reshape(part.shape))
            if self.shift:
                part.add_(self.shift)

    @torch.no_grad()
    def export(self) -> Tensor:
        """The checkpoint tensor, a copy in the parameter's dtype; of a quantized weight what is left of it."""
        if isinstance(self.param, QuantizedWeight):
            return self.param.dequantize(self._rows(self.param)).contiguous()
        return (self.param.data[self.index] - self.shift).reshape(self.checkpoint_shape).contiguous()

    def _rows(self, weight: QuantizedWeight) -> Tensor:
        """Which rows of a quantized weight the tensor fills."""
        outputs = weight.shape[:-1]
        return torch.arange(outputs.numel()).view(outputs)[self.index]
