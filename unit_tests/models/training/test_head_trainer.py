"""The trainer: it learns, a stop leaves no trace, and head and target move only when they should."""

import itertools
import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from models.forward_batch import ForwardBatch
from models.qwen3_5.model import Qwen35
from models.training.demo_batches import collate
from models.training.head_trainer import HeadTrainer, TrainerSettings, list_states
from models.training.mtp_loss import MTPOutput
from models.training.mtp_settings import MTPSettings, TrainingError
from unit_tests.models.draft_equality import formula_weights
from unit_tests.models.loading import draw_ids
from unit_tests.models.training.mtp_checks import NUM_LAYERS, load_pair, reference_losses

LOSS = MTPSettings(enabled=True)
BATCHES = [
    collate([(ids[:4].tolist(), ids[4:].tolist()) for ids in draw_ids(3, 12, seed=seed, vocab_size=40)])
    for seed in range(4)
]


def make_trainer(dtype="float32", moe=False, loss=LOSS, **options) -> HeadTrainer:
    settings = TrainerSettings(num_steps=8, **options)
    return HeadTrainer(*load_pair(dtype, moe), loss, settings)


def run(trainer, folder, last_step=None):
    batches = itertools.islice(itertools.cycle(BATCHES), trainer.step, None)
    return trainer.train(batches, 3, lambda: trainer.measure(BATCHES[:1]), folder, last_step)


def weights(trainer):
    return {**trainer.target.state_dict(), **{f"head.{k}": v for k, v in trainer.draft.state_dict().items()}}


def check_its_hidden_states_are_those_after_the_final_norm() -> None:
    """The loss of a batch against the formulas on the target's true output."""
    trainer, batch = make_trainer("float64"), BATCHES[0]
    raw = formula_weights(torch.float64, dtype="float64", num_layers=NUM_LAYERS)
    with torch.no_grad():
        output: MTPOutput = trainer.compute(batch, LOSS)[0]
    ids, is_target, expected = batch.token_ids, batch.is_target, []
    for row, target, state in zip(ids, is_target, _true_hidden(ids), strict=True):
        expected += reference_losses(raw, row, torch.where(target, row, -100), state, depth=1)[0]
    assert output.mtp_token_count.tolist() == [len(expected)]
    assert abs(output.mtp_loss_per_depth.item() - sum(expected) / len(expected)) < 1e-9


def _true_hidden(ids):
    """Through the layers by hand, so that a changed `forward` of the target does not change it."""
    target, _ = load_pair("float64")
    forward = ForwardBatch.whole_sequences(ids)
    x, delta = target.embed_tokens(forward.token_ids), None
    for layer in target.layers:
        x, delta = layer(x, delta, forward, target.rotary(forward.positions))
    return target.norm(x + delta).detach().unflatten(0, ids.shape)


def test_its_hidden_states_are_those_after_the_final_norm():
    check_its_hidden_states_are_those_after_the_final_norm()


def test_hidden_states_before_the_final_norm_are_noticed(monkeypatch):
    right = Qwen35.forward_sequence
    monkeypatch.setattr(Qwen35, "forward_sequence", lambda self, ids: right(self, ids) / self.norm.scale)
    with pytest.raises(AssertionError):
        check_its_hidden_states_are_those_after_the_final_norm()


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_a_stop_and_a_resume_leave_no_trace_to_the_bit(joint, moe, tmp_path):
    straight = make_trainer(moe=moe, joint=joint)
    run(straight, tmp_path / "straight")
    for last_step in (2, 5, None):
        trainer = make_trainer(moe=moe, joint=joint)
        if last_step != 2:
            trainer.resume(tmp_path / "parts")
        run(trainer, tmp_path / "parts", last_step)
    assert trainer.step == 8
    found = weights(trainer)
    assert all(torch.equal(value, found[name]) for name, value in weights(straight).items())


