"""The trainer: which token every row has to predict, the plan of the learning rate, and that it learns."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from models.config import parse_config
from models.registry import build
from models.training.demo_batches import Batch, collate
from models.training.demo_trainer import DRAFT_WEIGHTS, TrainingSettings, compute_losses, initialize, rate_factor, train
from unit_tests.checkpoints import make_config


@pytest.fixture
def models():
    torch.manual_seed(0)
    target, draft = build(parse_config(make_config()), mtp=True)
    initialize(target)
    initialize(draft)
    return target, draft


def test_target_rows_predict_the_next_token_and_each_draft_pass_one_further(models):
    target, draft = models
    batch = Batch(torch.randint(0, 40, (2, 9)), torch.arange(9).ge(5).expand(2, 9))
    hidden = target.forward_sequence(batch.token_ids)
    losses = compute_losses(target, draft, batch)
    assert len(losses) == 1 + len(DRAFT_WEIGHTS)
    for shift, loss in enumerate(losses, 1):
        logits = target.compute_logits(hidden)[:, 5 - shift : 9 - shift]
        torch.testing.assert_close(loss, cross_entropy(logits.flatten(0, 1), batch.token_ids[:, 5:].flatten()))
        hidden = draft.forward_sequence(batch.token_ids[:, shift:], hidden[:, : 9 - shift])


def test_every_parameter_is_initialised_and_gets_a_gradient(models):
    target, draft = models
    batch = collate([([1, 2, 3], [4, 5, 6, 7])])
    sum(compute_losses(target, draft, batch)).backward()
    for module in models:
        for name, parameter in module.named_parameters():
            assert parameter.isfinite().all(), name
            assert parameter.grad is not None, name


def test_the_rate_rises_holds_and_falls_to_zero():
    settings = TrainingSettings(num_steps=100, max_minutes=1.0, warmup=0.1, decay=0.5)
    factors = [rate_factor(progress, settings) for progress in (0.0, 0.05, 0.2, 0.5, 0.75, 1.0)]
    assert 0 < factors[0] < factors[1] < 1
    assert factors[2:] == [1.0, 1.0, 0.5, 0.0]


def test_training_learns_a_fixed_continuation_in_target_and_draft(models):
    target, draft = models
    batch = collate([([1, 2], [3, 4, 5, 6, 7, 8])] * 4)
    before = [loss.item() for loss in compute_losses(target, draft, batch)]
    train(target, draft, itertools.repeat(batch), TrainingSettings(30, 5.0), lambda: "")
    after = [loss.item() for loss in compute_losses(target, draft, batch)]
    assert all(late < 0.3 * early for early, late in zip(before, after, strict=True))


def test_the_time_limit_ends_training_before_the_plan(models):
    target, draft = models
    weight = target.embed_tokens.weight.clone()
    train(target, draft, itertools.repeat(collate([([1], [2, 3, 4])])), TrainingSettings(10**9, 1e-9), lambda: "")
    assert torch.equal(weight, target.embed_tokens.weight)
