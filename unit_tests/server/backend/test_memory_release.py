"""Memory goes back to the machine and comes again, and the engine says what it said before."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import UntypedStorage

from kernels.cpu.library import load_library
from kernels.gpu.dispatch import triton_takes
from models.layers import cpu_decoder
from models.weights import load_weights
from server.backend.device import MIB
from server.backend.memory_release import CUDA_GRAPH, KV_CACHE, WEIGHTS, FileCopy, PinnedCopy, release, restore
from server.backend.runner import Runner, build_runner
from server.config import EngineConfig
from server.engine import Engine
from server.errors import ConfigError, Conflict
from server.messages import SamplingParams
from unit_tests.checkpoints import make_checkpoint, make_config, make_tensors
from unit_tests.models.sessions import update
from unit_tests.server.backend.test_decode_graphs import put_graphs
from unit_tests.server.engines import generate, make_engine, make_prompts

ALL = (WEIGHTS, KV_CACHE, CUDA_GRAPH)
PROMPTS = make_prompts(6, 40, 256, seed=3)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PENALISED = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("release"), num_layers=4, close_draft=True)


def weight_bytes(runner: Runner) -> int:
    """Bytes of all weights as they lie in memory now."""
    models = [model for model in (runner.target, runner.draft) if model is not None]
    storages = [weight.untyped_storage() for model in models for weight in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def cache_bytes(runner: Runner) -> int:
    cache, checkpoints = runner.table.cache, runner.mover.checkpoints
    tensors = [cache.kv.data, cache.gdn.state, *cache.gdn.ring, cache.gdn.conv_ring]
    tensors += [checkpoints.state, checkpoints.conv_window]
    tensors += [] if cache.history is None else [cache.history.hidden, cache.history.token_ids]
    counts = (runner.table.output_counts, runner.table.in_prompt)
    return sum(tensor.untyped_storage().nbytes() for tensor in (*tensors, *counts) if tensor is not None)


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def elsewhere() -> Iterator[None]:
    """What is allocated inside lies in other memory than what was freed before, which is taken."""
    taken = [torch.full((size,), torch.nan) for size in (16, 64, 256, 1024, 4096, 16384, 65536) for _ in range(64)]
    yield
    assert all(tensor.isnan().all() for tensor in taken), "somebody wrote into memory that is not theirs"


@contextmanager
def torch_only() -> Iterator[None]:
    """Without the C++ decoder."""
    original = cpu_decoder.serves
    cpu_decoder.serves = lambda weight: False
    try:
        yield
    finally:
        cpu_decoder.serves = original


def assert_comes_back(engine: Engine, params: SamplingParams = GREEDY) -> None:
    """Whatever is released and in whatever order it is restored, the engine's greedy outputs stay."""
    runner, expected = engine.runner, generate(engine, PROMPTS, params)
    for released, orders in (
        (ALL, [ALL]),
        ((KV_CACHE,), [(KV_CACHE,)]),
        ((WEIGHTS,), [(WEIGHTS,)]),
        (ALL, [(KV_CACHE,), (CUDA_GRAPH, WEIGHTS)]),
    ):
        in_use = {WEIGHTS: weight_bytes(runner), KV_CACHE: cache_bytes(runner), CUDA_GRAPH: 0}
        num_bytes = sum(in_use[tag] for tag in released)
        assert release(runner, released) >= num_bytes
        assert (weight_bytes(runner) == 0, cache_bytes(runner) == 0) == (WEIGHTS in released, KV_CACHE in released)
        assert runner.released.tags == set(released) and not runner.released.can_run
        with elsewhere():
            assert sum(restore(runner, tags) for tags in orders) >= num_bytes
            assert runner.released.can_run and not runner.released.sizes and runner.released.saved is None
            assert {WEIGHTS: weight_bytes(runner), KV_CACHE: cache_bytes(runner), CUDA_GRAPH: 0} == in_use
            assert generate(engine, PROMPTS, params) == expected


@pytest.mark.parametrize("mtp_step", [0, 3])
@pytest.mark.parametrize("has_decoder", [True, False])
def test_outputs_are_the_same_before_and_after(checkpoint: Path, mtp_step: int, has_decoder: bool) -> None:
    engine = make_engine(checkpoint, mtp_step=mtp_step)
    if has_decoder:
        assert_comes_back(engine)
    else:
        with torch_only():
            assert_comes_back(engine)


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"draft_vocab_size": 200},
        {"dtype": "bfloat16", "speculation": "adaptive"},
    ],
)
@pytest.mark.parametrize("tied", ["outer", "no"])
def test_every_kind_of_weights_comes_back(tmp_path: Path, settings: dict[str, Any], tied: str) -> None:
    directory = make_checkpoint(tmp_path, num_layers=4, tied=tied, moe=tied == "no", close_draft=True)
    assert_comes_back(make_engine(directory, mtp_step=2, **settings))


def test_counts_of_penalties_start_anew(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, mtp_step=2)
    assert_comes_back(engine, PENALISED)
    assert engine.runner.table.output_counts is not None


