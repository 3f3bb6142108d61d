"""`x · Wᵀ`. For the few rows of a decode step on a CPU: a kernel that reads each weight once for all rows.

torch's own product is the law and serves every other case. N rows, `in` and `out` sizes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.library import load_library
from kernels.cpu.training import LinearProduct, trains
from kernels.quantized_linear import QuantizedWeight, Weight, quantized_linear

MAX_ROWS = 64
_FUNCTIONS = {torch.bfloat16: "linear_bfloat16", torch.float32: "linear_float32", torch.float64: "linear_float64"}
# Below, the other cores are left to what else serving takes.
_PARALLEL_PRODUCTS = 2**22


def linear(x: Tensor, weight: Weight, rounds: bool = True) -> Tensor:
    """x [..., in], weight [out, in] of one dtype or quantized -> [..., out] in x's dtype; unless it `rounds`, as wide
    as it was summed where the product is our own.

    On a CPU, up to MAX_ROWS rows without gradients are summed in float32 or wider, in an order that does not depend on
    the other rows: the same row gives the same bits in any batch. float32 with gradients is multiplied by oneDNN.
    Quantized weights give a row the same bits in batches of any size.
    """
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, rounds)
    if x.device.type == "cpu" and x.numel() <= MAX_ROWS * x.shape[-1] and not torch.is_grad_enabled():
        library = load_library()
        if library is not None and weight.dtype in _FUNCTIONS and weight.is_contiguous():
            out = _linear_cpp(getattr(library, _FUNCTIONS[weight.dtype]), x, weight)
            return out.to(x.dtype) if rounds else out
    if trains(x, weight):
        return LinearProduct.apply(x, weight)
    return F.linear(x, weight)


def _linear_cpp(function: Callable[..., None], x: Tensor, weight: Tensor) -> Tensor:
    out_size, in_size = weight.shape
    inputs = (x.float() if x.dtype == torch.bfloat16 else x).contiguous()
    out = torch.empty(*x.shape[:-1], out_size, dtype=inputs.dtype)
    rows, pointers = inputs.numel() // in_size, (inputs.data_ptr(), weight.data_ptr(), out.data_ptr())
    num_threads = torch.get_num_threads() if rows * weight.numel() >= _PARALLEL_PRODUCTS else 1
    function(*pointers, rows, in_size, out_size, num_threads)
    return out
