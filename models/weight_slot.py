"""Where one checkpoint tensor lives in the model: loading, updating and exporting all go through it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.safetensors_file import FileTensor


@dataclass(frozen=True)
class WeightSlot:
    """Checkpoint tensor `name` is `param[index]` minus `shift` (norms are stored as 1 + w).

    `shape` is the checkpoint's shape where it differs from that of the view (the convolution's [C, 1, W]).
    """

    name: str
    param: nn.Parameter
    index: Any = ...
    shift: float = 0.0
    shape: tuple[int, ...] | None = None

    @property
    def view(self) -> Tensor:
        """The part of the parameter that this tensor fills; writing to it writes the model."""
        return self.param.data[self.index]

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        return self.shape or tuple(self.view.shape)

    @torch.no_grad()
    def load(self, tensor: Tensor | FileTensor) -> None:
        """Copy a checkpoint tensor of `checkpoint_shape`, any float dtype, into the model, in place."""
        blocks = tensor.row_blocks() if isinstance(tensor, FileTensor) else [(slice(None), tensor)]
        for rows, values in blocks:
            part = self.view[rows]
            part.copy_(values.reshape(part.shape))
            if self.shift:
                part.add_(self.shift)

    @torch.no_grad()
    def export(self) -> Tensor:
        """The checkpoint tensor, a copy in the parameter's dtype."""
        return (self.view - self.shift).reshape(self.checkpoint_shape).contiguous()
