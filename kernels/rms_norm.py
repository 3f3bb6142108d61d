"""RMSNorm and the gated RMSNorm of the delta-net layer. Source: Qwen3.5 (zero-centred weights, kept as 1 + w)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import training
from kernels.cpu.library import load_library
from kernels.gpu.dispatch import runs_triton

_FUNCTIONS = {torch.float32: "rms_norm_float32", torch.float64: "rms_norm_float64"}


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`x · rsqrt(mean(x²) + eps) · scale` over the last dimension, in `scale`'s precision, returned in `x`'s dtype.

    x [..., D]; scale [D], which is `1 + w` of the checkpoint, float32 or wider.
    """
    if runs_triton(x):
        from kernels.gpu.rms_norm import rms_norm as rms_norm_triton

        return rms_norm_triton(x, scale, eps)
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        library = load_library()
        if library is not None:
            return _rms_norm_cpp(getattr(library, _FUNCTIONS[scale.dtype]), x, scale, eps)
    if training.trains(x, scale):
        return training.RMSNorm.apply(x, scale, eps)
    return rms_norm_torch(x, scale, eps)


def rms_norm_torch(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The law: see `rms_norm`."""
    return F.rms_norm(x.to(scale.dtype), (x.shape[-1],), scale, eps).to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + delta, as in `rms_norm`, and x + delta itself. x, delta [N, D] of one dtype."""
    if runs_triton(x):
        from kernels.gpu.rms_norm import add_rms_norm as add_rms_norm_triton

        return add_rms_norm_triton(x, delta, scale, eps)
    if training.trains(x, delta, scale):
        return training.AddRMSNorm.apply(x, delta, scale, eps)
    total = x + delta
    return rms_norm(total, scale, eps), total


def add_rms_norm_torch(x: Tensor, delta: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The law: see `add_rms_norm`."""
    return rms_norm_torch(x + delta, scale, eps), x + delta


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm first, then gate: `weight · norm(x) · silu(gate)`, returned in `gate`'s dtype.

    x [..., D] float32 or wider; gate [..., D] model dtype; weight [D] is plain (no + 1). The normed value passes
    through the model dtype before the weight, as in the published model.
    """
    if training.trains(x, gate, weight):
        return training.GatedRMSNorm.apply(x, gate, weight, eps)
    normed = F.rms_norm(x, (x.shape[-1],), None, eps).to(gate.dtype).to(x.dtype)
    return (normed * weight * F.silu(gate.to(x.dtype))).to(gate.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x · rsqrt(sum(x²) + eps)` over the last dimension (a sum, not a mean). x [..., D] float32 or wider."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def _rms_norm_cpp(function: Callable[..., None], x: Tensor, scale: Tensor, eps: float) -> Tensor:
    inputs = x.to(scale.dtype).contiguous()
    out, size = torch.empty_like(inputs), scale.numel()
    function(inputs.data_ptr(), scale.data_ptr(), out.data_ptr(), inputs.numel() // size, size, eps)
    return out.to(x.dtype)
