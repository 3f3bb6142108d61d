"""Updates from checkpoint directories, single files, shared memory and bytes; files that change meanwhile are told."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from models import safetensors_file
from models.errors import WeightUpdateError
from models.safetensors_file import FileTensor
from models.weight_transfer import disk
from models.weight_transfer.disk import stage_bytes, stage_directory
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.sessions import are_equal, checksum_of, draw_tensors, load_store, make_store

FILE = "model.safetensors"
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A store that tests leave as it is."""
    return make_store(tmp_path_factory.mktemp("served"), dtype="bfloat16")


def commit(store, path):
    session = store.begin()
    stage_directory(path, session)
    session.prepare()
    session.commit()
    session.close()


def refusal(store, path) -> str:
    before = store.checksum()
    with pytest.raises(WeightUpdateError) as caught:
        commit(store, path)
    assert store.checksum() == before and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("layout", [{}, {"shards": 3, "prefix": "vl", "vision": True}, {"expert_layout": "per_expert"}])
def test_a_directory_serves_as_after_a_cold_start(layout, quantization, tmp_path, monkeypatch):
    options = {"moe": True, "num_layers": 4, "dtype": "bfloat16"}
    store = load_store(make_checkpoint(tmp_path / "a", **options), quantization=quantization)
    new = make_checkpoint(tmp_path / "b", seed=1, **options, **layout)
    expected = load_store(new, quantization=quantization)
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 3000)
    commit(store, str(new))
    assert are_equal(store, expected) and store.checksums() == expected.checksums()


def test_one_file_is_enough(tmp_path):
    store = make_store(tmp_path / "a", dtype="bfloat16")
    commit(store, make_checkpoint(tmp_path / "b", num_layers=4, dtype="bfloat16", seed=1) / FILE)
    assert store.checksum() == checksum_of(draw_tensors(dtype="bfloat16"))


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="there is no shared memory here")
def test_a_file_in_shared_memory_is_one_like_any_other(tmp_path):
    store, tensors = make_store(tmp_path, dtype="bfloat16"), draw_tensors(dtype="bfloat16")
    path = SHARED_MEMORY / f"tandem-test-{os.getpid()}.safetensors"
    save_file(tensors, path)
    try:
        commit(store, path)
    finally:
        path.unlink()
    assert store.checksum() == checksum_of(tensors)


def test_declared_hashes_hold_for_files_that_are_read_in_blocks(served, tmp_path, monkeypatch):
    make_checkpoint(tmp_path, num_layers=4, dtype="bfloat16", seed=1)
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 1000)
    session = served.begin(result_sha256=checksum_of(draw_tensors(dtype="bfloat16")))
    stage_directory(tmp_path, session)
    session.prepare()
    session.close()


def test_what_is_skipped_is_not_read(served, tmp_path, monkeypatch):
    make_checkpoint(tmp_path, num_layers=4, dtype="bfloat16", seed=1, prefix="vl", vision=True)
    read = []
    row_blocks = FileTensor.row_blocks
    monkeypatch.setattr(FileTensor, "row_blocks", lambda tensor: read.append(tensor) or row_blocks(tensor))
    session = served.begin()
    stage_directory(tmp_path, session)
    session.prepare()
    session.close()
    assert len(read) == len(draw_tensors())


def change_after(monkeypatch, path, change):
    """Change the file when the first of its tensors has been read."""
    row_blocks, changed = FileTensor.row_blocks, []

    def blocks(tensor):
        yield from row_blocks(tensor)
        if not changed:
            changed.append(change(path))

    monkeypatch.setattr(FileTensor, "row_blocks", blocks)


def rewrite(path):
    other = path.with_name("other")
    save_file(draw_tensors(seed=2, dtype="bfloat16"), other)
    os.replace(other, path)


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(-50, os.SEEK_END)
        file.write(b"x" * 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rewrite, "was changed while it was read: write weights to a new file"),
        (overwrite, "was changed while it was read"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "was changed while it was read"),
        (lambda path: path.unlink(), "cannot be read: .*No such file"),
    ],
    ids=["replaced", "overwritten", "truncated", "deleted"],
)
def test_a_file_that_changes_meanwhile_is_told(change, message, served, tmp_path, monkeypatch):
    make_checkpoint(tmp_path, num_layers=4, dtype="bfloat16", seed=1)
    change_after(monkeypatch, tmp_path / FILE, change)
    before = served.checksum()
    with pytest.raises(WeightUpdateError, match=message):
        commit(served, tmp_path)
    assert served.checksum() == before


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999999])
def test_a_truncated_file_is_told(share, served, tmp_path):
    path = make_checkpoint(tmp_path, num_layers=4, dtype="bfloat16", seed=1) / FILE
    os.truncate(path, int(share * path.stat().st_size))
    assert f"{path} is not a complete safetensors file" in refusal(served, tmp_path)


def test_a_shard_that_is_missing_is_told(served, tmp_path):
    make_checkpoint(tmp_path, num_layers=4, dtype="bfloat16", shards=3)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    assert "missing" in refusal(served, tmp_path)


def test_a_place_without_weights_is_told(served, tmp_path):
    assert "has no *.safetensors file" in refusal(served, tmp_path)
    assert "No such file" in refusal(served, tmp_path / "nowhere")


def test_weights_of_another_model_are_told(served, tmp_path):
    other = make_checkpoint(tmp_path / "deep", num_layers=8, dtype="bfloat16")
    assert "unexpected tensor model.layers.4." in refusal(served, other)
    other = make_checkpoint(tmp_path / "wide", num_layers=4, vocab_size=500, dtype="bfloat16")
    assert "tensor model.embed_tokens.weight has shape [500, 64]" in refusal(served, other)


def test_quantized_files_are_told(served, tmp_path):
    make_checkpoint(tmp_path, num_layers=4, dtype="bfloat16")
    tensors = draw_tensors(dtype="bfloat16")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / FILE)
    assert f"tensor {name} is F8_E4M3: only BF16" in refusal(served, tmp_path)
    save_file(tensors | {f"{name}_scale_inv": torch.ones(1, 1)}, tmp_path / FILE)
    assert "belongs to quantized weights: send unquantized ones" in refusal(served, tmp_path)


def test_bytes_are_a_file_too(tmp_path):
    store, tensors = make_store(tmp_path, dtype="bfloat16"), draw_tensors(dtype="bfloat16")
    halves = [dict(list(tensors.items())[start::2]) for start in range(2)]
    session = store.begin(result_sha256=checksum_of(tensors))
    for half in halves:
        stage_bytes(save(half), session)
    session.prepare()
    session.commit()
    assert store.checksum() == checksum_of(tensors)


@pytest.mark.parametrize("length", [0, 5, 8, 100, -1])
def test_bytes_that_are_no_whole_file_are_told(length, served):
    data = save(draw_tensors(dtype="bfloat16"))[:length]
    with pytest.raises(WeightUpdateError, match=f"^{len(data)} bytes of tensors are no whole safetensors file: "):
        stage_bytes(data, served.begin())


def test_the_state_of_a_file_tells_a_new_one_of_the_same_size(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12")
    before = disk._state(path)
    (tmp_path / "y").write_bytes(b"34")
    os.utime(tmp_path / "y", ns=(before[2], before[2]))
    os.replace(tmp_path / "y", path)
    assert disk._state(path) != before
