"""The delta-net layer alone equals transformers' layer."""

import pytest
import torch

from models.forward_batch import ForwardBatch
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.loading import load_ours, load_transformers, max_error


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    directory = make_checkpoint(tmp_path_factory.mktemp("delta"), num_layers=4)
    return load_ours(directory, mtp=False)[0], load_transformers(directory)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_layer_equals_transformers(layer, models):
    ours, theirs = models
    x = torch.randn(2, 70, 64)
    batch = ForwardBatch.whole_sequences(torch.zeros(2, 70, dtype=torch.long))
    out = ours.layers[layer].mixer(x.flatten(0, 1), batch)
    with torch.no_grad():
        expected = theirs.model.layers[layer].linear_attn(x)
    assert max_error(out, expected.flatten(0, 1)) < 1e-5


def test_its_tensors_have_the_published_names_and_shapes(models):
    shapes = {slot.name: slot.checkpoint_shape for slot in models[0].layers[0].mixer.weight_slots("linear_attn")}
    assert shapes == {
        "linear_attn.in_proj_qkv.weight": (208, 64),
        "linear_attn.in_proj_z.weight": (144, 64),
        "linear_attn.in_proj_b.weight": (6, 64),
        "linear_attn.in_proj_a.weight": (6, 64),
        "linear_attn.conv1d.weight": (208, 1, 4),
        "linear_attn.A_log": (6,),
        "linear_attn.dt_bias": (6,),
        "linear_attn.norm.weight": (24,),
        "linear_attn.out_proj.weight": (64, 144),
    }
