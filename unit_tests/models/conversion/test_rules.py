import math
from pathlib import Path

import pytest
import torch

from models.config import load_config
from models.conversion.rules import list_rules
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.conversion.conversions import read_all


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("layout", ["fused", "per_expert"])
@pytest.mark.parametrize("tied", ["outer", "no"])
def test_the_rules_cover_a_checkpoint_exactly(tmp_path: Path, moe: bool, layout: str, tied: str) -> None:
    directory = make_checkpoint(tmp_path, moe=moe, expert_layout=layout, tied=tied, num_layers=4)
    rules = list_rules(load_config(directory), lambda _: layout == "fused")
    shapes = dict(pair for rule in rules for pair in zip(rule.hf, rule.hf_shapes, strict=True))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in read_all(directory).items()}
    assert sum(len(rule.hf) for rule in rules) == len(shapes)


@pytest.mark.parametrize("moe", [False, True])
def test_joining_keeps_the_number_of_weights_and_splitting_is_its_inverse(tmp_path: Path, moe: bool) -> None:
    directory = make_checkpoint(tmp_path, moe=moe, expert_layout="mixed", num_layers=4)
    tensors = read_all(directory)
    for rule in list_rules(load_config(directory), lambda layer: f"{layer}.mlp.experts.gate_up_proj" in tensors):
        parts = [tensors[name] for name in rule.hf]
        whole = rule.layout.join(parts)
        assert tuple(whole.shape) == rule.shape and math.prod(rule.shape) == sum(part.numel() for part in parts)
        assert all(torch.equal(a, b) for a, b in zip(parts, rule.layout.split(whole), strict=True))
        if rule.axis is not None:
            assert sum(rule.blocks) == rule.shape[rule.axis]


def test_a_head_of_several_layers_shares_fc_and_norms(tmp_path: Path) -> None:
    config = load_config(make_checkpoint(tmp_path, mtp_layers=2, num_layers=4))
    rules = list_rules(config, lambda _: True, mtp_only=True)
    assert all(rule.is_head for rule in rules)
    shared = {rule.hf[0]: (rule.megatron, rule.written_copies) for rule in rules if rule.written_copies}
    assert shared["mtp.fc.weight"] == ("mtp.layers.0.eh_proj.weight", ("mtp.layers.1.eh_proj.weight",))
    assert len(shared) == 4
