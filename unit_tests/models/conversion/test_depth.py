import json
from pathlib import Path

import pytest

from models.config import parse_config
from models.conversion.depth import describe_for_megatron, save_settings
from unit_tests.checkpoints import make_config


@pytest.mark.parametrize("depth", [1, 2])
def test_megatron_is_told_of_the_head_as_deep_as_it_is(depth: int) -> None:
    settings = describe_for_megatron(parse_config(make_config(mtp_layers=depth)))
    assert settings["mtp_num_layers"] == depth and settings["mtp_loss_scaling_factor"] == 0.1


def test_without_a_head_megatron_hears_nothing_of_one() -> None:
    settings = describe_for_megatron(parse_config(make_config(mtp_layers=0)))
    assert not [name for name in settings if "mtp" in name]


def test_the_settings_file_has_sizes_and_the_centre_of_the_norms(tmp_path: Path) -> None:
    save_settings(tmp_path / "s.json", parse_config(make_config(moe=True)), "ones")
    settings = json.loads((tmp_path / "s.json").read_text())
    assert settings["layernorm_zero_centered_gamma"] is False
    assert (settings["num_moe_experts"], settings["moe_router_topk"], settings["kv_channels"]) == (8, 3, 32)
    assert settings["linear_attention_freq"] == [1, 1, 1, 0] * 2
