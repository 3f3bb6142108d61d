"""Deltas: whatever changes, the result has the bits of the whole tensor; what was made for other weights is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from models.errors import WeightUpdateError
from models.weight_transfer.wire import encode_delta
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.sessions import (
    are_equal,
    change,
    checksum_of,
    describe,
    load_store,
    make_store,
    parameters,
    update,
)

MATRIX, NORM, CONV = (
    "model.layers.0.mlp.down_proj.weight",
    "model.norm.weight",
    "model.layers.0.linear_attn.conv1d.weight",
)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A store that tests leave as it is."""
    return make_store(tmp_path_factory.mktemp("served"), torch.bfloat16, dtype="bfloat16")


def exports(store):
    return {name: store.export(name) for name in store.checksums()}


def apply(store, old, new, **terms):
    """A session that turns `old` into `new`, of all tensors."""
    session = store.begin(tensors=describe(new), is_delta=True, result_sha256=checksum_of(new), **terms)
    for name, tensor in new.items():
        session.add_delta(name, *encode_delta(old[name], tensor))
    session.prepare()
    report = session.commit()
    session.close()
    return report


@pytest.mark.parametrize("share", [0, 1e-9, 0.02, 1])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("bfloat16", torch.bfloat16),
        ("bfloat16", torch.float32),
        ("float32", torch.float32),
        ("float16", torch.float32),
        ("float64", torch.float64),
    ],
)
@pytest.mark.parametrize("moe", [False, True])
def test_a_delta_gives_the_bits_of_a_full_update(moe, stored, dtype, share, tmp_path):
    options = {"moe": moe, "dtype": stored, "tied": "no"}
    store, full = (make_store(tmp_path / name, dtype, **options) for name in "ab")
    places = [tensor.data_ptr() for tensor in parameters(store)]
    old = exports(store)
    new = {name: change(tensor, share, seed) for seed, (name, tensor) in enumerate(old.items())}
    report = apply(store, old, new, needs_mtp=True)
    update(full, new)
    assert are_equal(store, full) and store.checksums() == full.checksums()
    assert report.touched_target and report.touched_draft
    assert [tensor.data_ptr() for tensor in parameters(store)] == places
    assert apply(store, new, old).num_bytes == report.num_bytes
    assert store.checksum() == checksum_of(old)


def test_one_number_costs_one_number(tmp_path):
    store = make_store(tmp_path, dtype="float32")
    old = store.export(MATRIX)
    report = apply_one(store, old, change(old, 1e-9))
    assert report.num_bytes == 4


def apply_one(store, old, new, hashed=True):
    session = store.begin(tensors=describe({MATRIX: new}, hashed), is_delta=True)
    session.add_delta(MATRIX, *encode_delta(old, new))
    session.prepare()
    return session.commit()


def test_what_is_sent_is_copied(tmp_path):
    store = make_store(tmp_path, dtype="float32")
    places, values = torch.tensor([3, 8]), torch.tensor([1.0, 2.0])
    session = store.begin(is_delta=True)
    session.add_delta(MATRIX, places, values)
    session.prepare()
    session.commit()
    assert store.export(MATRIX).view(-1)[places].tolist() == values.tolist() == [1.0, 2.0]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_random_deltas_end_in_the_tensor_that_was_meant(served, data):
    name = data.draw(st.sampled_from([MATRIX, NORM, CONV, "mtp.fc.weight", "model.layers.3.self_attn.q_proj.weight"]))
    old = served.export(name)
    places = data.draw(st.lists(st.integers(0, old.numel() - 1), max_size=20))
    new = old.clone()
    for place in places:
        bits = data.draw(st.integers(-(2**15), 2**15 - 1))
        new.view(-1).view(torch.int16)[place] = bits
    session = served.begin(tensors=describe({name: new}, hashed=not new.isnan().any()), is_delta=True)
    session.add_delta(name, *encode_delta(old, new))
    session.prepare()
    session.commit()
    after = served.export(name)
    assert torch.equal(after.nan_to_num(7), new.nan_to_num(7)) and torch.equal(after.isnan(), new.isnan())
    session = served.begin(is_delta=True)
    session.add_delta(name, *encode_delta(new, old))
    session.prepare()
    session.commit()
    assert torch.equal(served.export(name), old)


def test_a_delta_for_other_weights_is_found_out(served):
    before, old = served.checksum(), served.export(MATRIX)
    base = change(old, 0.01, seed=1)
    new = change(base, 0.02, seed=2)
    with pytest.raises(WeightUpdateError, match=f"tensor {MATRIX} has SHA-256 .* other weights than those that serve"):
        apply_one(served, base, new)
    session = served.begin(is_delta=True, result_sha256=checksum_of(exports(served) | {MATRIX: new}))
    session.add_delta(MATRIX, *encode_delta(base, new))
    with pytest.raises(WeightUpdateError, match=r"would give .* other weights than those that serve"):
        session.prepare()
    assert served.checksum() == before


def test_a_version_that_was_left_out_is_found_out_by_what_is_not_in_the_delta(served):
    old = exports(served)
    skipped = old | {NORM: change(old[NORM], 0.1)}
    new = skipped | {MATRIX: change(old[MATRIX], 0.02)}
    session = served.begin(is_delta=True, result_sha256=checksum_of(new))
    session.add_delta(MATRIX, *encode_delta(skipped[MATRIX], new[MATRIX]))
    with pytest.raises(WeightUpdateError, match="would give"):
        session.prepare()


