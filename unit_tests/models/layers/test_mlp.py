"""The dense SwiGLU layer."""

import torch

from models.layers.mlp import MLP


def test_it_equals_down_of_silu_gate_times_up():
    layer = MLP(4, 7, torch.float64)
    weights = {slot.name: torch.randn(slot.checkpoint_shape, dtype=torch.float64) for slot in layer.weight_slots("mlp")}
    for slot in layer.weight_slots("mlp"):
        slot.load(weights[slot.name])
    x = torch.randn(3, 4, dtype=torch.float64)
    gate, up = x @ weights["mlp.gate_proj.weight"].T, x @ weights["mlp.up_proj.weight"].T
    expected = (gate * gate.sigmoid() * up) @ weights["mlp.down_proj.weight"].T
    torch.testing.assert_close(layer(x), expected)
