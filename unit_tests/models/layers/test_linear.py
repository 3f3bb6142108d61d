"""Linear layers and their names in a checkpoint."""

import torch

from models.layers.linear import Linear, StackedLinear


def fill(layer):
    values = {slot.name: torch.randn(slot.checkpoint_shape) for slot in layer.weight_slots("p")}
    for slot in layer.weight_slots("p"):
        slot.load(values[slot.name])
    return values


def test_a_linear_layer_multiplies_by_the_transposed_weight():
    layer = Linear(3, 5, torch.float32)
    weight = fill(layer)["p.weight"]
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(layer(x), x @ weight.T)


def test_stacked_layers_give_one_output_per_name_in_order():
    layer = StackedLinear(3, {"a": 2, "b": 5, "c": 1}, torch.float32)
    weights = fill(layer)
    assert list(weights) == ["p.a.weight", "p.b.weight", "p.c.weight"]
    x = torch.randn(4, 3)
    for out, weight in zip(layer(x), weights.values(), strict=True):
        torch.testing.assert_close(out, x @ weight.T)
