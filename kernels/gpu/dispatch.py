"""Which tensors the Triton kernels of this folder take: those on a GPU, and in tests those of the interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_devices = {"cuda"}


def runs_triton(x: Tensor) -> bool:
    """Whether an op on x is Triton's: on a GPU without gradients. float64, which removes rounding from a comparison, is
    always torch's."""
    return x.device.type in _devices and x.dtype != torch.float64 and not torch.is_grad_enabled()


@contextmanager
def triton_takes(device: str) -> Iterator[None]:
    """Inside, tensors on `device` are Triton's, too: for tests without a GPU. "cpu" needs Triton's interpreter
    (TRITON_INTERPRET=1 when triton is imported), "meta" somebody who records the launches."""
    _devices.add(device)
    try:
        yield
    finally:
        _devices.remove(device)


def is_interpreted() -> bool:
    """Whether Triton interprets kernels that are imported now: its bf16 products are wrong, so operands go in as
    float32 there."""
    import triton

    return bool(triton.knobs.runtime.interpret)
