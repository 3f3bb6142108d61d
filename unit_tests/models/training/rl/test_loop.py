"""The loop with a server inside the test: it learns, and ends with the same bits however the weights travel."""

import json
from dataclasses import replace

import pytest

from models.training.mtp_settings import TrainingError
from models.training.publisher import Publisher
from models.training.rl.loop import RLLoop, StepReport, iterate_fields, rise
from models.training.rollout_server import Rollout
from server.api.fields import Fields, known_fields
from server.api.sampling import SAMPLING_FIELDS, Limits, read_sampling
from server.messages import SamplingParams
from unit_tests.models.training.rl.fake_server import FakeServer
from unit_tests.models.training.rl.recipes import tiny_recipe

FEW = ("model.layers.3.mlp.", "model.norm.")


def run(recipe, server=None):
    """(reports, publisher's newest version, server) of a run."""
    server = server or FakeServer(recipe)
    with Publisher(strategies=recipe.strategies, full_sync_interval=4) as publisher:
        loop = RLLoop(recipe, server, publisher)
        return loop.run(lambda report: None), publisher.version, server


def test_full_and_delta_runs_end_with_the_same_bits():
    results = {}
    for strategies in ("full", "delta"):
        recipe = tiny_recipe("bfloat16", FEW, strategies=strategies, steps=6, mtp_rate=1e-5)
        reports, version, server = run(recipe)
        assert server.checksum() == version.result_sha256
        results[strategies] = version.result_sha256, [report.reward for report in reports]
        assert server.modes[0] == "full"
        assert ("delta" in server.modes) == (strategies == "delta")
        assert [report.transfer for report in reports] == server.modes[1:]
    assert results["full"] == results["delta"]


def test_another_seed_ends_with_other_bits():
    recipe = tiny_recipe(steps=1)
    other = replace(recipe, experiment=replace(recipe.experiment, seed=1))
    assert run(recipe)[1].result_sha256 != run(other)[1].result_sha256


def test_log_probabilities_are_the_servers_on_and_after_every_update():
    reports, _, _ = run(tiny_recipe("bfloat16", steps=4))
    assert max(report.logprob_gap for report in reports) < 1e-4


def test_rewards_rise():
    recipe = tiny_recipe(steps=12, rate=1e-2)
    generation = replace(recipe.rollout.gconfig, n_samples=8)
    trainer = replace(recipe.trainer_base, train_batch_size=4)
    recipe = replace(recipe, rollout=replace(recipe.rollout, gconfig=generation), trainer_base=trainer)
    first, last = rise(run(recipe)[0])
    assert last > first + 0.1


def test_the_head_learns_what_the_policy_says():
    reports, _, _ = run(tiny_recipe(steps=8, mtp_rate=1e-2))
    assert reports[-1].mtp_loss < reports[0].mtp_loss - 0.3


def test_without_head_training_the_policy_moves_just_the_same():
    recipe = tiny_recipe("bfloat16", FEW)
    still = replace(recipe.trainer_base, mtp=replace(recipe.trainer_base.mtp, enabled=False))
    _, moving, _ = run(recipe)
    reports, frozen, _ = run(replace(recipe, trainer_base=still))
    assert reports[0].mtp_loss is None
    for name, checksum in moving.checksums.items():
        assert (checksum == frozen.checksums[name]) != name.startswith("mtp."), name


def test_samples_may_be_drawn_while_a_step_is_made():
    reports, version, server = run(tiny_recipe("bfloat16", steps=5, max_staleness=1))
    assert server.checksum() == version.result_sha256
    assert len(reports) == 5
    assert all(report.num_dropped == 0 for report in reports)


def test_samples_are_drawn_from_the_whole_law_whatever_the_checkpoint_prefers():
    asked = []

    class Noting(FakeServer):
        def generate(self, prompt_ids, sampling, n, seed):
            asked.append(json.dumps(sampling).encode())
            return super().generate(prompt_ids, sampling, n, seed)

    recipe = tiny_recipe(steps=1)
    run(recipe, Noting(recipe))
    preferred = SamplingParams(temperature=0.5, top_p=0.5, top_k=3, min_p=0.2, repetition_penalty=1.5)
    limits = Limits(max_model_len=64, vocab_size=320, mtp_step=0, defaults=preferred)
    for sampling in asked:
        assert read_sampling(Fields(known_fields(*SAMPLING_FIELDS), sampling), limits) == SamplingParams()
    assert len(asked) == 2


class StaleServer(FakeServer):
    """Says of every sample, or all but a few, that older weights drew it, or that it was aborted."""

    def __init__(self, recipe, num_fresh=0, finish_reason="length"):
        super().__init__(recipe)
        self.num_fresh, self.finish_reason = num_fresh, finish_reason

    def generate(self, prompt_ids, sampling, n, seed):
        samples = super().generate(prompt_ids, sampling, n, seed)
        old = [replace(one, versions=[("default", 0, 6)], finish_reason=self.finish_reason) for one in samples]
        return samples[: self.num_fresh] + old[self.num_fresh :]


def test_samples_that_are_too_old_are_left_out():
    recipe = tiny_recipe(steps=1)
    [report], _, _ = run(recipe, StaleServer(recipe, num_fresh=3))
    assert (report.num_samples, report.num_dropped) == (6, 2)


@pytest.mark.parametrize("finish_reason", ["abort", "stop"])
def test_samples_without_a_token_are_left_out(finish_reason):
    class Hasty(FakeServer):
        def generate(self, *arguments):
            [first, *others] = super().generate(*arguments)
            return [Rollout(first.prompt_ids, [], [], [], finish_reason), *others]

    recipe = tiny_recipe(steps=1)
    [report], _, _ = run(recipe, Hasty(recipe))
    assert (report.num_samples, report.num_dropped) == (6, 2)


@pytest.mark.parametrize("finish_reason", ["length", "abort"])
def test_a_step_without_usable_samples_is_an_error(finish_reason):
    recipe = tiny_recipe(steps=1)
    with pytest.raises(TrainingError, match="none of the 8 samples of step 1 can be trained on"):
        run(recipe, StaleServer(recipe, finish_reason=finish_reason))


def test_a_server_that_does_not_pull_is_an_error():
    recipe = tiny_recipe(steps=1)

    class Deaf(FakeServer):
        def pull_weights(self, publisher_url, num_streams=4):
            return {"success": True}

    with pytest.raises(TrainingError, match="did not fetch version 0"):
        run(recipe, Deaf(recipe))


def test_a_rise_compares_the_first_fifth_with_the_last():
    report = StepReport(1, 0.0, "full", 1, 0, 0.0, None, None, 0.123456789, 0.0, 0.0)
    reports = [replace(report, reward=float(reward)) for reward in range(10)]
    assert rise(reports) == (0.5, 8.5)
    assert dict(iterate_fields(report))["rollout_seconds"] == 0.123457
