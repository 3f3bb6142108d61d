"""`x · Wᵀ`. For the few rows of a decode step on a CPU: a kernel that reads each weight once for all rows.

torch's own product is the law and serves every other case. N rows, `in` and `out` sizes.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.library import load_library

MAX_ROWS = 64
_FUNCTIONS = {torch.bfloat16: "linear_bfloat16", torch.float32: "linear_float32", torch.float64: "linear_float64"}
_PARALLEL_ELEMENTS = 2**16


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in], weight [out, in] of one dtype -> [..., out].

    On a CPU, up to MAX_ROWS rows without gradients are summed in float32 or wider, in an order that does not depend on
    the other rows: the same row gives the same bits in any batch.
    """
    if x.device.type == "cpu" and x.numel() <= MAX_ROWS * x.shape[-1] and not torch.is_grad_enabled():
        library = load_library()
        if library is not None and weight.dtype in _FUNCTIONS and weight.is_contiguous():
            return _linear_cpp(library, x, weight)
    return F.linear(x, weight)


def _linear_cpp(library: ctypes.CDLL, x: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    out_size, in_size = weight.shape
    inputs = x.to(wide).contiguous()
    out = torch.empty(*x.shape[:-1], out_size, dtype=wide)
    getattr(library, _FUNCTIONS[weight.dtype])(
        ctypes.c_void_p(inputs.data_ptr()),
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(inputs.numel() // in_size),
        ctypes.c_int64(in_size),
        ctypes.c_int64(out_size),
        torch.get_num_threads() if weight.numel() >= _PARALLEL_ELEMENTS else 1,
    )
    return out.to(x.dtype)