def test_a_prefix_cache_that_was_flushed_fills_again(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, mtp_step=2, prefix_cache="on", page_size=4, checkpoint_interval=4)
    expected = generate(engine, PROMPTS, GREEDY)
    engine.scheduler.cache.flush([])
    release(engine.runner, ALL)
    restore(engine.runner, ALL)
    assert generate(engine, PROMPTS, GREEDY) == expected
    assert generate(engine, PROMPTS, GREEDY) == expected


@pytest.mark.parametrize(
    ("vocab_size", "num_layers"), [(200_000, 4), (320, 80)], ids=["a large one", "many small ones"]
)
def test_the_machine_has_the_memory_meanwhile(tmp_path: Path, vocab_size: int, num_layers: int) -> None:
    make_checkpoint(tmp_path, num_layers=num_layers, vocab_size=vocab_size)
    settings: dict[str, Any] = {"load_format": "dummy", "mtp_step": 1, "num_threads": 1, "max_model_len": 128}
    runner = build_runner(EngineConfig(model=str(tmp_path), **settings))
    weights, caches = weight_bytes(runner), cache_bytes(runner)
    assert min(weights, caches) > 4 * MIB and weights + caches > 32 * MIB
    for tag, num_bytes in ((WEIGHTS, weights), (KV_CACHE, caches)):
        held = resident_bytes()
        assert release(runner, [tag]) == num_bytes
        assert held - resident_bytes() > 0.9 * num_bytes
    held = resident_bytes()
    assert restore(runner, [WEIGHTS, KV_CACHE]) == weights + caches
    assert resident_bytes() - held > 0.9 * (weights + caches)


@pytest.mark.skipif(load_library() is None, reason="this machine has no C++ compiler")
def test_decoders_do_not_go_by_the_few_weights_whose_places_they_compare(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, mtp_step=2)
    runner, expected = engine.runner, generate(engine, PROMPTS, GREEDY)
    release(runner, [WEIGHTS])
    with elsewhere():
        restore(runner, [WEIGHTS])
        assert runner.draft is not None
        for decoder in (runner.target._cpu_decoder, *runner.draft._cpu_decoders):  # as if these alone were back there
            decoder._addresses = (decoder._norm.scale.data_ptr(), runner.target.embed_tokens.weight.data_ptr())  # type: ignore[operator]
        assert generate(engine, PROMPTS, GREEDY) == expected


@pytest.mark.parametrize("is_session", [True, False])
def test_discarded_weights_are_zero_until_an_update_brings_them_all(checkpoint: Path, is_session: bool) -> None:
    engine = make_engine(checkpoint, mtp_step=3)
    runner, expected = engine.runner, generate(engine, PROMPTS, GREEDY)
    store, checksums = runner.store, runner.store.checksums()
    release(runner, ALL, discards_weights=True)
    assert runner.released.saved is None and runner.released.are_discarded
    with pytest.raises(Conflict, match=r"memory is released, .* resume it first"):
        runner.released.check_update(is_whole=True)
    with elsewhere():
        restore(runner, ALL)
        assert not any(weight.any() for weight in runner.target.parameters())
        assert not runner.released.tags and not runner.released.can_run
        release(runner, [WEIGHTS])
        assert runner.released.saved is None, "there is nothing to keep"
        restore(runner, [WEIGHTS])
        with pytest.raises(Conflict, match="were discarded, the draft head's too: an update must bring all of them"):
            runner.released.check_update(is_whole=False)
        runner.released.check_update(is_whole=True)
        if is_session:
            update(store, load_file(checkpoint / "model.safetensors"))
        else:
            load_weights(checkpoint, runner.target, runner.draft, show_progress=False)
        runner.released.note_loaded()
        assert runner.released.can_run and store.checksums() == checksums
        runner.released.check_update(is_whole=False)
        assert generate(engine, PROMPTS, GREEDY) == expected


def test_an_update_between_two_releases_is_what_is_kept(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, mtp_step=3)
    runner, before = engine.runner, generate(engine, PROMPTS, GREEDY)
    store = runner.store
    release(runner, ALL)
    restore(runner, [WEIGHTS])  # weights change while caches are away: the order of trainers
    update(store, make_tensors(make_config(num_layers=4), seed=1))
    expected = store.checksums()
    restore(runner, [KV_CACHE, CUDA_GRAPH])
    after = generate(engine, PROMPTS, GREEDY)
    release(runner, ALL)
    restore(runner, ALL)
    assert store.checksums() == expected
    assert generate(engine, PROMPTS, GREEDY) == after != before


def test_what_is_released_is_not_released_again_and_what_is_not_is_not_restored(checkpoint: Path) -> None:
    runner = make_engine(checkpoint).runner
    assert restore(runner, ALL) == 0
    release(runner, [KV_CACHE])
    weights = weight_bytes(runner)
    with pytest.raises(Conflict, match="memory of kv_cache is released already: resume it first"):
        release(runner, ALL)
    assert weight_bytes(runner) == weights, "a refused command changes nothing"
    assert restore(runner, [WEIGHTS, CUDA_GRAPH]) == 0
    assert runner.released.tags == {KV_CACHE} and cache_bytes(runner) == 0
    num_bytes = restore(runner, [KV_CACHE, WEIGHTS])
    assert runner.released.can_run and num_bytes == cache_bytes(runner)


