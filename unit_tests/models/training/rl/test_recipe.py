"""Recipes: what is in the examples, and what is refused by name."""

import pytest

from models.training.mtp_settings import TrainingError
from models.training.rl.recipe import DEMO, Engine, Recipe, load_recipe
from unit_tests.models.training.rl.recipes import RECIPES


def read(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def test_an_empty_file_is_all_defaults(tmp_path):
    assert read(tmp_path, "") == Recipe()
    assert Recipe().experiment.directory == DEMO
    assert (DEMO / "config.json").exists()


def test_the_two_examples_differ_only_in_how_weights_travel():
    full, delta = (load_recipe(RECIPES / f"{name}.yaml") for name in ("full", "delta"))
    assert full.strategies == ("full",)
    assert delta.strategies == ("full", "delta")
    assert delta.dataflow.delta_full_sync_interval == 10
    assert full.trainer_base == delta.trainer_base
    assert full.rollout == delta.rollout
    assert full.engine == delta.engine
    assert full.experiment.seed == delta.experiment.seed


def test_the_third_trains_all_of_policy_and_head():
    drift = load_recipe(RECIPES / "drift.yaml")
    assert drift.trainer_base.actor.trainable == ()
    assert drift.trainer_base.actor.optimizer.lr == 6e-4
    assert drift.trainer_base.mtp.mtp_depth == drift.engine.mtp_step == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experimant: {}", "unknown field experimant; the nearest known one is experiment;"),
        (
            "rollout: {gconfig: {n_sample: 4}}",
            "unknown field rollout.gconfig.n_sample; the nearest known one is n_samples",
        ),
        ("dataflow: {buffer: {staleness: 1}}", "the nearest known one is max_staleness"),
        ("rollout: 3", "rollout is 3, a section with fields is needed"),
        ("- 1", "a section with fields is needed"),
        ("experiment: {seed: one}", "experiment.seed is 'one', int is needed"),
        ("experiment: {seed: true}", "experiment.seed is True, int is needed"),
        ("engine: {mem_fraction_static: much}", "engine.mem_fraction_static is 'much', float or null is needed"),
        ("experiment: {weight_transfer_mode: udp}", "weight_transfer_mode is 'udp', one of tcp is needed"),
        ("experiment: {weight_transfer_strategies: some}", "one of full, delta is needed"),
        ("trainer_base: {actor: {trainable: mtp}}", "trainable is 'mtp', a list of texts is needed"),
        ("trainer_base: {total_train_steps: 0}", "trainer_base.total_train_steps is 0, at least 1 is needed"),
        ("trainer_base: {mtp: {mtp_depth: 0}}", "trainer_base.mtp.mtp_depth is 0, at least 1 is needed"),
        ("rollout: {gconfig: {n_samples: 1}}", "rollout.gconfig.n_samples is 1, at least 2 is needed"),
        ("rollout: {gconfig: {temperature: 0.7}}", "temperature is 0.7, 1 is needed"),
        ("dataflow: {workflow_spec: {reward_fn: taste}}", "reward_fn is 'taste', one of digit_share"),
        ("a: [", "is not readable YAML"),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(tmp_path, text, message):
    with pytest.raises(TrainingError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_fields_may_be_changed_from_outside():
    changes = ["trainer_base.mtp.enabled=no", "experiment.model_path=/some/where", "engine.mtp_step=0"]
    recipe = load_recipe(RECIPES / "full.yaml", changes)
    assert recipe.trainer_base.mtp.enabled is False
    assert recipe.trainer_base.mtp.optimizer.lr == 0.001
    assert str(recipe.experiment.directory) == "/some/where"
    assert recipe.engine.mtp_step == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainer_base.mtp.enable=no", "unknown field trainer_base.mtp.enable; the nearest known one is enabled"),
        ("trainer_base.mtp.enabled", "is no SECTION.FIELD=VALUE"),
        ("engine.mtp_step.more=1", "mtp_step is no section of the recipe"),
        ("engine.mtp_step=[", "is not readable YAML"),
    ],
)
def test_a_wrong_change_is_refused(change, message):
    with pytest.raises(TrainingError, match=message):
        load_recipe(RECIPES / "full.yaml", [change])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"none\.yaml is not readable YAML"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("5e-6", 5e-6), ("1.5E+2", 150.0), ("0.25", 0.25)])
def test_numbers_may_be_written_as_people_do(tmp_path, text, value):
    found = read(tmp_path, f"trainer_base: {{actor: {{optimizer: {{lr: {text}}}}}}}").trainer_base.actor.optimizer.lr
    assert found == value
    assert isinstance(found, float)


def test_the_engine_section_is_the_command_line_of_the_server():
    recipe = Recipe(engine=Engine(mtp_step=2, max_running_requests=4, attention_backend="torch"))
    settings = ("--dtype", "float32", "--mtp-step", "2", "--max-running-requests", "4", "--attention-backend", "torch")
    assert recipe.server_arguments() == ["--model", str(DEMO), *settings]
