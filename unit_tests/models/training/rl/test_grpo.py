"""The loss of a step: advantages within a prompt, ratios to those who drew, and where gradients stop."""

import math

import pytest
import torch

from models.training.rl.grpo import Batch, compare, compute_policy_loss, make_batch, score
from models.training.rollout_server import Rollout
from unit_tests.models.training.mtp_checks import load_pair


def rollout(output_ids, logprobs, prompt_ids=(1, 2)):
    spans = [("0", 0, len(output_ids))]
    return Rollout(list(prompt_ids), list(output_ids), list(logprobs), spans, "length")


def own_logprobs(target, batch):
    with torch.no_grad():
        hidden = target.forward_sequence(batch.token_ids)
        return score(target, hidden, batch.token_ids, batch.is_sampled)


def batch_of(target, gap=0.0, advantages=(1.0, -1.0)):
    """Two samples whose log-probabilities are the target's own minus `gap`."""
    groups = [[rollout([5, 6, 7], [0.0] * 3), rollout([8, 9], [0.0] * 2)]]
    batch = make_batch(groups, [[1.0, 0.0]])
    logprobs = batch.logprobs.masked_scatter(batch.is_sampled, own_logprobs(target, batch) - gap)
    return Batch(batch.token_ids, batch.is_sampled, logprobs, torch.tensor(advantages))


def test_advantages_are_relative_to_the_prompt():
    assert compare([1.0, 0.0, 0.5]).tolist() == pytest.approx([1.2217, -1.2217, 0.0], abs=1e-3)
    assert compare([0.3, 0.3]).tolist() == [0.0, 0.0]


def test_a_batch_holds_prompts_samples_and_their_logprobs_at_their_places():
    batch = make_batch([[rollout([5, 6, 7], [-1.0, -2.0, -3.0]), rollout([8], [-4.0])]], [[1.0, 0.0]])
    assert batch.token_ids.tolist() == [[1, 2, 5, 6, 7], [1, 2, 8, 0, 0]]
    assert batch.logprobs.tolist() == [[0, 0, -1, -2, -3], [0, 0, -4, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 5, 6, 7], [-100, -100, 8, -100, -100]]


def test_logprobs_are_those_of_each_token_after_those_before_it():
    target, _ = load_pair("float32")
    batch = make_batch([[rollout([5, 6], [0.0] * 2)]], [[1.0]])
    full = target.compute_logits(target.forward_sequence(torch.tensor([[1, 2, 5]])))[0].log_softmax(-1)
    assert own_logprobs(target, batch).tolist() == pytest.approx([float(full[1, 5]), float(full[2, 6])], abs=1e-5)


def test_on_the_weights_that_drew_the_loss_is_minus_the_mean_advantage():
    target, _ = load_pair("float32")
    batch = batch_of(target)
    found = compute_policy_loss(target, target.forward_sequence(batch.token_ids), batch, 0.2)
    assert found.logprob_gap < 1e-5
    assert found.clip_share == 0.0
    assert float(found.loss.detach()) == pytest.approx(-(3 * 1.0 - 2 * 1.0) / 5, abs=1e-5)


def test_a_ratio_that_has_moved_far_is_clipped_and_gives_no_gradient():
    """Log-probabilities that rose by one: at a positive advantage there is nothing more to win."""
    target, _ = load_pair("float32")
    batch = batch_of(target, gap=1.0, advantages=(1.0, 1.0))
    found = compute_policy_loss(target, target.forward_sequence(batch.token_ids), batch, 0.2)
    found.loss.backward()
    assert found.clip_share == 1.0
    assert float(found.loss.detach()) == pytest.approx(-1.2, abs=1e-5)
    assert all(param.grad is None or not param.grad.any() for param in target.parameters())
    target.zero_grad()
    batch = batch_of(target, gap=1.0, advantages=(-1.0, -1.0))
    found = compute_policy_loss(target, target.forward_sequence(batch.token_ids), batch, 0.2)
    found.loss.backward()
    assert float(found.loss.detach()) == pytest.approx(math.e, abs=1e-3)
    assert target.norm.scale.grad.any()


def test_a_step_down_the_loss_makes_the_better_sample_more_likely():
    target, _ = load_pair("float32")
    batch = batch_of(target)
    before = own_logprobs(target, batch)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.01)
    compute_policy_loss(target, target.forward_sequence(batch.token_ids), batch, 0.2).loss.backward()
    optimizer.step()
    change = own_logprobs(target, batch) - before
    assert change[:3].sum() > 0 > change[3:].sum()
