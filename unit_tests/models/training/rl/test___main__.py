"""The command line of an RL run."""

import json

import pytest
from safetensors.torch import load_file

from models.training.rl import __main__ as command
from models.weight_update import combine_checksums, hash_tensor
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.loading import load_ours
from unit_tests.models.training.mtp_checks import checkpoint
from unit_tests.models.training.rl.fake_server import FakeServer
from unit_tests.models.training.rl.recipes import RECIPES, tiny_recipe
from unit_tests.models.training.test_head_checkpoint import payloads

SMALL = {
    "experiment.model_path": checkpoint("bfloat16"),
    "trainer_base.total_train_steps": 2,
    "trainer_base.train_batch_size": 1,
    "trainer_base.actor.trainable": "[model.norm.]",
    "trainer_base.mtp.enabled": "no",
    "rollout.gconfig.n_samples": 2,
}
CHANGES = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture
def served(monkeypatch):
    server = FakeServer(tiny_recipe("bfloat16"))
    monkeypatch.setattr(command, "RolloutServer", lambda url, key: server)
    return server


def test_a_run_prints_its_steps_and_a_summary_and_writes_a_checkpoint(served, capsys, tmp_path):
    out = tmp_path / "trained"
    command.main(["--recipe", str(RECIPES / "delta.yaml"), "--server", "x", "--out", str(out), *CHANGES])
    *steps, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert summary["experiment"] == "digits-delta"
    assert summary["steps"] == 2
    assert summary["transfers"] == ["full", "delta", "delta"]
    checksums = {name: hash_tensor(tensor) for name, tensor in load_file(out / "model.safetensors").items()}
    assert summary["server_sha256"] == summary["trainer_sha256"] == combine_checksums(checksums)
    assert (out / "config.json").exists()


def test_a_checkpoint_keeps_its_names_and_what_is_not_trained(served, tmp_path):
    model = make_checkpoint(tmp_path / "model", num_layers=4, dtype="bfloat16", prefix="vl", vision=True, shards=2)
    changes = [*CHANGES, "--set", f"experiment.model_path={model}"]
    command.main(["--recipe", str(RECIPES / "full.yaml"), "--server", "x", "--out", str(tmp_path / "out"), *changes])
    before, after = payloads(model), payloads(tmp_path / "out")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == ["model.language_model.norm.weight"]
    others = [path.name for path in model.iterdir() if path.suffix != ".safetensors"]
    assert all((tmp_path / "out" / name).read_bytes() == (model / name).read_bytes() for name in others)
    load_ours(tmp_path / "out")


def test_a_place_inside_the_model_is_refused(served, capsys):
    out = SMALL["experiment.model_path"] / "trained" / "here"
    with pytest.raises(SystemExit):
        command.main(["--recipe", str(RECIPES / "full.yaml"), "--server", "x", "--out", str(out), *CHANGES])
    assert "or part of the model" in capsys.readouterr().err


def test_without_a_server_it_tells_how_to_start_one(capsys):
    command.main(["--recipe", str(RECIPES / "full.yaml"), "--set", "engine.mtp_step=1"])
    words = capsys.readouterr().out.split()
    assert words[words.index("--mtp-step") + 1] == "1"
    assert words[:1] == ["--model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "none.yaml"], "none.yaml is not readable YAML"),
        (["--recipe", str(RECIPES / "full.yaml"), "--set", "engine.mtp_stepp=1"], "nearest known one is mtp_step"),
        (["--recipe", str(RECIPES / "full.yaml"), "--out", "."], "--out . is there already"),
        (["--recipe", str(RECIPES / "full.yaml")], "cannot reach http://127.0.0.1:1"),
    ],
)
def test_a_mistake_ends_it_with_the_reason(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        command.main([*arguments, "--server", "http://127.0.0.1:1"])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
