"""A delta-net layer's convolution and delta rule over whole sequences in C++, with hand-derived gradients, in float32.

The laws, which say what the tensors are, stand in kernels/gated_delta_net.py and kernels/gated_delta_rule.py. Backward
passes compute a chunk anew from the state before it, which is all that is kept. Differences of decays are taken in
float64, so results lie closer to the float64 law than the float32 law does.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kernels.cpu.training import call

_CHUNK_LEN, _TILE = 32, 16  # CHUNK and TILE of the headers


class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("batch", "tokens", "key_heads", "value_heads", "key_dim", "value_dim")
    ]


class _ConvolutionSizes(ctypes.Structure):
    _fields_ = [*_Sizes._fields_, ("taps", ctypes.c_int64), ("stride", ctypes.c_int64)]


class _Heads(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("q", "k", "v")]


class _Inputs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("q", "k", "v", "log_alpha", "beta")]


class ConvolvedHeads(Function):
    """q, k and v of qkv [B, T, C], whose tokens may lie apart. shape: HK, HV, DK, DV."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, weight: Tensor, shape: tuple[int, int, int, int]) -> tuple[Tensor, ...]:
        batch, tokens, _ = qkv.shape
        if qkv.stride(2) != 1 or (batch > 1 and qkv.stride(0) != tokens * qkv.stride(1)):
            qkv = qkv.contiguous()
        key_heads, value_heads, key_dim, value_dim = shape
        keys, values = (batch, tokens, key_heads, key_dim), (batch, tokens, value_heads, value_dim)
        heads = [torch.empty(size) for size in (keys, keys, values)]
        ctx.sizes = _ConvolutionSizes(batch, tokens, *shape, weight.shape[1], qkv.stride(1))
        call("convolve_heads", ctx.sizes, qkv, weight, _Heads(*_addresses(heads)), torch.get_num_threads())
        ctx.save_for_backward(qkv, weight)
        return tuple(heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_heads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, weight = ctx.saved_tensors
        d_heads = tuple(x.contiguous() for x in d_heads)
        d_qkv, d_weight = torch.empty(qkv.shape), torch.empty(weight.shape[::-1])
        gradients = (_Heads(*_addresses(d_heads)), d_qkv, d_weight)
        call("convolve_heads_backward", ctx.sizes, qkv, weight, *gradients, torch.get_num_threads())
        return d_qkv, d_weight.mT, None


class DeltaRule(Function):
    """o of q, k, v, log_alpha and beta."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        inputs = tuple(x.contiguous() for x in inputs)
        q, _, v, _, _ = inputs
        ctx.sizes = _sizes(q, v)
        states = None
        if any(ctx.needs_input_grad):
            places = ctx.sizes.batch * ctx.sizes.value_heads * -(-ctx.sizes.tokens // _CHUNK_LEN)
            states = torch.empty(places * _padded(ctx.sizes.key_dim) * _padded(ctx.sizes.value_dim))
        out = torch.empty_like(v)
        call("delta_rule", ctx.sizes, _Inputs(*_addresses(inputs)), out, states, None, torch.get_num_threads())
        ctx.save_for_backward(*inputs, states)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        *inputs, states = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in inputs]
        addresses = [_Inputs(*_addresses(tensors)) for tensors in (inputs, gradients)]
        call(
            "delta_rule_backward",
            *(ctx.sizes, addresses[0], states, d_out.contiguous(), addresses[1], torch.get_num_threads()),
        )
        return tuple(gradients)


def continue_delta_rule(inputs: tuple[Tensor, ...], state: Tensor) -> Tensor:
    """o of q, k, v, log_alpha and beta behind `state` [B, HV, DK, DV], contiguous, which becomes the one after them."""
    inputs = tuple(x.contiguous() for x in inputs)
    q, _, v, _, _ = inputs
    out = torch.empty_like(v)
    call("delta_rule", _sizes(q, v), _Inputs(*_addresses(inputs)), out, None, state, torch.get_num_threads())
    return out


def _sizes(q: Tensor, v: Tensor) -> _Sizes:
    (batch, tokens, key_heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    return _Sizes(batch, tokens, key_heads, value_heads, key_dim, value_dim)


def _padded(size: int) -> int:
    return -(-size // _TILE) * _TILE


def _addresses(tensors: Any) -> list[int]:
    return [x.data_ptr() for x in tensors]
