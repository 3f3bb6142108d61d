"""The three norms against their formulas, and their precision in bfloat16."""

import pytest
import torch

from kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_torch,
    gated_rms_norm,
    l2_norm,
    rms_norm,
    rms_norm_torch,
)

EPS = 1e-6


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normed(row):
    return row / (sum(float(x) ** 2 for x in row) / len(row) + EPS) ** 0.5


@pytest.mark.parametrize("size", [1, 7, 64])
def test_rms_norm_divides_by_the_root_mean_square_and_scales(size):
    x, scale = draw(3, size), draw(size, seed=1)
    expected = torch.stack([normed(row) * scale for row in x])
    torch.testing.assert_close(rms_norm(x, scale, EPS), expected)


def test_rms_norm_keeps_the_input_type_and_computes_in_float32():
    x, scale = draw(4, 33).bfloat16(), draw(33, seed=1).float()
    out = rms_norm(x, scale, EPS)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rms_norm(x.float(), scale, EPS).bfloat16())


def test_gated_rms_norm_norms_before_it_gates():
    x, gate, weight = draw(2, 3, 9), draw(2, 3, 9, seed=1), draw(9, seed=2)
    out = gated_rms_norm(x, gate, weight, EPS)
    for i in range(2):
        for j in range(3):
            g = gate[i, j]
            torch.testing.assert_close(out[i, j], weight * normed(x[i, j]) * g / (1 + (-g).exp()))


def test_gated_rms_norm_rounds_the_normed_value_to_the_model_type():
    x, gate, weight = draw(5, 16).float(), draw(5, 16, seed=1).bfloat16(), draw(16, seed=2).float()
    middle = torch.stack([normed(row) for row in x]).bfloat16().float()
    expected = (weight * middle * torch.nn.functional.silu(gate.float())).bfloat16()
    out = gated_rms_norm(x, gate, weight, EPS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


def test_l2_norm_divides_by_the_root_of_the_sum():
    x = draw(2, 3, 5)
    expected = x / (x.pow(2).sum(-1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(l2_norm(x), expected)


def test_a_zero_vector_stays_finite():
    zero = torch.zeros(2, 4)
    assert torch.equal(rms_norm(zero, torch.ones(4), EPS), zero)
    assert torch.equal(l2_norm(zero), zero)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@torch.inference_mode()
def test_the_cpu_kernel_equals_the_law_and_no_row_depends_on_others(dtype):
    x = torch.randn(9, 3, 37, generator=torch.Generator().manual_seed(4)).to(dtype)[:, ::2]
    scale = torch.randn(37, generator=torch.Generator().manual_seed(5)).to(torch.promote_types(dtype, torch.float32))
    out = rms_norm(x, scale, 1e-6)
    torch.testing.assert_close(out, rms_norm_torch(x, scale, 1e-6))
    assert out.dtype == dtype
    assert all(torch.equal(rms_norm(x[i : i + 1], scale, 1e-6)[0], out[i]) for i in range(9))


@pytest.mark.parametrize("op", [add_rms_norm, add_rms_norm_torch])
def test_add_rms_norm_gives_the_norm_of_the_sum_and_the_sum(op):
    x, delta, scale = draw(3, 7), draw(3, 7, seed=1), draw(7, seed=2)
    out, total = op(x, delta, scale, EPS)
    assert torch.equal(total, x + delta)
    torch.testing.assert_close(out, torch.stack([normed(row) * scale for row in total]))