def test_a_frozen_target_keeps_its_bits_and_the_head_moves(tmp_path):
    trainer = make_trainer()
    before = {name: value.clone() for name, value in weights(trainer).items()}
    run(trainer, tmp_path)
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("head.")}


def test_joint_training_moves_the_target_as_it_would_move_without_the_head(tmp_path):
    """The head's loss weighs nothing in one of them: isolation and separate clipping keep it out of the target."""
    states = []
    for factor in (0.0, 50.0):
        loss = MTPSettings(enabled=True, mtp_loss_scaling_factor=factor)
        trainer = make_trainer(loss=loss, joint=True, target_rate=1e-2)
        run(trainer, tmp_path / str(factor), last_step=3)
        states.append(trainer.target.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["norm.scale"], load_pair("float32")[0].norm.scale)


def test_joint_training_counts_the_targets_own_cross_entropy():
    trainer, batch = make_trainer(joint=True), BATCHES[0]
    _, main = trainer.compute(batch, LOSS)
    logits = trainer.target.compute_logits(trainer.target.forward_sequence(batch.token_ids))[:, 3:-1]
    assert main.item() == pytest.approx(cross_entropy(logits.flatten(0, 1), batch.token_ids[:, 4:].flatten()).item())


@pytest.mark.parametrize("loss_type", ["ce", "soft_ce", "tv"])
def test_it_learns_what_it_is_given(loss_type, tmp_path):
    trainer = make_trainer(loss=MTPSettings(enabled=True, mtp_loss_type=loss_type), rate=2e-3)
    trainer.settings = TrainerSettings(num_steps=40, rate=2e-3)
    before = trainer.measure(BATCHES)
    run(trainer, tmp_path)
    after = trainer.measure(BATCHES)
    name = {"ce": "loss", "soft_ce": "accept_sampled", "tv": "accept_sampled"}[loss_type]
    sign = -1 if name == "loss" else 1
    assert sign * (after[name][0] - before[name][0]) > 0.05


def test_the_log_has_a_line_before_the_first_step_and_one_for_every_measurement(tmp_path):
    last = run(make_trainer(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6, 8]
    assert {"tokens", "loss", "accept", "accept_cumulative", "accept_greedy", "accept_sampled"} <= lines[0].keys()
    assert lines[-1] == {"step": 8, **last}


def test_only_the_newest_states_are_kept_and_none_is_half_written(tmp_path):
    run(make_trainer(), tmp_path)
    assert [path.name for path in list_states(tmp_path)] == ["step_00000006.pt", "step_00000008.pt"]
    assert not (tmp_path / "state.partial").exists()


def test_a_state_of_another_training_is_refused_and_the_difference_named(tmp_path):
    run(make_trainer(), tmp_path, last_step=1)
    with pytest.raises(TrainingError, match=r"seed was 0, is 1; data was , is other"):
        make_trainer(seed=1, data="other").resume(tmp_path)
    with pytest.raises(TrainingError, match="holds no step"):
        make_trainer().resume(tmp_path / "nowhere")


def test_every_step_has_its_planned_rate_also_after_a_resume(tmp_path):
    trainer = make_trainer(joint=True, rate=1e-3, target_rate=1e-4)
    run(trainer, tmp_path, last_step=3)
    resumed = make_trainer(joint=True, rate=1e-3, target_rate=1e-4)
    resumed.resume(tmp_path)
    run(resumed, tmp_path, last_step=5)
    for stopped, step in ((trainer, 2), (resumed, 4)):
        rates = [optimizer.param_groups[0]["lr"] for optimizer in stopped.optimizers.values()]
        assert rates == pytest.approx([peak * stopped.settings.rate_factor(step) for peak in (1e-3, 1e-4)])


def test_the_rate_rises_then_falls_to_zero():
    settings = TrainerSettings(num_steps=100, warmup=0.1)
    factors = [settings.rate_factor(step) for step in range(100)]
    assert factors.index(max(factors)) in (9, 10)
    assert 0 < factors[-1] < 0.02
    assert all(factor > 0 for factor in factors)
