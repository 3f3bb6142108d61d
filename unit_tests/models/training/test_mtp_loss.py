"""The MTP loss: its formulas, documents apart, gradients to the head alone, and that mutated code is noticed."""

import pytest
import torch
from torch import nn

from models.config import parse_config
from models.registry import build
from models.training import mtp_loss, packing
from models.training.demo_trainer import initialize
from models.training.mtp_loss import clip_separately, compute_mtp_loss, run_head
from models.training.mtp_settings import MTPSettings, TrainingError
from models.training.packing import IGNORED, Packing
from unit_tests.checkpoints import make_config
from unit_tests.models.cached_run import CachedRun
from unit_tests.models.loading import draw_ids, max_error
from unit_tests.models.training.mtp_checks import (
    LENS,
    check_documents_do_not_see_each_other,
    check_loss_equals_the_formulas,
    draw_packed,
    load_pair,
    run_packed,
)

BOTH = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])


def gradients(pair, ids, labels, settings, packed_positions=None) -> dict[str, torch.Tensor]:
    """Of every head parameter, after one backward pass of the loss."""
    if packed_positions is None:
        output = compute_mtp_loss(pair[1], ids, pair[0].forward_sequence(ids), labels, settings)
    else:
        output = run_packed(pair, ids, labels, packed_positions, settings)
    pair[1].zero_grad()
    output.mtp_loss.backward()
    return {name: parameter.grad.clone() for name, parameter in pair[1].named_parameters()}


@BOTH
def test_loss_equals_the_published_formulas_over_packed_documents(moe):
    check_loss_equals_the_formulas(moe, depth=3)


def test_each_depth_has_its_layer_and_deeper_ones_have_the_last():
    check_loss_equals_the_formulas(depth=3, mtp_layers=2)


def test_a_row_is_accepted_at_a_depth_only_where_it_was_at_every_one_before():
    (target, draft), ids, length = load_pair(), draw_ids(1, 16), 16
    with torch.no_grad():
        hidden = target.forward_sequence(ids)
        first = run_head(draft, target.embed_tokens(ids[:, 1:]), hidden[:, :-1])
        second = run_head(draft, target.embed_tokens(ids[:, 2:]), first[:, :-1])
        once, twice = (target.compute_logits(y)[0].argmax(-1) for y in (first, second))
        labels = ids.clone()
        for t in range(2, length):  # some labels are what the first depth drafts for them, some what the second does
            labels[0, t] = (once[t - 2], ids[0, t], once[t - 2])[t % 3] if t < 9 else twice[t - 3]
        output = compute_mtp_loss(draft, ids, hidden, labels, MTPSettings(mtp_depth=2))
    right = [bool(once[t] == labels[0, t + 2]) for t in range(length - 2)]
    both = [right[t] and bool(twice[t] == labels[0, t + 3]) for t in range(length - 3)]
    second_alone = [bool(twice[t] == labels[0, t + 3]) for t in range(length - 3)]
    expected = [sum(right) / len(right), sum(both) / len(both)]
    assert output.mtp_cumulative_accept_rate.tolist() == pytest.approx(expected)
    assert output.mtp_accept_rate.tolist() == pytest.approx([expected[0], sum(second_alone) / len(second_alone)])
    assert sum(second_alone) > sum(both)


def test_documents_do_not_see_each_other_to_the_bit():
    check_documents_do_not_see_each_other()


def test_documents_of_a_sparse_model_differ_by_rounding_alone():
    """How many rows an expert gets depends on the whole batch, and with it the order of sums."""
    check_documents_do_not_see_each_other(moe=True, tolerance=1e-5)


def test_head_rows_equal_the_drafts_of_the_cached_serving_path():
    target, draft = load_pair("float32")
    ids = draw_ids(1, 20)
    with torch.no_grad():
        run = CachedRun(target, draft)
        forward, hidden = run.prefill([2], ids[:, :-1].tolist())
        served = target.compute_logits(draft(ids[0, 1:], hidden, forward))
        whole = target.forward_sequence(ids[:, :-1])
        y = run_head(draft, target.embed_tokens(ids[:, 1:]), whole)
        assert max_error(y, draft.forward_sequence(ids[:, 1:], whole)) < 1e-6
        trained = target.compute_logits(y)[0]
    assert max_error(trained, served) < 1e-5


@BOTH
def test_a_packed_batch_is_the_token_weighted_sum_of_its_documents(moe):
    pair, (ids, labels, positions) = load_pair("float32", moe), draw_packed()
    settings = MTPSettings(mtp_loss_scaling_factor=1.0)
    packed = gradients(pair, ids, labels, settings, positions)
    whole = run_packed(pair, ids, labels, positions, settings)
    total, sums = 0.0, {name: torch.zeros_like(grad) for name, grad in packed.items()}
    for doc, doc_labels in zip(ids.split(LENS), labels.split(LENS), strict=True):
        output = compute_mtp_loss(pair[1], doc[None], pair[0].forward_sequence(doc[None]), doc_labels[None], settings)
        count = output.mtp_token_count[0].item()
        total += output.mtp_loss.item() * count
        for name, grad in gradients(pair, doc[None], doc_labels[None], settings).items():
            sums[name] += grad * count
    count = whole.mtp_token_count[0].item()
    assert whole.mtp_loss.item() == pytest.approx(total / count, abs=1e-5)
    for name, grad in packed.items():
        assert max_error(grad, sums[name] / count) < 1e-5, name
        assert grad.abs().max() > 0, name


