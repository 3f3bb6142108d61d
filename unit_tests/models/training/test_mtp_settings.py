"""Settings of the MTP loss: aliases are one setting, and what cannot be trained is refused by its name."""

import pytest

from models.errors import CheckpointError
from models.training.mtp_settings import MTPSettings, TrainingError, check_trainable
from unit_tests.checkpoints import make_config

ALIASES = ["mtp_loss_scaling_factor", "mtp_loss_weight", "loss_scale", "loss_scaling_factor"]


def test_the_loss_is_off_and_isolated_and_weighs_a_tenth_by_default():
    settings = MTPSettings.read({})
    assert (settings.enabled, settings.mtp_detach, settings.mtp_loss_scaling_factor) == (False, True, 0.1)
    assert (settings.mtp_loss_type, settings.mtp_depth, settings.num_speculative_tokens) == ("ce", 1, 1)


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_of_the_factor_is_the_factor(name):
    assert MTPSettings.read({name: 0.3}).mtp_loss_scaling_factor == 0.3


def test_aliases_that_agree_are_accepted_and_none_counts_as_not_given():
    assert MTPSettings.read({"loss_scale": 0.2, "mtp_loss_weight": 0.2}).mtp_loss_scaling_factor == 0.2
    assert MTPSettings.read({"loss_scale": 0.2, "mtp_loss_weight": None}).mtp_loss_scaling_factor == 0.2


def test_aliases_that_differ_are_an_error_that_names_both():
    with pytest.raises(TrainingError, match=r"loss_scale is 0.2 and mtp_loss_weight is 0.1"):
        MTPSettings.read({"loss_scale": 0.2, "mtp_loss_weight": 0.1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mtp_loss_type": "mse"}, "mtp_loss_type is 'mse'"),
        ({"recompute": "block"}, "recompute is 'block'"),
        ({"mtp_depth": 0}, "mtp_depth is 0"),
        ({"loss_scale": -1.0}, "mtp_loss_scaling_factor is -1.0"),
        ({"loss_scale": float("nan")}, "mtp_loss_scaling_factor is nan"),
        ({"enable_rollout": True}, "enable_rollout needs enabled"),
        ({"depth": 1}, "unknown MTP setting 'depth'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(values, message):
    with pytest.raises(TrainingError, match=message):
        MTPSettings.read(values)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"mtp_num_hidden_layers": 0}, {}, TrainingError, "mtp_num_hidden_layers is 0"),
        ({}, {"context_parallel_size": 2}, TrainingError, "context_parallel_size is 2"),
        ({}, {"has_vision": True}, TrainingError, "pixel_values"),
        ({"architectures": ["LlamaForCausalLM"]}, {}, CheckpointError, "architecture LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, CheckpointError, r"quantised \(fp8\)"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_step(change, options, error, message):
    with pytest.raises(error, match=message):
        check_trainable(make_config() | change, **options)


def test_a_model_without_a_head_may_get_a_new_one():
    assert check_trainable(make_config(mtp_layers=0), has_new_head=True).num_mtp_layers == 0
    assert check_trainable(make_config()).num_mtp_layers == 1
