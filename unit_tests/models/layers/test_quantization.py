"""Which weights of a model become few bits."""

from pathlib import Path

import pytest
import torch

from kernels.quantized_linear import QuantizedWeight
from models.config import load_config
from models.layers.quantization import quantize_layers
from models.registry import build
from unit_tests.checkpoints import make_checkpoint


@pytest.mark.parametrize(("moe", "tied"), [(False, "outer"), (False, "no"), (True, "outer")])
def test_matrices_are_quantized_and_small_weights_are_not(tmp_path: Path, moe: bool, tied: str) -> None:
    config = load_config(make_checkpoint(tmp_path, moe=moe, tied=tied, num_layers=4))
    plain, _ = build(config, mtp=False)
    quantized, _ = build(config, mtp=False)
    quantize_layers(quantized, "int8")
    found = {name for name, module in quantized.named_modules() if isinstance(module, QuantizedWeight)}
    expected = {
        name
        for name, parameter in plain.named_parameters()
        if parameter.dim() > 1 and not name.endswith(("conv_weight", "router.weight", "shared_gate.weight"))
    }
    assert found == expected and "embed_tokens.weight" in found
    kept = {name: parameter.dtype for name, parameter in plain.named_parameters() if name not in found}
    left = {name: p.dtype for name, p in quantized.named_parameters() if not name.endswith((".words", ".scales"))}
    assert left == kept
    assert (quantized.lm_head.weight is quantized.embed_tokens.weight) == (tied != "no")


def test_a_model_without_memory_stays_without(tmp_path: Path) -> None:
    config = load_config(make_checkpoint(tmp_path, num_layers=4))
    target, draft = build(config, mtp=True, dtype=torch.bfloat16, device="meta", quantization="int4")
    assert draft is not None
    assert all(weight.is_meta for model in (target, draft) for weight in model.parameters())
