"""Which architecture gets which models."""

import pytest
import torch

from models.config import parse_config
from models.qwen3_5_moe.model import SparseMLP
from models.registry import build
from unit_tests.checkpoints import make_config


@pytest.mark.parametrize("moe", [False, True])
def test_target_and_draft_are_of_one_family(moe):
    target, draft = build(parse_config(make_config(moe=moe, num_layers=4)), mtp=True)
    assert draft.target is target
    assert {isinstance(layer.mlp, SparseMLP) for layer in (*target.layers, *draft.layers)} == {moe}


def test_without_mtp_there_is_no_draft():
    assert build(parse_config(make_config(num_layers=4)), mtp=False)[1] is None


def test_matrices_have_the_asked_type_and_norms_are_never_narrow():
    target, draft = build(parse_config(make_config(num_layers=4)), mtp=True, dtype=torch.bfloat16)
    assert target.embed_tokens.weight.dtype == draft.fc.weight.dtype == torch.bfloat16
    assert target.norm.scale.dtype == target.layers[0].mixer.A_log.dtype == torch.float32


def test_a_tied_head_is_the_embedding():
    tied, _ = build(parse_config(make_config(num_layers=4)), mtp=False)
    untied, _ = build(parse_config(make_config(num_layers=4, tied="no")), mtp=False)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight
