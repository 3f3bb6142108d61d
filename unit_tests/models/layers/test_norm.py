"""RMSNorm and its zero-centred checkpoint weight."""

import torch

from models.layers.norm import RMSNorm


def test_the_checkpoint_weight_is_one_less_than_the_scale():
    layer = RMSNorm(6, 1e-6, torch.float32)
    weight, x = torch.randn(6), torch.randn(3, 6)
    [slot] = layer.weight_slots("norm")
    assert slot.name == "norm.weight"
    slot.load(weight)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)
    torch.testing.assert_close(layer(x), expected)


def test_a_bfloat16_model_keeps_the_scale_in_float32():
    layer = RMSNorm(6, 1e-6, torch.bfloat16)
    assert layer.scale.dtype == torch.float32
    assert layer(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16
