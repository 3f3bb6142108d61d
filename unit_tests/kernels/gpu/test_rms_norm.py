"""Triton's norms against the law, interpreted."""

import pytest
import torch
from torch import Tensor

from kernels.gpu.rms_norm import add_rms_norm, gated_rms_norm, rms_norm
from kernels.rms_norm import add_rms_norm_torch, rms_norm_torch
from kernels.rms_norm import gated_rms_norm as gated_rms_norm_law


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 24, 100])
def test_rms_norm_reads_strided_rows(size: int) -> None:
    x, scale = draw(5, 3 * size, seed=0)[:, size : 2 * size], draw(size, seed=1)
    torch.testing.assert_close(rms_norm(x, scale, 1e-6), rms_norm_torch(x, scale, 1e-6))


def test_add_rms_norm_gives_the_norm_and_the_sum() -> None:
    x, delta, scale = draw(7, 33, seed=0), draw(7, 33, seed=1), draw(33, seed=2)
    torch.testing.assert_close(add_rms_norm(x, delta, scale, 1e-6), add_rms_norm_torch(x, delta, scale, 1e-6))


def test_gated_rms_norm_reads_the_gate_inside_wider_rows() -> None:
    x, weight, wide = draw(4, 3, 10, seed=0), draw(10, seed=1), draw(4, 50, seed=2)
    gate = wide[:, 15:45].view(4, 3, 10)
    torch.testing.assert_close(gated_rms_norm(x, gate, weight, 1e-6), gated_rms_norm_law(x, gate, weight, 1e-6))


def test_no_rows_are_no_launch() -> None:
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
