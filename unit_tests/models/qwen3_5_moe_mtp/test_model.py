"""The MoE draft head computes its published formulas, whatever the layout of its experts."""

import pytest
import torch

from models.config import load_config
from models.qwen3_5_moe.model import SparseMLP, build_target
from models.qwen3_5_moe_mtp.model import build_draft
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.draft_equality import (
    check_cached_rounds_equal_whole_sequences,
    check_recursion_equals_formulas,
    check_whole_sequence_equals_formulas,
    formula_weights,
)

OPTIONS = {"moe": True, "tied": "no", "dtype": "float64", "num_layers": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    return make_checkpoint(tmp_path_factory.mktemp("moe"), expert_layout="mixed", **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("expert_layout", ["fused", "per_expert"])
def test_draft_logits_equal_the_formulas(expert_layout, dtype, tmp_path):
    directory = make_checkpoint(tmp_path, expert_layout=expert_layout, **OPTIONS)
    check_whole_sequence_equals_formulas(directory, dtype, formula_weights(dtype, **OPTIONS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recursive_drafts_equal_the_formulas(dtype, checkpoint):
    check_recursion_equals_formulas(checkpoint, dtype, formula_weights(dtype, **OPTIONS))


def test_cached_rounds_of_verify_extend_and_recurse_equal_whole_sequences(checkpoint):
    check_cached_rounds_equal_whole_sequences(checkpoint)


def test_its_layer_is_sparse(checkpoint):
    config = load_config(checkpoint)
    draft = build_draft(config, torch.float32, build_target(config, torch.float32))
    assert isinstance(draft.layers[0].mlp, SparseMLP)
