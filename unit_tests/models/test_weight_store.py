"""What serves, by name: given back bit by bit as it came, in every layout and dtype that keeps it."""

import pytest
import torch
from safetensors.torch import load_file

from models.errors import CheckpointError, WeightUpdateError
from models.weight_update import combine_checksums, hash_tensor
from models.weights import fill_randomly, fused_name, normalise_name
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.sessions import checksum_of, draw_tensors, load_store, make_store, update

KEEPING = [
    ("bfloat16", torch.bfloat16),
    ("bfloat16", torch.float32),
    ("bfloat16", torch.float64),
    ("float16", torch.float32),
    ("float32", torch.float32),
    ("float32", torch.float64),
    ("float64", torch.float64),
]


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize(("stored", "served"), KEEPING)
def test_what_was_loaded_comes_back_bit_by_bit(stored, served, moe, tmp_path):
    store = make_store(tmp_path, served, dtype=stored, moe=moe)
    raw = load_file(tmp_path / "model.safetensors")
    assert store.checksums() == {name: hash_tensor(tensor) for name, tensor in raw.items()}
    assert store.checksum() == checksum_of(raw)
    assert all(store.export(name).dtype == tensor.dtype for name, tensor in raw.items())


@pytest.mark.parametrize(("stored", "served"), [("float32", torch.bfloat16), ("float16", torch.bfloat16)])
def test_what_the_models_do_not_keep_comes_back_as_they_have_it(stored, served, tmp_path):
    store = make_store(tmp_path, served, dtype=stored)
    raw = load_file(tmp_path / "model.safetensors")
    for name in ("model.layers.0.mlp.down_proj.weight", "mtp.fc.weight"):
        assert torch.equal(store.export(name), raw[name].to(served))
    assert torch.equal(store.export("model.norm.weight"), raw["model.norm.weight"])


@pytest.mark.parametrize("expert_layout", ["per_expert", "mixed"])
@pytest.mark.parametrize("prefix", ["vl", "language_model.model"])
def test_all_spellings_and_layouts_have_the_same_checksums(prefix, expert_layout, tmp_path):
    options = {"moe": True, "dtype": "bfloat16", "tied": "no"}
    plain = make_store(tmp_path / "plain", **options)
    other = make_store(tmp_path / "other", prefix=prefix, expert_layout=expert_layout, vision=True, **options)
    assert other.checksums() == plain.checksums()
    for name, tensor in load_file(tmp_path / "other" / "model.safetensors").items():
        if not name.startswith("model.visual"):
            assert torch.equal(other.export(name), tensor), name
    assert all(fused_name(name) == normalise_name(name) == name for name in plain.checksums())


def test_a_tied_head_is_the_embedding(tmp_path):
    store = make_store(tmp_path)
    assert torch.equal(store.export("lm_head.weight"), store.export("model.embed_tokens.weight"))
    assert "lm_head.weight" not in store.checksums()


def test_without_a_draft_head_there_are_none_of_its_tensors(tmp_path):
    with_draft = make_store(tmp_path).checksums()
    without = load_store(tmp_path, mtp=False)
    assert without.checksums() == {name: sha for name, sha in with_draft.items() if not name.startswith("mtp.")}
    with pytest.raises(WeightUpdateError, match=r"no tensor mtp\.fc\.weight: .*model\.embed_tokens"):
        without.export("mtp.fc.weight")


def test_an_export_is_a_copy(tmp_path):
    store = make_store(tmp_path)
    before = store.checksum()
    for name in store.checksums():
        store.export(name).zero_()
    assert store.checksum() == before


def test_a_norm_that_is_trained_comes_back_as_it_is_now(tmp_path):
    store = make_store(tmp_path)
    before = store.export("model.norm.weight")
    store.target.norm.scale.data[3] = 2.5
    after = store.export("model.norm.weight")
    assert after[3] == 1.5
    assert (after != before).nonzero().tolist() == [[3]]


def test_random_weights_come_back_as_they_are(tmp_path):
    store = make_store(tmp_path)
    before = store.checksums()
    fill_randomly(store.target, store.draft)
    after = store.checksums()
    assert all(after[name] != before[name] for name in before)
    assert torch.equal(store.export("model.norm.weight"), torch.zeros(64))


def test_the_dtype_is_that_of_the_last_load_or_update(tmp_path):
    store = make_store(tmp_path, dtype="bfloat16")
    assert store.export("mtp.fc.weight").dtype == torch.bfloat16
    update(store, draw_tensors(dtype="float32"))
    assert store.checksum() == checksum_of(draw_tensors(dtype="float32"))
    store.load(make_checkpoint(tmp_path / "half", num_layers=4, dtype="float16"), show_progress=False)
    assert store.export("mtp.fc.weight").dtype == torch.float16


def test_a_generation_is_counted_with_every_change(tmp_path):
    store = make_store(tmp_path)
    assert store.generation == 1
    update(store, draw_tensors())
    assert store.generation == 2
    with pytest.raises(CheckpointError, match="has no"):
        store.load(tmp_path / "nowhere", show_progress=False)
    assert store.generation == 2


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights_come_back_as_what_is_left_of_them(quantization, tmp_path):
    store = load_store(make_checkpoint(tmp_path, num_layers=4, dtype="bfloat16"), quantization=quantization)
    raw = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    exported = store.export(name)
    assert exported.dtype == torch.float32
    error = (exported - raw[name]).norm() / raw[name].norm()
    assert 0 < error < 0.12
    assert torch.equal(store.export("model.norm.weight"), raw["model.norm.weight"])


def test_the_checksum_of_all_is_that_of_sorted_lines(tmp_path):
    checksums = make_store(tmp_path).checksums()
    assert combine_checksums(checksums) == combine_checksums(dict(reversed(checksums.items())))
    assert combine_checksums({}) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    renamed = {f"{name}x": sha for name, sha in checksums.items()}
    assert combine_checksums(renamed) != combine_checksums(checksums)
