"""What we write, read and computed by megatron-core itself, where it is installed (see fixtures/write_fixture.py)."""

import tempfile
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from safetensors.torch import load_file

from unit_tests.models.conversion import conversions
from unit_tests.models.conversion.fixtures import write_fixture


def run_megatron(rank: int, checkpoint: str, name: str, meeting: str) -> None:
    """Load in megatron-core with its own loader and compare its forward pass with the recorded one."""
    write_fixture.prepare_megatron(rank, 1, meeting)
    from megatron.core import dist_checkpointing

    model = write_fixture.build_model(name == "moe", 1)
    state = write_fixture.sharded_state(model)
    state = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
    loaded = dist_checkpointing.load(state, checkpoint)
    model.load_state_dict({key: loaded[key] for key, _ in model.named_parameters()}, strict=False)
    expected = load_file(conversions.FIXTURES / name / "expected.safetensors")
    for key, tensor in write_fixture.run(model).items():
        assert (tensor - expected[key]).abs().max() <= 1e-5, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_megatron_computes_the_same_with_what_we_write(tmp_path: Path, name: str) -> None:
    pytest.importorskip("megatron.core")
    back = conversions.convert_fixture(name, "torch_dist", tmp_path / "back")
    conversions.to_megatron(back, tmp_path / "ours", norms="ones", layer_spec="local")
    with tempfile.TemporaryDirectory() as meeting:
        mp.spawn(run_megatron, (str(tmp_path / "ours" / "release"), name, f"{meeting}/ranks"), nprocs=1)