BAD = {
    "unsorted": ([5, 3], 2, r"has index 3 behind 5: sort them"),
    "twice": ([5, 9, 9], 3, r"has index 9 behind 9: sort them"),
    "below": ([-1, 3], 2, r"has indices from -1 to 3, there are 6144"),
    "above": ([3, 6144], 2, r"has indices from 3 to 6144, there are 6144"),
    "more values": ([3, 4], 3, r"has torch.int64 indices \[2\] for \[3\] values"),
    "fewer values": ([3, 4], 1, r"has torch.int64 indices \[2\] for \[1\] values"),
    "not flat": ([[3, 4]], 2, r"indices \[1, 2\]"),
    "not whole": ([3.0, 4.0], 2, r"has torch.float32 indices"),
    "flags": ([True, False], 2, r"has torch.bool indices"),
}


@pytest.mark.parametrize("case", BAD)
def test_places_must_ascend_within_the_tensor(case, served):
    places, num_values, message = BAD[case]
    session = served.begin(is_delta=True)
    with pytest.raises(WeightUpdateError, match=message):
        session.add_delta(MATRIX, torch.tensor(places), torch.zeros(num_values, dtype=torch.bfloat16))
    with pytest.raises(WeightUpdateError, match="has failed"):
        session.commit()


def test_places_beyond_what_64_bits_hold_are_refused(served):
    session = served.begin(is_delta=True)
    with pytest.raises(WeightUpdateError, match="there are 6144: send full"):
        session.add_delta(MATRIX, torch.tensor([2**64 - 5], dtype=torch.uint64), torch.zeros(1, dtype=torch.bfloat16))


def test_a_delta_has_the_dtype_that_is_served(served, tmp_path):
    one = torch.zeros(1)
    with pytest.raises(WeightUpdateError, match=r"is torch\.float32, and it is served as torch\.bfloat16: send full"):
        served.begin(is_delta=True).add_delta(MATRIX, torch.tensor([0]), one)
    with pytest.raises(WeightUpdateError, match=r"is torch\.float32, and it is served as torch\.bfloat16: send full"):
        served.begin(is_delta=True, tensors=describe({MATRIX: torch.zeros(64, 96)}))
    narrowed = make_store(tmp_path, torch.bfloat16, dtype="float32")
    with pytest.raises(WeightUpdateError, match=r"is torch\.float32, and it is served as torch\.bfloat16: send full"):
        narrowed.begin(is_delta=True).add_delta(MATRIX, torch.tensor([0]), one)
    narrowed.begin(is_delta=True).add_delta(NORM, torch.tensor([0]), one)


def test_deltas_want_a_session_of_their_own_and_weights_that_are_not_quantized(served, tmp_path):
    with pytest.raises(WeightUpdateError, match="is a delta, and the session is one for whole tensors"):
        served.begin(is_partial=True).add_delta(MATRIX, torch.tensor([0]), torch.zeros(1, dtype=torch.bfloat16))
    quantized = load_store(make_checkpoint(tmp_path, num_layers=4), quantization="int8")
    with pytest.raises(WeightUpdateError, match=r"are quantized.*: send full"):
        quantized.begin(is_delta=True)


def test_a_delta_of_no_such_tensor_is_refused_and_one_of_a_missing_head_skipped(served, tmp_path):
    one = (torch.tensor([0]), torch.zeros(1, dtype=torch.bfloat16))
    with pytest.raises(WeightUpdateError, match=r"unexpected tensor model\.x"):
        served.begin(is_delta=True).add_delta("model.x", *one)
    store = make_store(tmp_path, torch.bfloat16, mtp=False, dtype="bfloat16")
    session = store.begin(is_delta=True)
    session.add_delta("mtp.fc.weight", *one)
    session.add_delta(f"model.language_model.{NORM.removeprefix('model.')}", *one)
    session.prepare()
    assert not session.commit().touched_draft
    assert store.export(NORM)[0] == 0


def test_a_delta_may_bring_some_tensors_whole(tmp_path):
    store = make_store(tmp_path, dtype="float32")
    old = exports(store)
    new = old | {MATRIX: change(old[MATRIX], 0.02), "mtp.fc.weight": change(old["mtp.fc.weight"], 1)}
    session = store.begin(is_delta=True, result_sha256=checksum_of(new))
    session.add_delta(MATRIX, *encode_delta(old[MATRIX], new[MATRIX]))
    session.add("mtp.fc.weight", new["mtp.fc.weight"])
    session.prepare()
    session.commit()
    assert store.checksum() == checksum_of(new)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_parts_of_a_quantized_matrix_leave_the_others(quantization, tmp_path):
    options = {"num_layers": 4, "dtype": "bfloat16", "moe": True}
    old, new = (make_checkpoint(tmp_path / str(seed), seed=seed, **options) for seed in range(2))
    store, expected = load_store(old, quantization=quantization), load_store(new, quantization=quantization)
    names = ["model.layers.0.linear_attn.in_proj_b.weight", "model.layers.3.self_attn.k_proj.weight"]
    names += [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (2, 5)]
    others = {name: store.export(name) for name in store.checksums()}
    full = {name: tensor for file in new.glob("*.safetensors") for name, tensor in load_file(file).items()}
    gate_up = full["model.layers.1.mlp.experts.gate_up_proj"]
    update(
        store,
        {name: full[name] for name in names[:2]} | {names[2]: gate_up[2, 24:], names[3]: gate_up[5, 24:]},
        is_partial=True,
    )
    for name in names:
        assert torch.equal(store.export(name), expected.export(name))
    fused = others.pop("model.layers.1.mlp.experts.gate_up_proj")
    fused[2, 24:], fused[5, 24:] = (store.export(name) for name in names[2:])
    assert torch.equal(store.export("model.layers.1.mlp.experts.gate_up_proj"), fused)
    assert all(torch.equal(store.export(name), others[name]) for name in others if name not in names)