@pytest.mark.parametrize("loss_type", ["ce", "soft_ce", "tv"])
def test_all_labels_masked_gives_zero_loss_and_zero_gradients(loss_type):
    pair, ids = load_pair("float32"), draw_ids(2, 6)
    settings = MTPSettings(mtp_loss_type=loss_type, mtp_depth=2)
    output = compute_mtp_loss(pair[1], ids, pair[0].forward_sequence(ids), torch.full_like(ids, IGNORED), settings)
    assert output.mtp_loss.item() == 0
    assert output.mtp_token_count.tolist() == [0, 0]
    grads = gradients(pair, ids, torch.full_like(ids, IGNORED), settings)
    assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("loss_type", ["ce", "soft_ce", "tv"])
def test_sequences_too_short_for_the_depth_lose_nothing(loss_type):
    pair, ids = load_pair("float32"), draw_ids(2, 2)
    settings = MTPSettings(mtp_loss_type=loss_type, mtp_depth=3)
    output = compute_mtp_loss(pair[1], ids, pair[0].forward_sequence(ids), ids, settings)
    assert output.mtp_loss.item() == 0
    assert output.mtp_accept_rate.tolist() == [0, 0, 0]


def test_soft_losses_and_metrics_compare_with_the_targets_own_distribution():
    pair, ids = load_pair(), draw_ids(1, 12)
    target, draft = pair
    hidden = target.forward_sequence(ids)
    p = target.compute_logits(hidden).softmax(-1)[0, 1:-1]  # rows 1 .. 10 predict tokens 2 .. 11
    q = target.compute_logits(run_head(draft, target.embed_tokens(ids[:, 1:]), hidden[:, :-1])).softmax(-1)[0, :-1]
    expected = {"soft_ce": -(p * q.log()).sum(-1).mean(), "tv": 1 - torch.minimum(p, q).sum(-1).mean()}
    for loss_type, loss in expected.items():
        output = compute_mtp_loss(draft, ids, hidden, ids, MTPSettings(mtp_loss_type=loss_type))
        assert output.mtp_loss_per_depth.item() == pytest.approx(loss.item(), abs=1e-9)
        assert output.mtp_overlap.item() == pytest.approx(1 - expected["tv"].item(), abs=1e-9)
        assert output.mtp_greedy_accept_rate.item() == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean())
        assert output.mtp_accept_rate.item() == pytest.approx((q.argmax(-1) == ids[0, 2:]).double().mean())
    assert compute_mtp_loss(draft, ids, hidden, ids, MTPSettings()).mtp_overlap is None


