"""Perturbed weights: about as many other numbers as asked for, and the old tensors as they were."""

import pytest
import torch

from models.training.rl.perturbation import perturb


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [0.02, 1.0])
def test_the_share_of_changed_numbers_is_as_asked(dtype, share):
    tensors = {"a": torch.randn(200, 300).to(dtype), "b": torch.ones(64, dtype=dtype)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    changed = perturb(tensors, share, torch.Generator().manual_seed(0))
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    found = float((changed["a"] != tensors["a"]).float().mean())
    assert share / 2 < found <= share
    assert (changed["a"] - tensors["a"]).abs().max() < 0.2 * tensors["a"].abs().max()


def test_it_is_the_same_for_the_same_seed():
    tensors = {"a": torch.randn(20, 30)}
    one, other, third = (perturb(tensors, 0.1, torch.Generator().manual_seed(seed))["a"] for seed in (0, 0, 1))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
