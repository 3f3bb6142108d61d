"""The small operations of a training step in one call of C++ each, with gradients, and products by oneDNN.

The laws stand in kernels/; autograd over them makes dozens of passes over memory where one will do, and what torch
multiplies float32 with leaves half of some processors' vectors idle. Float32 on a CPU with a compiler only: float64
stays on the laws, which are the oracle. Results are the same bits every time and with any number of threads.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kernels.cpu.library import load_library
from kernels.gpu.dispatch import runs_triton

_PARALLEL_ELEMENTS = 2**14


def runs(*tensors: Tensor) -> bool:
    """Whether whole sequences of these tensors may take this way."""
    is_plain = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
    return is_plain and not runs_triton(tensors[0]) and load_library() is not None


def trains(*tensors: Tensor) -> bool:
    """Whether an operation that serving uses as well may: not without gradients, nor under autocast."""
    return torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and runs(*tensors)


def call(name: str, *arguments: Any) -> None:
    """The library's function, on addresses of tensors and structures."""
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    getattr(load_library(), f"{name}_float32")(
        *(ctypes.byref(x) if isinstance(x, ctypes.Structure) else x for x in values)
    )


def num_threads(x: Tensor) -> int:
    """How many threads work on so many elements is worth."""
    return torch.get_num_threads() if x.numel() >= _PARALLEL_ELEMENTS else 1


class _HeadRows(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("count", "heads", "dim", "stride", "head_stride")]


class _Rotation(ctypes.Structure):
    _fields_ = [
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("half", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    ]


def _head_rows(x: Tensor) -> tuple[Tensor, _HeadRows]:
    """x [..., heads, D] as [N, heads, D], a view where it can be one, and how it lies."""
    x = x.reshape(-1, *x.shape[-2:])
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x, _HeadRows(*x.shape, x.stride(0), x.stride(1))


class LinearProduct(Function):
    """`x · Wᵀ`: see kernels/linear.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_x = _multiply(d_out, weight.mT) if ctx.needs_input_grad[0] else None
        rows = [part.reshape(-1, part.shape[-1]) for part in (d_out, x)]
        return d_x, _multiply_long(*rows) if ctx.needs_input_grad[1] else None


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ."""
    if x.numel() == 0 or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _multiply_long(d_rows: Tensor, rows: Tensor) -> Tensor:
    """d_rows [N, out]ᵀ · rows [N, in], the wider one of them as the weight, which oneDNN is fastest with."""
    if rows.shape[1] > d_rows.shape[1]:
        return _multiply(d_rows.mT, rows.mT)
    return _multiply(rows.mT, d_rows.mT).mT


class RMSNorm(Function):
    """See `rms_norm` in kernels/rms_norm.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        normed, ctx.sizes = torch.empty_like(x), _norm_sizes(x, eps)
        call("add_norm", x, None, scale, None, normed, *ctx.sizes)
        ctx.save_for_backward(x, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed: Tensor) -> tuple[Tensor | None, ...]:
        return *_norm_backward(ctx, d_normed, None), None


class AddRMSNorm(Function):
    """See `add_rms_norm` in kernels/rms_norm.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        total, normed, ctx.sizes = torch.empty_like(x), torch.empty_like(x), _norm_sizes(x, eps)
        call("add_norm", x, delta.contiguous(), scale, total, normed, *ctx.sizes)
        ctx.save_for_backward(total, scale)
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed: Tensor, d_total: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_scale = _norm_backward(ctx, d_normed, d_total)
        return d_x, d_x, d_scale, None


def _norm_sizes(x: Tensor, eps: float) -> tuple[int, int, float, int]:
    return x.numel() // x.shape[-1], x.shape[-1], eps, num_threads(x)


def _norm_backward(ctx: Any, d_normed: Tensor, d_total: Tensor | None) -> tuple[Tensor, Tensor]:
    total, scale = ctx.saved_tensors
    d_x, d_scale = torch.empty_like(total), torch.empty_like(scale)
    later = None if d_total is None else d_total.contiguous()
    call("add_norm_backward", total, scale, d_normed.contiguous(), later, d_x, d_scale, *ctx.sizes)
    return d_x, d_scale


class GatedRMSNorm(Function):
    """See `gated_rms_norm` in kernels/rms_norm.py; at least two dimensions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, (gate, ctx.shape) = x.contiguous(), _head_rows(gate)
        out, ctx.sizes = torch.empty_like(x), (eps, num_threads(x))
        call("gated_norm", x, gate, weight, out, ctx.shape, *ctx.sizes)
        ctx.save_for_backward(x, gate, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        d_x, d_gate, d_weight = torch.empty_like(x), torch.empty_like(x), torch.empty_like(weight)
        gradients = (d_out.contiguous(), d_x, d_gate, d_weight)
        call("gated_norm_backward", x, gate, weight, *gradients, ctx.shape, *ctx.sizes)
        return d_x, d_gate, d_weight, None


class NormRotary(Function):
    """`apply_rotary(rms_norm(x))` of x [N, heads, D]: see kernels/rotary.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        x, ctx.shape = _head_rows(x)
        out, ctx.sizes = torch.empty(x.shape), (eps, num_threads(x))
        call("norm_rotary", x, scale, _rotation(cos, sin), out, ctx.shape, *ctx.sizes)
        ctx.save_for_backward(x, scale, cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, cos, sin = ctx.saved_tensors
        d_x, d_scale = torch.empty(x.shape), torch.empty_like(scale)
        gradients = (d_out.contiguous(), d_x, d_scale)
        call("norm_rotary_backward", x, scale, _rotation(cos, sin), *gradients, ctx.shape, *ctx.sizes)
        return d_x, d_scale, None, None, None


def _rotation(cos: Tensor, sin: Tensor) -> _Rotation:
    assert cos.stride() == sin.stride() and cos.stride(-1) == 1
    return _Rotation(cos.data_ptr(), sin.data_ptr(), cos.shape[-1], cos.stride(0))


class SiluAndMul(Function):
    """See kernels/activation.py."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        size = gate_up.shape[-1] // 2
        out = torch.empty(*gate_up.shape[:-1], size)
        ctx.sizes = (out.numel() // size, size, num_threads(out))
        call("silu_and_mul", gate_up, out, *ctx.sizes)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        d_gate_up = torch.empty_like(gate_up)
        call("silu_and_mul_backward", gate_up, d_out.contiguous(), d_gate_up, *ctx.sizes)
        return d_gate_up
