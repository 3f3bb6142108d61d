"""Weight sessions: what was sent serves as after a cold start, or nothing changes at all and the error says why."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from models import weight_update
from models.errors import CheckpointError, WeightUpdateError
from models.weight_slot import WeightSlot
from models.weight_transfer.wire import encode_delta
from models.weight_update import Exchange, TensorSpec, bytes_of, hash_tensor
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.sessions import (
    are_equal,
    checksum_of,
    describe,
    draw_tensors,
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
    return make_store(tmp_path_factory.mktemp("served"))


def refusal(store, weights, **terms) -> str:
    """What a session with these tensors says; the weights stay."""
    before = store.checksum()
    with pytest.raises(WeightUpdateError) as caught:
        update(store, weights, **terms)
    assert store.checksum() == before and "\n" not in str(caught.value)
    return str(caught.value)


def begin_refusal(store, specs, **terms) -> str:
    with pytest.raises(WeightUpdateError) as caught:
        store.begin(tensors=specs, **terms)
    return str(caught.value)


def add_deltas(session, old, new) -> None:
    for name, tensor in new.items():
        session.add_delta(name, *encode_delta(old[name], tensor))


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("mtp", [True, False])
@pytest.mark.parametrize("options", [{}, {"tied": "no"}, {"moe": True}, {"moe": True, "dtype": "bfloat16"}])
def test_an_update_ends_in_the_memory_of_a_cold_start(options, mtp, quantization, tmp_path):
    store = load_store(make_checkpoint(tmp_path / "a", num_layers=4, **options), mtp=mtp, quantization=quantization)
    new = make_checkpoint(tmp_path / "b", num_layers=4, seed=1, **options)
    tensors = load_file(new / "model.safetensors")
    places = [tensor.data_ptr() for tensor in parameters(store)]
    report = update(store, tensors, tensors=describe(tensors), result_sha256=checksum_of(tensors))
    expected = load_store(new, mtp=mtp, quantization=quantization)
    assert are_equal(store, expected) and store.checksums() == expected.checksums()
    assert [tensor.data_ptr() for tensor in parameters(store)] == places
    assert report.touched_target and report.touched_draft == mtp
    assert report.num_bytes >= sum(tensor.nbytes for tensor in parameters(store))


@pytest.mark.parametrize("served_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sent", ["bfloat16", "float16", "float32", "float64"])
def test_every_float_type_updates_every_other(sent, served_dtype, tmp_path):
    store = make_store(tmp_path / "a", served_dtype, dtype="bfloat16")
    new = make_checkpoint(tmp_path / "b", num_layers=4, dtype=sent, seed=1)
    tensors = load_file(new / "model.safetensors")
    update(store, tensors, tensors=describe(tensors), result_sha256=checksum_of(tensors))
    expected = load_store(new, served_dtype)
    assert are_equal(store, expected) and store.checksums() == expected.checksums()


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize(("expert_layout", "prefix"), [("per_expert", "text"), ("mixed", "vl"), ("fused", "vl")])
def test_experts_come_in_either_layout_and_names_in_any_spelling(expert_layout, prefix, quantization, tmp_path):
    options = {"moe": True, "num_layers": 4, "dtype": "bfloat16"}
    store = load_store(make_checkpoint(tmp_path / "a", **options), quantization=quantization)
    new = make_checkpoint(
        tmp_path / "b", seed=1, expert_layout=expert_layout, prefix=prefix, vision=True, shards=2, **options
    )
    tensors = {name: tensor for file in new.glob("*.safetensors") for name, tensor in load_file(file).items()}
    update(store, tensors, tensors=describe(tensors))
    expected = load_store(new, quantization=quantization)
    assert are_equal(store, expected) and store.checksums() == expected.checksums()


def test_the_result_is_known_where_experts_come_one_by_one(tmp_path):
    store = make_store(tmp_path / "a", moe=True, dtype="bfloat16")
    split = make_checkpoint(
        tmp_path / "b", moe=True, num_layers=4, dtype="bfloat16", seed=1, expert_layout="per_expert"
    )
    result = checksum_of(draw_tensors(moe=True, dtype="bfloat16"))
    tensors = load_file(split / "model.safetensors")
    assert "would give" in refusal(store, tensors, result_sha256=result[::-1])
    update(store, tensors, result_sha256=result)
    assert store.checksum() == result
    quantized = load_store(split, quantization="int8")
    assert "in parts, so result_sha256 cannot be checked" in refusal(quantized, tensors, result_sha256=result)


def test_the_result_of_some_experts_is_known_too(tmp_path):
    store = make_store(tmp_path, moe=True, dtype="bfloat16")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    fused = store.export(name)
    gate, up = fused[3, :24] * 2, fused[5, 24:].clone()
    up[2, 7] = 3.0
    fused[3, :24], fused[5, 24:] = gate, up
    result = checksum_of({other: store.export(other) for other in store.checksums()} | {name: fused})
    prefix = "model.layers.1.mlp.experts"
    session = store.begin(is_delta=True, result_sha256=result)
    session.add(f"{prefix}.3.gate_proj.weight", gate)
    session.add_delta(f"{prefix}.5.up_proj.weight", *encode_delta(store.export(f"{prefix}.5.up_proj.weight"), up))
    session.prepare()
    session.commit()
    assert torch.equal(store.export(name), fused) and store.checksum() == result


def test_some_experts_of_a_wider_type_do_not_narrow_the_others(tmp_path):
    store = make_store(tmp_path, moe=True, dtype="float32")
    name, prefix = "model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts"
    before = store.export(name)
    update(store, {f"{prefix}.2.down_proj.weight": before[2].bfloat16()}, is_partial=True)
    before[2] = before[2].bfloat16().float()
    assert torch.equal(store.export(name), before)


def test_what_is_sent_is_copied(tmp_path):
    store, tensors = make_store(tmp_path), draw_tensors()
    session = store.begin()
    for name, tensor in tensors.items():
        session.add(name, tensor)
    result = checksum_of(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    session.prepare()
    session.commit()
    assert store.checksum() == result
    assert not any(tensor.any() for tensor in tensors.values())


def test_nothing_that_serves_changes_before_the_commit(served):
    before = served.checksum()
    session = served.begin()
    for name, tensor in draw_tensors().items():
        session.add(name, tensor)
    session.prepare()
    assert served.checksum() == before
    session.close()
    session.close()
    assert served.checksum() == before
    with pytest.raises(WeightUpdateError, match="closed: begin a new one"):
        session.commit()


def test_what_comes_while_the_session_is_closed_is_not_kept(served, monkeypatch):
    session = served.begin(is_partial=True)
    load_rows = WeightSlot.load_rows
    monkeypatch.setattr(WeightSlot, "load_rows", lambda *args: session.close() or load_rows(*args))
    with pytest.raises(WeightUpdateError, match="is closed"):
        session.add(NORM, draw_tensors()[NORM])
    assert not session._staged


def test_a_partial_update_leaves_the_rest(tmp_path):
    store, tensors = make_store(tmp_path, dtype="bfloat16"), draw_tensors(dtype="bfloat16")
    before = {name: store.export(name) for name in tensors}
    chosen = {name: tensors[name] for name in (MATRIX, NORM, CONV, "model.layers.3.self_attn.k_proj.weight")}
    result = before | chosen
    report = update(store, chosen, is_partial=True, tensors=describe(chosen), result_sha256=checksum_of(result))
    assert store.checksum() == checksum_of(result)
    assert report.touched_target and not report.touched_draft


def test_the_draft_head_alone_is_a_partial_update(tmp_path):
    store, tensors = make_store(tmp_path), draw_tensors()
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    assert "lacks model.embed_tokens.weight" in refusal(store, head)
    report = update(store, head, is_partial=True, needs_mtp=True)
    assert report.touched_draft and not report.touched_target


def test_the_target_alone_is_complete_unless_the_head_is_wanted(tmp_path):
    store, tensors = make_store(tmp_path), draw_tensors()
    target = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    before = store.export("mtp.fc.weight")
    for terms in ({}, {"is_partial": True}):
        assert "no mtp.* tensor" in refusal(store, target, needs_mtp=True, **terms)
        assert "no mtp.* tensor" in begin_refusal(store, describe(target), needs_mtp=True, **terms)
    report = update(store, target)
    assert report.touched_target and not report.touched_draft
    assert torch.equal(store.export("mtp.fc.weight"), before)
    half = target | {"mtp.fc.weight": tensors["mtp.fc.weight"]}
    assert "lacks mtp." in refusal(store, half)


def test_without_a_head_its_weights_are_skipped_but_belong_to_the_result(tmp_path, caplog):
    store, tensors = make_store(tmp_path, mtp=False), draw_tensors()
    caplog.set_level("INFO", logger="models")
    report = update(store, tensors, tensors=describe(tensors), needs_mtp=True, result_sha256=checksum_of(tensors))
    assert not report.touched_draft
    assert "skipped 15 draft head (mtp.*) tensors" in caplog.text


def test_a_tied_head_and_a_vision_tower_are_skipped(tmp_path):
    store, tensors = make_store(tmp_path), draw_tensors()
    extra = {"lm_head.weight": torch.ones(320, 64), "model.visual.x": torch.ones(3)}
    update(store, tensors | extra)
    assert store.checksum() == checksum_of(tensors)


REFUSALS = {
    "unknown": ({"model.layers.9.mlp.down_proj.weight": torch.ones(64, 96)}, "unexpected tensor model.layers.9"),
    "shape": ({MATRIX: torch.ones(96, 64)}, r"has shape \[96, 64\], config.json asks for \[64, 96\]"),
    "rank": ({MATRIX: torch.ones(64 * 96)}, r"has shape \[6144\]"),
    "int8": ({MATRIX: torch.ones(64, 96, dtype=torch.int8)}, "int8: only BF16"),
    "fp8": ({MATRIX: torch.ones(64, 96).to(torch.float8_e4m3fn)}, "float8_e4m3fn: only BF16"),
    "bool": ({MATRIX: torch.ones(64, 96, dtype=torch.bool)}, "bool: only BF16"),
    "scale": ({f"{MATRIX}_scale": torch.ones(64)}, "belongs to quantized weights: send unquantized ones"),
    "scale_inv": ({f"{MATRIX}_scale_inv": torch.ones(1, 1)}, "belongs to quantized weights: send unquantized ones"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_at_the_beginning_and_when_it_comes(case, served):
    tensors, message = REFUSALS[case]
    with pytest.raises(WeightUpdateError, match=message):
        served.begin(tensors=describe(tensors, hashed=False), is_partial=True)
    session = served.begin(is_partial=True)
    with pytest.raises(WeightUpdateError, match=message):
        session.add(*next(iter(tensors.items())))
    with pytest.raises(WeightUpdateError, match=rf"has failed \(.*{message}.*\): begin a new one"):
        session.prepare()


def test_a_tensor_may_come_once(tmp_path):
    store, tensors = make_store(tmp_path, moe=True), draw_tensors(moe=True)
    specs = describe(tensors)
    assert "is in the update twice" in begin_refusal(store, [*specs, specs[3]])
    spellings = {NORM: tensors[NORM], "model.language_model.norm.weight": tensors[NORM]}
    assert "is in the update twice" in refusal(store, spellings, is_partial=True)
    name = "model.layers.0.mlp.experts"
    both = {f"{name}.down_proj": tensors[f"{name}.down_proj"]}
    both[f"{name}.1.down_proj.weight"] = tensors[f"{name}.down_proj"][1]
    assert "tensors overlap (fused and per-expert)" in refusal(store, both, is_partial=True)
    assert "tensors overlap" in begin_refusal(store, describe(both), is_partial=True)


def test_what_is_missing_is_named(tmp_path):
    store, tensors = make_store(tmp_path), draw_tensors()
    some = {name: tensor for name, tensor in tensors.items() if name not in (MATRIX, "mtp.norm.weight")}
    assert refusal(store, some) == f"the update lacks {MATRIX}, mtp.norm.weight"
    assert begin_refusal(store, describe(some)) == f"the update lacks {MATRIX}, mtp.norm.weight"
    said = refusal(store, some, tensors=describe(tensors))
    assert said.startswith(f"2 tensors have not come, the first is {MATRIX}: send")
    assert refusal(store, {}).startswith("the update lacks model.embed_tokens.weight, ") and "more" in refusal(
        store, {}
    )


def test_only_what_was_declared_may_come(served):
    tensors = draw_tensors()
    specs = [spec for spec in describe(tensors) if spec.name != MATRIX]
    assert "is not among the 1 that were declared" in refusal(
        served, {MATRIX: tensors[MATRIX]}, tensors=describe({NORM: tensors[NORM]}), is_partial=True
    )
    other = [replace(spec, dtype="float64") for spec in describe({NORM: tensors[NORM]})]
    assert "is torch.float32 and was declared as float64" in refusal(
        served, {NORM: tensors[NORM]}, tensors=other, is_partial=True
    )
    assert "lacks" in begin_refusal(served, specs)


@pytest.mark.parametrize("name", [MATRIX, NORM, CONV, "model.embed_tokens.weight"])
def test_a_flipped_bit_is_found_out(name, served):
    tensors = draw_tensors()
    specs = describe(tensors)
    for place in torch.randint(tensors[name].numel() * 32, (8,), generator=torch.Generator().manual_seed(3)).tolist():
        flipped = tensors[name].clone()
        flipped.view(-1).view(torch.uint8)[place // 8] ^= 1 << place % 8
        said = refusal(served, tensors | {name: flipped}, tensors=specs)
        assert said.startswith(f"tensor {name} has SHA-256 ") and "changed on the way" in said


def test_a_flipped_bit_shows_in_the_result_alone(served):
    tensors = draw_tensors()
    result = checksum_of(tensors)
    assert "would give weights of SHA-256" in refusal(served, change_one_bit(tensors), result_sha256=result)
    session = served.begin(result_sha256=result.upper())
    for name, tensor in tensors.items():
        session.add(name, tensor)
    session.prepare()
    session.close()


def change_one_bit(tensors):
    flipped = tensors[CONV].clone()
    flipped.view(-1).view(torch.uint8)[5] ^= 1
    return tensors | {CONV: flipped}


def test_numbers_that_are_not_finite_are_the_trainers_affair(tmp_path):
    store, tensors = make_store(tmp_path), draw_tensors()
    tensors[MATRIX][3, 4], tensors[NORM][2] = torch.nan, -torch.inf
    update(store, tensors, tensors=describe(tensors))
    assert store.export(MATRIX)[3, 4].isnan() and store.export(NORM)[2] == -torch.inf


def test_work_happens_in_order(tmp_path):
    store, tensors = make_store(tmp_path), draw_tensors()
    session = store.begin(is_partial=True)
    session.add(NORM, tensors[NORM])
    with pytest.raises(WeightUpdateError, match="not prepared"):
        session.commit()
    session = store.begin(is_partial=True)
    session.add(NORM, tensors[NORM])
    session.prepare()
    session.commit()
    with pytest.raises(WeightUpdateError, match="have changed since the session began"):
        session.commit()
    with pytest.raises(WeightUpdateError, match="have changed since the session began"):
        session.add(MATRIX, tensors[MATRIX])


def test_what_comes_behind_the_preparation_is_prepared_too(tmp_path):
    store, tensors = make_store(tmp_path), draw_tensors()
    session = store.begin(is_partial=True)
    session.add(NORM, tensors[NORM])
    session.prepare()
    session.add(MATRIX, tensors[MATRIX])
    with pytest.raises(WeightUpdateError, match="not prepared"):
        session.commit()


def test_of_two_sessions_the_second_to_commit_is_refused(tmp_path):
    store, tensors = make_store(tmp_path), draw_tensors()
    sessions = [store.begin(is_partial=True) for _ in range(2)]
    for session, name in zip(sessions, (NORM, MATRIX), strict=True):
        session.add(name, tensors[name])
        session.prepare()
    sessions[0].commit()
    with pytest.raises(WeightUpdateError, match="have changed since the session began"):
        sessions[1].commit()
    assert torch.equal(store.export(NORM), tensors[NORM]) and not torch.equal(store.export(MATRIX), tensors[MATRIX])


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_tensors_may_come_from_many_threads(quantization, tmp_path):
    store = load_store(make_checkpoint(tmp_path / "a", num_layers=4, moe=True), quantization=quantization)
    new = make_checkpoint(tmp_path / "b", num_layers=4, moe=True, seed=1, expert_layout="per_expert")
    tensors = load_file(new / "model.safetensors")
    session = store.begin(tensors=describe(tensors))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(session.add, tensors.keys(), tensors.values()))
    session.prepare()
    session.commit()
    assert are_equal(store, load_store(new, quantization=quantization))


def test_a_commit_works_in_inference_mode(tmp_path):
    store, tensors = make_store(tmp_path), draw_tensors()
    session = store.begin(is_delta=True)
    session.add(MATRIX, tensors[MATRIX])
    session.add_delta(NORM, *encode_delta(store.export(NORM), tensors[NORM]))
    session.add_delta(CONV, *encode_delta(store.export(CONV), tensors[CONV]))
    session.prepare()
    with torch.inference_mode():
        session.commit()
    assert all(torch.equal(store.export(name), tensors[name]) for name in (MATRIX, NORM, CONV))
    store.target.norm.scale.data.add_(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.uint8])
def test_a_hash_is_that_of_the_bytes_row_by_row(dtype):
    tensor = torch.arange(24).view(4, 6).to(dtype)
    expected = hashlib.sha256(b"".join(bytes(row.view(torch.uint8).numpy()) for row in tensor)).hexdigest()
    assert hash_tensor(tensor) == hash_tensor(tensor.T.contiguous().T) == expected
    assert hash_tensor(tensor.T) != expected
    assert bytes(bytes_of(tensor[:0])) == b"" and hash_tensor(tensor[0, 0]) == hash_tensor(tensor[:1, :1])


def test_errors_are_of_both_kinds():
    assert issubclass(WeightUpdateError, CheckpointError)
    with pytest.raises(WeightUpdateError, match="as it is"), weight_update.update_errors():
        raise CheckpointError("as it is")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_an_exchange_twice_is_none(data):
    serving = torch.randn(data.draw(st.integers(1, 60)))
    size = len(serving)
    places = sorted(data.draw(st.sets(st.integers(0, size - 1)))) if data.draw(st.booleans()) else None
    indices = None if places is None else torch.tensor(places, dtype=torch.int64)
    staged = torch.randn(size if places is None else len(places))
    old, new = serving.clone(), staged.clone()
    exchange = Exchange(serving, staged, indices)
    exchange.run()
    assert torch.equal(serving if indices is None else serving[indices], new)
    assert torch.equal(staged, old if indices is None else old[indices])
    exchange.run()
    assert torch.equal(serving, old) and torch.equal(staged, new)


@pytest.mark.parametrize(("size", "num_blocks"), [(40, 2), (37, 4), (1, 1), (0, 1)])
def test_blocks_cover_an_exchange_once(size, num_blocks, monkeypatch):
    monkeypatch.setattr(weight_update, "BLOCK_NUMBERS", 10)
    serving, staged = torch.zeros(size), torch.arange(size) + 1.0
    blocks = list(Exchange(serving, staged).blocks())
    assert len(blocks) == num_blocks  # where it can be, of two numbers in a word
    for block in blocks:
        block.run()
    assert torch.equal(serving, torch.arange(size) + 1.0) and not staged.any()
    places = torch.arange(0, size, 3)
    for block in Exchange(serving, torch.full(places.shape, -1.0), places).blocks():
        block.run()
    assert (serving == -1).nonzero().flatten().tolist() == places.tolist()


def test_parts_that_begin_within_a_word_are_exchanged_too():
    memory, staged = torch.zeros(9, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
    for block in Exchange(memory[1:5], staged).blocks():
        block.run()
    assert memory.tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 0]


def test_a_spec_spells_dtypes_as_torch_does(served):
    spec = TensorSpec(NORM, "torch.float32", (64,))
    served.begin(tensors=[spec], is_partial=True)
    assert "is float: only BF16" in begin_refusal(served, [replace(spec, dtype="float")], is_partial=True)
