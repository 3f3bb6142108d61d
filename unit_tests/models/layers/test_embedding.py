"""The token embedding."""

import torch

from models.layers.embedding import Embedding


def test_ids_pick_rows_of_the_weight():
    layer = Embedding(7, 3, torch.float32)
    [slot] = layer.weight_slots("model.embed_tokens")
    assert slot.name == "model.embed_tokens.weight"
    weight = torch.randn(7, 3)
    slot.load(weight)
    ids = torch.tensor([[6, 0], [2, 2]])
    assert torch.equal(layer(ids), torch.stack([weight[[6, 0]], weight[[2, 2]]]))
