"""The dense draft head computes its published formulas, whole and cached, and borrows from its target."""

import pytest
import torch

from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.draft_equality import (
    check_cached_rounds_equal_whole_sequences,
    check_recursion_equals_formulas,
    check_whole_sequence_equals_formulas,
    formula_weights,
)
from unit_tests.models.loading import draw_ids, load_ours

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    return make_checkpoint(tmp_path_factory.mktemp("dense"), dtype="float64", num_layers=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", ["outer", "no"])
def test_draft_logits_equal_the_formulas(tied, dtype, tmp_path):
    options = {"tied": tied, "dtype": "float64", "num_layers": 4}
    directory = make_checkpoint(tmp_path, prefix="vl", **options)
    check_whole_sequence_equals_formulas(directory, dtype, formula_weights(dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_recursive_drafts_equal_the_formulas(dtype, checkpoint):
    check_recursion_equals_formulas(checkpoint, dtype, formula_weights(dtype, dtype="float64", num_layers=4))


def test_cached_rounds_of_verify_extend_and_recurse_equal_whole_sequences(checkpoint):
    check_cached_rounds_equal_whole_sequences(checkpoint)


@pytest.mark.parametrize("layer", [0, 1])
def test_with_several_layers_each_equals_the_formulas_under_the_shared_norms(layer, tmp_path):
    options = {"mtp_layers": 2, "dtype": "float64", "num_layers": 4}
    directory = make_checkpoint(tmp_path, **options)
    weights = formula_weights(torch.float64, **options)
    check_whole_sequence_equals_formulas(directory, torch.float64, weights, layer)


def test_the_draft_owns_only_its_mtp_tensors(checkpoint):
    target, draft = load_ours(checkpoint)
    names = {slot.name for slot in draft.weight_slots()}
    assert len(names) == 15
    assert all(name.startswith("mtp.") for name in names)
    assert not {id(p) for p in draft.parameters()} & {id(p) for p in target.parameters()}
    assert draft.target is target


def test_its_layers_are_the_last_of_the_kv_cache(tmp_path):
    _, draft = load_ours(make_checkpoint(tmp_path, mtp_layers=2, num_layers=8))
    assert [layer.mixer.layer for layer in draft.layers] == [2, 3]


def test_a_close_draft_is_often_but_not_always_right(tmp_path):
    """The checkpoint that engine tests rely on for accept lengths of every size."""
    target, draft = load_ours(make_checkpoint(tmp_path, close_draft=True))
    ids = draw_ids(8, 10)
    for _ in range(30):
        ids = torch.cat([ids, target.compute_logits(target.forward_sequence(ids)[:, -1:]).argmax(-1)], dim=1)
    hidden = target.forward_sequence(ids[:, :-1])
    drafts = target.compute_logits(draft.forward_sequence(ids[:, 1:], hidden)).argmax(-1)
    share_right = (drafts[:, 9:-1] == ids[:, 11:]).double().mean().item()
    assert 0.3 < share_right < 0.9
