"""SwiGLU's elementwise half."""

import torch

from kernels.activation import silu_and_mul, silu_and_mul_torch


def test_the_first_half_is_the_gate():
    gate, up = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)
    expected = gate / (1 + (-gate).exp()) * up
    for op in (silu_and_mul, silu_and_mul_torch):
        torch.testing.assert_close(op(torch.cat([gate, up], dim=-1)), expected)
