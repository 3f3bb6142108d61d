"""Triton's SwiGLU against the law, interpreted."""

import pytest
import torch

from kernels.activation import silu_and_mul_torch
from kernels.gpu.activation import silu_and_mul


@pytest.mark.parametrize(("rows", "size"), [(0, 8), (3, 1), (2, 1030), (5, 24)])
def test_silu_and_mul_equals_the_law_at_odd_sizes(rows: int, size: int) -> None:
    gate_up = torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(silu_and_mul(gate_up), silu_and_mul_torch(gate_up))
