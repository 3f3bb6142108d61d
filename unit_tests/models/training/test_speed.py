"""The comparison with transformers: both programs are one model, and what it prints adds up."""

import json

import pytest
import torch

from models.training import speed
from models.training.speed import SHAPES, TASKS, Tandem, Transformers, main, measure, shape_fields

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setitem(SHAPES, "demo", (TINY, ((2, 9), (1, 70))))
    yield
    torch.set_num_threads(1)


@pytest.fixture
def contestants():
    torch.manual_seed(0)
    ours = Tandem(shape_fields("demo"))
    return ours, Transformers(shape_fields("demo"), ours)


def gradients(contestant, name):
    weights = [dict(module.named_parameters()) for module in contestant.modules]
    return weights[1][name].grad


@pytest.mark.parametrize("task", TASKS)
def test_both_programs_have_one_loss_and_one_gradient(contestants, task):
    token_ids = torch.randint(64, (2, 40))
    losses = [contestant.compute_loss(task, token_ids) for contestant in contestants]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    ours, theirs = contestants
    embedding, expected = ours.target.embed_tokens.weight.grad, theirs.model.get_input_embeddings().weight.grad
    if task == "head alone":
        assert embedding is None and expected is None
    else:
        torch.testing.assert_close(embedding, expected, rtol=1e-3, atol=1e-6)
    if task == "model":
        assert ours.draft.fc.weight.grad is None
    else:
        torch.testing.assert_close(ours.draft.fc.weight.grad, theirs.draft.fc.weight.grad, rtol=1e-3, atol=1e-6)


def test_rates_are_medians_and_the_ratio_is_of_times_in_one_round(contestants, monkeypatch):
    times = iter([9.0, 9.0, 1.0, 3.0, 2.0, 2.0, 1.0, 4.0])
    monkeypatch.setattr(speed, "_time_step", lambda *arguments: (next(times), 1.0))
    found = measure(contestants, "model", torch.zeros(3, 4, dtype=torch.int64), 3, lambda: 0.0)
    assert found == {"transformers_tok_s": 4.0, "tandem_tok_s": 12.0, "ratio": 3.0, "ratio_min": 1.0, "ratio_max": 4.0}


def test_programs_that_disagree_are_refused(contestants):
    ours, _ = contestants
    ours.target.norm.scale.data *= 2
    with pytest.raises(AssertionError, match="losses"):
        measure(contestants, "model", torch.randint(64, (2, 9)), 1, lambda: 0.0)


def test_the_last_line_has_every_row(capsys):
    main(["--shapes", "demo", "--rounds", "1", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert [(row["task"], row["batch"]) for row in found["results"]] == [(t, b) for b in (2, 1) for t in TASKS]
    assert found["num_threads"] == 1 and all(found[name] for name in ("date", "device", "torch", "transformers"))
    assert all(row["ratio"] > 0 and row["tandem_tok_s"] > 0 for row in found["results"])
    assert len(lines) == 1 + len(found["results"]) + 1
