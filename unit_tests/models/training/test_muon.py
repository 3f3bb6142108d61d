"""Muon: updates have equal singular values, whatever the gradient's are."""

import torch

from models.training.muon import Muon, orthogonalize


def test_singular_values_end_near_one_for_wide_and_tall_matrices():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((24, 40), (40, 24)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(rows, columns, generator=generator)))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_a_step_moves_against_the_gradient_by_its_rate():
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    weight.grad = torch.eye(8) * 1e-3
    Muon([weight], lr=0.1).step()
    assert torch.allclose(weight.data, -0.1 * torch.eye(8), atol=0.04)


def test_weights_without_a_gradient_stay():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    Muon([weight], weight_decay=0.5).step()
    assert torch.equal(weight.data, torch.ones(3, 3))
