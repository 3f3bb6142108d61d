"""`python -m models.training`: a head is trained from a text file, stopped, continued, saved and served."""

import json
import subprocess
import sys

import pytest
import torch

from models.safetensors_file import read_tensor_index
from models.training.__main__ import main
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.loading import load_ours


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), num_layers=4, dtype="bfloat16")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"question": f"{a}+{b}?", "answer": f"{a + b}\n#### {a + b}"} for a in range(8) for b in range(8)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def arguments(model, data, out, *more):
    fixed = ["--steps", "6", "--every", "2", "--batch-tokens", "256", "--held-out", "8", "--device", "cpu"]
    return ["--model", str(model), "--data", str(data), "--out", str(out), *fixed, *more]


def train(capsys, *given) -> dict:
    main(arguments(*given))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def head(folder) -> dict[str, bytes]:
    index = read_tensor_index(folder / "model.safetensors")
    raw = (folder / "model.safetensors").read_bytes()
    return {name: raw[tensor.start : tensor.start + tensor.num_bytes] for name, tensor in index.items()}


def test_the_command_trains_and_saves_official_keys_and_nothing_else_changes(model, data, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "models.training", *arguments(model, data.parent, tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["step"], found["out"]) == (6, str(tmp_path / "out"))
    assert len(found["accept"]) == len(found["loss"]) == 1
    assert "6/6" in done.stderr
    before, after = head(model), head(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {n for n in before if n.startswith("mtp.")}
    others = [path for path in model.iterdir() if path.suffix != ".safetensors"]
    assert all((tmp_path / "out" / path.name).read_bytes() == path.read_bytes() for path in others)
    load_ours(tmp_path / "out")


@pytest.mark.parametrize("more", [(), ("--joint", "--depth", "2", "--loss", "tv")])
def test_a_stopped_training_continues_to_the_same_bytes(model, data, tmp_path, capsys, more):
    train(capsys, model, data, tmp_path / "a", *more)
    stopped = train(capsys, model, data, tmp_path / "b", *more, "--stop-after", "3")
    assert (stopped["step"], stopped["out"]) == (3, None)
    assert not (tmp_path / "b").exists()
    train(capsys, model, data, tmp_path / "b", *more, "--resume")
    assert head(tmp_path / "a") == head(tmp_path / "b")
    assert head(tmp_path / "a") != head(model)


def test_a_training_goes_on_with_the_same_model_alone(model, data, tmp_path, capsys):
    train(capsys, model, data, tmp_path / "out", "--stop-after", "2")
    other = make_checkpoint(tmp_path / "other", num_layers=4, dtype="bfloat16", seed=1)
    for given, more in ((other, ()), (model, ("--dtype", "bfloat16"))):
        with pytest.raises(SystemExit):
            main(arguments(given, data, tmp_path / "out", "--resume", *more))
        assert "is of another training: model was " in capsys.readouterr().err


def test_a_new_head_can_be_made_for_a_checkpoint_without_one(data, tmp_path, capsys):
    model = make_checkpoint(tmp_path / "model", num_layers=4, mtp_layers=0, moe=True, prefix="vl")
    found = train(capsys, model, data, tmp_path / "out", "--mtp-init", "random", "--rate", "3e-3")
    lines = (tmp_path / "out.training" / "log.jsonl").read_text().splitlines()
    assert found["loss"][0] < json.loads(lines[0])["loss"][0]
    assert len(load_ours(tmp_path / "out")[1].layers) == 1


@pytest.mark.parametrize("more", [("--recompute", "reentrant"), ("--loss-on", "all"), ("--dtype", "bfloat16")])
def test_every_other_setting_runs(model, data, tmp_path, capsys, more):
    found = train(capsys, model, data, tmp_path / "out", *more)
    assert torch.tensor(found["loss"]).isfinite().all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", "0"), "--steps is 0"),
        (("--depth", "0"), "mtp_depth is 0"),
        (("--no-detach",), "--no-detach needs --joint"),
        (("--joint", "--dtype", "bfloat16"), "--joint with --dtype bfloat16"),
        (("--held-out", "64"), "--held-out takes 64"),
        (("--resume",), "leave --resume out"),
        (("--data", "/nowhere.jsonl"), "not readable"),
        (("--model", "/nowhere"), "does not exist"),
    ],
)
def test_a_users_mistake_is_one_line_and_nothing_is_written(model, data, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as exit_:
        main(arguments(model, data, tmp_path / "out", *more))
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_or_inside_the_model_is_refused(model, data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for out, message in ((tmp_path / "out", "is there already"), (model / "out", "is part of --model")):
        with pytest.raises(SystemExit):
            main(arguments(model, data, out))
        assert message in capsys.readouterr().err


def test_a_missing_tokenizer_is_named(data, tmp_path, capsys):
    model = make_checkpoint(tmp_path / "model", num_layers=4)
    (model / "tokenizer.json").unlink()
    with pytest.raises(SystemExit):
        main(arguments(model, data, tmp_path / "out"))
    assert "tokenizer.json does not exist" in capsys.readouterr().err