def test_a_full_disk_leaves_the_weights_where_they_are(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(checkpoint, mtp_step=1)
    expected, weights = generate(engine, PROMPTS, GREEDY), weight_bytes(engine.runner)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", partial(Path("/dev/full").open, "w+b"))
        with pytest.raises(ConfigError, match=r"MiB cannot be kept in a file in .* \(No space left on device\): set"):
            release(engine.runner, ALL)
    assert weight_bytes(engine.runner) == weights and engine.runner.released.can_run
    assert generate(engine, PROMPTS, GREEDY) == expected


def test_memory_that_ran_out_can_be_asked_for_again(checkpoint: Path) -> None:
    engine = make_engine(checkpoint)
    runner, expected = engine.runner, generate(engine, PROMPTS, GREEDY)
    release(runner, ALL)
    sizes = runner.released.sizes[KV_CACHE]
    runner.released.sizes[KV_CACHE] = [*sizes, (torch.zeros(1).untyped_storage(), 2**60)]
    with pytest.raises(ConfigError, match=r"out of memory for kv_cache, which takes .* and resume again"):
        restore(runner, ALL)
    assert runner.released.tags == {KV_CACHE, CUDA_GRAPH} and cache_bytes(runner) == 0
    runner.released.sizes[KV_CACHE] = sizes
    restore(runner, ALL)
    assert runner.released.can_run and generate(engine, PROMPTS, GREEDY) == expected


@pytest.mark.slow
def test_decode_graphs_are_made_anew_once_everything_is_there(checkpoint: Path) -> None:
    prompts, params = make_prompts(1, 3, 256, seed=5)[:1], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with triton_takes("cpu"):
        engine = make_engine(checkpoint, dtype="float32", mtp_step=1, max_running_requests=1)
        capture = put_graphs(engine, 1, [1])
        runner, graphs = engine.runner, engine.runner.decode
        expected = generate(engine, prompts, params)
        num_replays = capture.num_replays
        assert release(runner, [WEIGHTS, KV_CACHE]) > weight_bytes(runner) + cache_bytes(runner)
        assert not graphs._graphs and graphs.step._logits.untyped_storage().nbytes() == 0  # type: ignore[union-attr]
        scratch = runner.table.cache.scratch
        assert scratch is not None and scratch.acc.untyped_storage().nbytes() == 0
        with elsewhere():
            restore(runner, [WEIGHTS])
            assert not graphs._graphs  # type: ignore[union-attr]
            restore(runner, [KV_CACHE])
            assert len(graphs._graphs) == 1  # type: ignore[union-attr]
            again = generate(engine, prompts, params)
        assert again == expected and capture.num_replays > num_replays


def test_graphs_that_do_not_fit_are_what_is_left_to_restore(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with triton_takes("cpu"):
        runner = make_engine(checkpoint, dtype="float32", mtp_step=1).runner
        release(runner, [KV_CACHE])

        def fail() -> int:
            raise ConfigError("out of GPU memory")

        with monkeypatch.context() as patch:
            patch.setattr(runner.decode, "restore", fail)
            with pytest.raises(ConfigError):
                restore(runner, [KV_CACHE])
        assert runner.released.tags == {CUDA_GRAPH} and not runner.released.can_run
        restore(runner, [KV_CACHE, CUDA_GRAPH])  # the same again, of which a part is there
        assert runner.released.can_run


def storages_of(*sizes: int, device: str = "cpu") -> list[UntypedStorage]:
    return [torch.arange(size, dtype=torch.uint8, device=device).untyped_storage() for size in sizes]


@pytest.mark.parametrize(
    ("kind", "device"), [(FileCopy, "cpu"), pytest.param(PinnedCopy, "cuda", marks=pytest.mark.gpu)]
)
def test_a_copy_gives_back_every_byte(kind: type[FileCopy | PinnedCopy], device: str) -> None:
    storages = storages_of(1, 200, 77, device=device)
    copy = kind(storages)
    for storage in storages:
        torch.empty(0, dtype=torch.uint8, device=device).set_(storage).zero_()
    copy.load(storages)
    for storage, expected in zip(storages, storages_of(1, 200, 77), strict=True):
        assert storage.tolist() == expected.tolist()


@pytest.mark.gpu
def test_a_gpu_has_its_memory_meanwhile_and_the_same_outputs_after(checkpoint: Path) -> None:
    # Large enough for what the allocator keeps, small tensors that share a block with what stays, not to count.
    engine = make_engine(checkpoint, device="cuda", dtype="bfloat16", mtp_step=2, max_total_tokens=2**19)
    before, _ = torch.cuda.mem_get_info()
    expected = generate(engine, PROMPTS, GREEDY)
    num_bytes = release(engine.runner, ALL)
    assert torch.cuda.mem_get_info()[0] - before > 0.9 * num_bytes
    restore(engine.runner, ALL)
    assert generate(engine, PROMPTS, GREEDY) == expected
