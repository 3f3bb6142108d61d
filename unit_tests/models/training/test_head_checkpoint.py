"""Checkpoints of trained heads: every byte that was not trained is carried through, in every layout."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.config import load_config
from models.errors import CheckpointError
from models.safetensors_file import read_tensor_index
from models.training.head_checkpoint import digest_checkpoint, load_models, read_tensors, save_checkpoint
from models.training.mtp_settings import TrainingError
from models.weights import normalise_name
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.loading import load_ours

LAYOUTS = [
    {},
    {"prefix": "vl", "vision": True, "shards": 3},
    {"prefix": "language_model.model", "tied": "no"},
    {"moe": True, "expert_layout": "fused"},
    {"moe": True, "expert_layout": "per_expert", "shards": 2},
    {"moe": True, "expert_layout": "mixed", "prefix": "vl", "shards": 2},
    {"mtp_layers": 2},
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def write(folder, **options):
    return make_checkpoint(folder, num_layers=4, dtype="bfloat16", **options)


def load(folder, **options):
    return load_models(folder, load_config(folder), **options)


def bytes_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def payloads(folder) -> dict[str, bytes]:
    """Of every tensor, by name."""
    return {
        name: tensor.file.read_bytes()[tensor.start : tensor.start + tensor.num_bytes]
        for name, tensor in read_tensors(folder).items()
    }


@layouts
def test_an_untrained_copy_is_the_same_to_the_byte(layout, tmp_path):
    source = write(tmp_path / "in", **layout)
    target, draft = load(source)
    save_checkpoint(source, tmp_path / "out", [target, draft])
    assert bytes_of(tmp_path / "out") == bytes_of(source)


@layouts
def test_a_trained_head_changes_the_mtp_tensors_alone(layout, tmp_path):
    source, out = write(tmp_path / "in", **layout), tmp_path / "out"
    (source / "notes").mkdir()
    (source / "notes" / "card.md").write_text("kept")
    (source / "notes" / "model.safetensors").write_text("no weights of this checkpoint")
    _, draft = load(source)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.25
    save_checkpoint(source, out, [draft])
    before, after = payloads(source), payloads(out)
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if normalise_name(name).startswith("mtp.")}
    assert bytes_of(out / "notes") == bytes_of(source / "notes")
    assert {path.name: path.stat().st_size for path in out.glob("*.*")} == {
        path.name: path.stat().st_size for path in source.glob("*.*")
    }
    loaded = load_ours(out)[1].state_dict()
    for name, value in load(out)[1].state_dict().items():
        assert torch.equal(value, loaded[name])
        torch.testing.assert_close(value, draft.state_dict()[name], rtol=1e-2, atol=1e-2)


def test_a_trained_target_is_saved_too_and_a_stored_copy_of_its_tied_head_follows(tmp_path):
    source, out = write(tmp_path / "in"), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    target, draft = load(source)
    with torch.no_grad():
        target.embed_tokens.weight[3] += 1
    save_checkpoint(source, out, [target, draft])
    changed = load_file(out / "model.safetensors")
    assert torch.equal(changed["lm_head.weight"], changed["model.embed_tokens.weight"])
    different = [name for name in tensors if not torch.equal(tensors[name], changed[name])]
    assert sorted(different) == ["lm_head.weight", "model.embed_tokens.weight"]


def test_only_the_elements_that_changed_are_rounded_again(tmp_path):
    """Norms pass through 1 + w: an element far smaller than one would not survive the way back."""
    source, out = write(tmp_path / "in"), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    tensors["mtp.norm.weight"] = torch.full_like(tensors["mtp.norm.weight"], 1.1e-9)
    save_file(tensors, source / "model.safetensors")
    _, draft = load(source)
    with torch.no_grad():
        draft.norm.scale[0] += 0.5
    save_checkpoint(source, out, [draft])
    norm = load_file(out / "model.safetensors")["mtp.norm.weight"]
    assert norm[0] == 0.5
    assert torch.equal(norm[1:], tensors["mtp.norm.weight"][1:])


@pytest.mark.parametrize(
    "layout", [{}, {"prefix": "vl", "shards": 3}, {"moe": True}, {"moe": True, "expert_layout": "per_expert"}], ids=str
)
def test_a_new_head_is_added_under_the_official_names_and_counted(layout, tmp_path):
    source, out = write(tmp_path / "in", mtp_layers=0, **layout), tmp_path / "out"
    _, draft = load(source, random_head=True)
    save_checkpoint(source, out, [draft])
    config = json.loads((out / "config.json").read_text())
    assert config.get("text_config", config)["mtp_num_hidden_layers"] == 1
    before, after = payloads(source), payloads(out)
    added = after.keys() - before.keys()
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("mtp.") for name in added)
    assert any(".experts.0." in name for name in added) == (layout.get("expert_layout") == "per_expert")
    for name, value in load_ours(out)[1].state_dict().items():
        torch.testing.assert_close(value, draft.state_dict()[name], rtol=1e-2, atol=1e-3)
    if layout.get("shards"):
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(after)
        assert index["metadata"]["total_size"] == sum(map(len, after.values()))


def test_a_head_that_config_json_did_not_count_is_counted_once_it_is_trained(tmp_path):
    source, out = write(tmp_path / "in"), tmp_path / "out"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 0}))
    _, draft = load(source, random_head=True)
    save_checkpoint(source, out, [draft])
    assert load_config(out).num_mtp_layers == 1
    assert payloads(out).keys() == payloads(source).keys()


@pytest.mark.parametrize("lost", ["mtp.fc.weight", "mtp.layers.0.self_attn.k_proj.weight", "all"])
@pytest.mark.parametrize("moe", [False, True])
def test_a_head_that_is_not_whole_is_an_error_that_names_its_keys(lost, moe, tmp_path):
    source = write(tmp_path, moe=moe, expert_layout="per_expert")
    tensors = load_file(source / "model.safetensors")
    dropped = [name for name in tensors if name == lost or (lost == "all" and name.startswith("mtp."))]
    save_file({name: tensor for name, tensor in tensors.items() if name not in dropped}, source / "model.safetensors")
    with pytest.raises(TrainingError, match="--mtp-init random") as error:
        load(source)
    assert (lost if lost != "all" else "mtp.pre_fc_norm_hidden.weight") in str(error.value)
    assert load(source, random_head=True)[1].fc.weight.isfinite().all()


def test_a_head_of_another_shape_is_an_error_that_names_the_tensor(tmp_path):
    source = write(tmp_path)
    tensors = load_file(source / "model.safetensors")
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"][:, :-1].contiguous()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(TrainingError, match=r"mtp.fc.weight has shape \[64, 127\]"):
        load(source)


def test_a_head_in_float32_stands_on_a_target_in_bfloat16(tmp_path):
    target, draft = load(write(tmp_path), dtype=torch.bfloat16)
    assert target.lm_head.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.float32}


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    source, out = write(tmp_path / "in"), tmp_path / "out"
    _, draft = load(source)
    save_checkpoint(source, out, [draft])
    before = bytes_of(out)
    monkeypatch.setattr(shutil, "copyfileobj", _fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(source, out, [draft])
    assert bytes_of(out) == before


def test_a_broken_file_is_named(tmp_path):
    source = write(tmp_path)
    (source / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load(source)


def test_names_are_those_of_the_checkpoint_and_in_its_order(tmp_path):
    source = write(tmp_path / "in", prefix="vl")
    _, draft = load(source)
    save_checkpoint(source, tmp_path / "out", [draft])
    names = list(read_tensor_index(tmp_path / "out" / "model.safetensors"))
    assert names == list(read_tensor_index(source / "model.safetensors"))
    assert {normalise_name(name) for name in names if name.startswith("mtp")} == {s.name for s in draft.weight_slots()}


def _fail(*_):
    raise OSError("disk full")


def test_a_digest_is_that_of_config_and_weights(tmp_path):
    source, tensors = write(tmp_path / "in"), {}
    first = digest_checkpoint(source)
    assert digest_checkpoint(shutil.copytree(source, tmp_path / "copy")) == first
    for name in ("model.norm.weight", "mtp.fc.weight"):
        tensors = load_file(source / "model.safetensors")
        tensors[name][0] += 1
        save_file(tensors, tmp_path / "copy" / "model.safetensors")
        assert digest_checkpoint(tmp_path / "copy") != first
    shutil.copy(source / "model.safetensors", tmp_path / "copy")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert digest_checkpoint(tmp_path / "copy") != first