@pytest.mark.parametrize("loss_type", ["ce", "soft_ce", "tv"])
@pytest.mark.parametrize("recompute", ["none", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("tied", ["outer", "no"])
def test_gradients_reach_the_head_alone(tied, recompute, loss_type):
    target, _ = pair = load_pair("float32", tied=tied)
    settings = MTPSettings(recompute=recompute, mtp_loss_type=loss_type, mtp_depth=2)
    grads = gradients(pair, *[draw_ids(2, 9)] * 2, settings)
    assert all(parameter.grad is None for parameter in target.parameters())
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_without_isolation_gradients_reach_the_target_too():
    target, _ = pair = load_pair("float32", tied="no")
    gradients(pair, *[draw_ids(2, 9)] * 2, MTPSettings(mtp_detach=False))
    for parameter in (target.embed_tokens.weight, target.lm_head.weight, target.layers[0].mixer.in_proj.weight):
        assert parameter.grad.abs().max() > 0


@BOTH
def test_recompute_changes_no_gradient(moe):
    pair, ids = load_pair("float32", moe), draw_ids(3, 11)
    plain, *others = (
        gradients(pair, ids, ids, MTPSettings(mtp_depth=2, recompute=way))
        for way in ("none", "reentrant", "non_reentrant")
    )
    for other in others:
        assert all(max_error(plain[name], other[name]) < 1e-6 for name in plain)


@pytest.mark.parametrize("loss_type", ["ce", "tv"])
def test_scoring_rows_in_parts_changes_nothing(monkeypatch, loss_type):
    pair, ids = load_pair(), draw_ids(2, 15)
    settings = MTPSettings(mtp_loss_type=loss_type, measure=True)
    whole = gradients(pair, ids, ids, settings)
    expected = compute_mtp_loss(pair[1], ids, pair[0].forward_sequence(ids), ids, settings)
    monkeypatch.setattr(mtp_loss, "ROWS_AT_ONCE", 4)
    parts = gradients(pair, ids, ids, settings)
    found = compute_mtp_loss(pair[1], ids, pair[0].forward_sequence(ids), ids, settings)
    assert all(max_error(whole[name], parts[name]) < 1e-10 for name in whole)
    assert max_error(found.token_losses, expected.token_losses) < 1e-12
    assert max_error(found.mtp_overlap, expected.mtp_overlap) < 1e-12


def test_a_policy_step_is_the_same_to_the_bit_with_and_without_the_head():
    """The head's loss is made a thousand times larger: with one clip over both it would shrink the policy's step."""
    results = []
    for factor in (None, 1000.0):
        target, draft = load_pair("float32")
        ids = draw_ids(2, 12)
        optimizer = torch.optim.AdamW([*target.parameters(), *draft.parameters()], lr=1e-2)
        hidden = target.forward_sequence(ids)
        loss = nn.functional.cross_entropy(target.compute_logits(hidden[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        if factor is not None:
            settings = MTPSettings(mtp_loss_scaling_factor=factor)
            loss = loss + compute_mtp_loss(draft, ids, hidden, ids, settings).mtp_loss
        loss.backward()
        norms = clip_separately({"target": target.parameters(), "head": draft.parameters()}, 0.5)
        assert norms["target"] > 0.5
        optimizer.step()
        results.append((target.state_dict(), norms))
    (plain, plain_norms), (with_head, norms) = results
    assert norms["head"] > 100 * norms["target"]
    assert norms["target"] == plain_norms["target"]
    assert all(torch.equal(plain[name], with_head[name]) for name in plain)


@pytest.mark.parametrize("depth", [1, 2])
def test_overfitting_one_batch_pins_the_target_to_the_token_after_the_next(depth):
    target, draft, ids = _new_pair()
    _overfit(target, draft, ids, MTPSettings(mtp_depth=depth, mtp_loss_scaling_factor=1.0))
    with torch.no_grad():
        state = target.forward_sequence(ids)
        for k in range(1, depth + 1):
            next_ids = torch.nn.functional.pad(ids[:, k:], (0, k))
            state = draft.forward_sequence(next_ids, state)
            drafted = target.compute_logits(state).argmax(-1)
            assert torch.equal(drafted[:, : -k - 1], ids[:, k + 1 :])


def test_a_factor_of_zero_leaves_the_head_as_it_is_to_the_bit():
    target, draft, ids = _new_pair()
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    _overfit(target, draft, ids, MTPSettings(mtp_loss_scaling_factor=0.0), steps=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in draft.state_dict().items())


def test_shapes_that_do_not_fit_are_refused():
    _, draft = load_pair("float32")
    with pytest.raises(TrainingError, match=r"hidden states \[2, 5, 64\]"):
        compute_mtp_loss(draft, draw_ids(2, 6), torch.zeros(2, 5, 64), draw_ids(2, 6), MTPSettings())


class TestMutations:
    """Each mistake that the field has made is noticed by a named check."""

    def test_a_swapped_concatenation_is_noticed(self, monkeypatch):
        monkeypatch.setattr(mtp_loss, "fuse", lambda embedding, hidden: torch.cat([hidden, embedding], dim=-1))
        with pytest.raises(AssertionError):
            check_loss_equals_the_formulas()

    @pytest.mark.parametrize("off", [-1, 1])
    def test_a_roll_that_is_off_by_one_is_noticed(self, monkeypatch, off):
        right = packing.shift

        def wrong(rows, count, fill):
            return right(rows, max(0, count + off) if count > 1 else count, fill)

        monkeypatch.setattr(mtp_loss, "shift", wrong)
        with pytest.raises(AssertionError):
            check_loss_equals_the_formulas(depth=1)

    def test_documents_found_from_rolled_positions_are_noticed(self, monkeypatch):
        right = Packing.find

        def wrong(token_ids, positions=None, cu_seqlens=None):
            return right(token_ids, positions.roll(-1), cu_seqlens)

        monkeypatch.setattr(Packing, "find", staticmethod(wrong))
        with pytest.raises(AssertionError):
            check_documents_do_not_see_each_other()
        with pytest.raises(AssertionError):
            check_loss_equals_the_formulas()

    def test_a_mask_of_targets_alone_is_noticed(self, monkeypatch):
        monkeypatch.setattr(mtp_loss, "intersect_mask", lambda mask, depth: packing.shift(mask, depth, False))
        with pytest.raises(AssertionError):
            check_loss_equals_the_formulas()


def _new_pair():
    """A frozen random target, a new head and one batch of random tokens."""
    torch.manual_seed(0)
    target, draft = build(parse_config(make_config(num_layers=4)), mtp=True)
    initialize(target)
    initialize(draft)
    target.requires_grad_(False)
    target.embed_tokens.weight.mul_(50)  # of size one, as trained embeddings are
    return target, draft, draw_ids(2, 14)


def _overfit(target, draft, ids, settings, steps: int = 300) -> None:
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3, weight_decay=0.0)
    hidden = target.forward_sequence(ids)
    for _ in range(steps):
        output = compute_mtp_loss(draft, ids, hidden, ids, settings)
        output.mtp_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if output.mtp_accept_rate.min() == 1:
            break
