"""Decode steps in graphs: sizes, padding, and that a replay gives what the step itself gives. Interpreted: a fake graph
repeats the captured function into the same tensors."""

import gc
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from kernels.gpu.dispatch import triton_takes
from server.backend.decode_graphs import DecodeGraphs, graph_depths, graph_sizes
from server.backend.sampler import Sampled
from server.engine import Engine
from server.errors import ConfigError
from server.messages import SamplingParams
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.engines import generate, make_engine, make_prompts

PROMPTS = make_prompts(3, 6, 256, seed=5)
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("graphs"), num_layers=4, close_draft=True)


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (16, [1, 2, 4, 8, 12, 16]),
        (40, [1, 2, 4, 8, 12, 16, 24, 32, 40]),
    ],
)
def test_sizes_grow_by_halves_up_to_the_largest_batch(most: int, sizes: list[int]) -> None:
    assert graph_sizes(most) == sizes


def test_depths_are_none_one_and_all_where_they_adapt_else_all() -> None:
    assert graph_depths(3, is_adaptive=True) == [0, 1, 3]
    assert graph_depths(1, is_adaptive=True) == [0, 1]
    assert graph_depths(0, is_adaptive=True) == graph_depths(0, is_adaptive=False) == [0]
    assert graph_depths(3, is_adaptive=False) == [3]


class FakeCapture:
    """As a CUDA graph: repeats launches on the same inputs and leaves results in the same tensors."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, function: Callable[[], Sampled]) -> tuple[Callable[[], None], Sampled]:
        assert not gc.isenabled(), "what a collection frees ends a capture"
        results = function()

        def replay() -> None:
            self.num_replays += 1
            again = function()
            for field in fields(results):
                if isinstance(part := getattr(results, field.name), torch.Tensor):
                    part.copy_(getattr(again, field.name))

        return replay, results


def put_graphs(engine: Engine, max_batch: int, depths: list[int]) -> FakeCapture:
    capture = FakeCapture()
    assert engine.runner.decode is not None
    graphs = DecodeGraphs(engine.runner.decode, max_batch, depths, capture)  # type: ignore[arg-type]
    graphs.capture()
    object.__setattr__(engine.runner, "decode", graphs)
    return capture


@pytest.mark.slow
def test_replays_with_padding_and_deeper_graphs_give_the_tokens_of_the_cpu(checkpoint: Path) -> None:
    expected = generate(make_engine(checkpoint, dtype="float32"), PROMPTS, GREEDY)
    with triton_takes("cpu"):
        engine = make_engine(checkpoint, dtype="float32", mtp_step=2, max_running_requests=4)
        row_before = [
            tensor[:, 0].clone()
            for tensor in (engine.runner.table.cache.gdn.state, *engine.runner.table.cache.gdn.ring)
        ]
        capture = put_graphs(engine, 4, [2])
        assert generate(engine, PROMPTS, GREEDY) == expected
        assert gc.isenabled() and capture.num_replays > 0 and engine.scheduler.counters.num_accepted > 0
        gdn = engine.runner.table.cache.gdn
        for before, tensor in zip(row_before, (gdn.state, *gdn.ring), strict=True):
            assert torch.equal(before, tensor[:, 0]), "padding was written"


@pytest.mark.slow
def test_batches_above_the_largest_graph_run_without_one(checkpoint: Path) -> None:
    expected = generate(make_engine(checkpoint, dtype="float32"), PROMPTS, GREEDY)
    with triton_takes("cpu"):
        engine = make_engine(checkpoint, dtype="float32", mtp_step=1, max_running_requests=4)
        capture = put_graphs(engine, 1, [1])
        assert generate(engine, PROMPTS, GREEDY) == expected
        assert capture.num_replays < engine.stats().num_steps


def test_running_out_of_memory_names_the_settings(checkpoint: Path) -> None:
    def capture(function: Callable[[], Sampled]) -> tuple[Callable[[], None], Sampled]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total of 80 GiB")

    with triton_takes("cpu"):
        step = make_engine(checkpoint, dtype="float32", mtp_step=1).runner.decode
        graphs = DecodeGraphs(step, 2, [1], capture)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"graph of 2 requests with 2 rows each, .* MiB .*: lower --c"):
            graphs.capture()
