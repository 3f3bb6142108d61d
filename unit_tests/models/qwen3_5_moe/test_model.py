"""The MoE target equals transformers in both expert layouts, mixed too."""

from pathlib import Path

import pytest
import torch

from models.config import load_config
from models.qwen3_5_moe.model import SparseMLP, build_target
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.cached_run import CachedRun
from unit_tests.models.equality import check_greedy_tokens_equal_transformers, check_logits_equal_transformers
from unit_tests.models.loading import draw_ids, load_ours, max_error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe"), moe=True, tied="no", expert_layout="mixed", num_layers=4)


@pytest.mark.parametrize("tied", ["outer", "inner", "no"])
@pytest.mark.parametrize("prefix", ["text", "vl", "language_model.model"])
@pytest.mark.parametrize("expert_layout", ["fused", "per_expert", "mixed"])
def test_logits_equal_transformers_for_every_layout_prefix_and_tie(expert_layout, prefix, tied, tmp_path):
    check_logits_equal_transformers(
        tmp_path, prefix=prefix, tied=tied, moe=True, expert_layout=expert_layout, vision=prefix == "vl"
    )


def test_200_greedy_tokens_equal_transformers(checkpoint):
    check_greedy_tokens_equal_transformers(checkpoint)


def test_every_layer_is_sparse(checkpoint):
    model = build_target(load_config(checkpoint), torch.float32)
    assert all(isinstance(layer.mlp, SparseMLP) for layer in model.layers)


def test_the_cached_path_equals_the_whole_sequence(checkpoint):
    model, _ = load_ours(checkpoint, torch.float64, mtp=False)
    ids = draw_ids(1, 80)
    run = CachedRun(model)
    hidden = [run.prefill([2], [ids[0, :66].tolist()])[1]]
    for start in range(66, 80, 2):
        guess = [*ids[0, start : start + 2].tolist(), 7, 9]
        hidden.append(run.verify([2], [guess])[1][:2])
        run.accept([2], [2])
    assert max_error(torch.cat(hidden), model.forward_sequence(ids)[0]) < 1e-10
