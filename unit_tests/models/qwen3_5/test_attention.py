"""The full-attention layer alone equals transformers' layer."""

import pytest
import torch

from models.forward_batch import ForwardBatch
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.loading import load_ours, load_transformers, max_error


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    directory = make_checkpoint(tmp_path_factory.mktemp("attention"), num_layers=4)
    return load_ours(directory, mtp=False)[0], load_transformers(directory)


def test_the_layer_equals_transformers(models):
    ours, theirs = models
    x = torch.randn(2, 23, 64)
    batch = ForwardBatch.whole_sequences(torch.zeros(2, 23, dtype=torch.long))
    out = ours.layers[3].mixer(x.flatten(0, 1), batch, ours.rotary(batch.positions))
    positions = torch.arange(23)[None]
    mask = torch.full((23, 23), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        rotary = theirs.model.rotary_emb(x, positions)
        expected, _ = theirs.model.layers[3].self_attn(x, position_embeddings=rotary, attention_mask=mask)
    assert max_error(out, expected.flatten(0, 1)) < 1e-5


def test_its_tensors_have_the_published_names(models):
    names = [slot.name for slot in models[0].layers[3].mixer.weight_slots("self_attn")]
    parts = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")
    assert names == [f"self_attn.{part}.weight" for part in parts]
