"""Decode steps as CUDA graphs: one launch per step, in which the host has no part but naming rows.

There is a graph for every batch size of `graph_sizes` and every number of rows and drafts of `graph_depths`; a batch
takes the next larger one, filled up with padding (row 0). Graphs read weights, caches and the request table where they
lie: what is updated in place they see, what moves elsewhere they do not.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from models.forward_batch import to_device
from server.backend.decode_step import DecodeStep
from server.backend.device import MIB, within_memory
from server.backend.sampler import Sampled
from server.request import Batch

logger = logging.getLogger(__name__)

# Runs a function once and gives what repeats it, and the tensors in which every repetition leaves its results.
Capture = Callable[[Callable[[], Sampled]], tuple[Callable[[], None], Sampled]]


class DecodeGraphs:
    """Up to `max_batch` requests decode in graphs, more of them eagerly. `depths`: see `graph_depths`."""

    def __init__(self, step: DecodeStep, max_batch: int, depths: Sequence[int], capture: Capture | None = None):
        self.step, self.sizes, self.depths = step, graph_sizes(max_batch), sorted(depths)
        device = step.table.device
        self._rows = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self._widths = torch.ones(max_batch, dtype=torch.int64, device=device)
        self._graphs: dict[tuple[int, int, int], tuple[Callable[[], None], Sampled]] = {}
        self._given_capture = capture
        self.num_bytes = 0

    def capture(self) -> None:
        """Make all graphs, the largest first, whose memory the others share. Raises ConfigError when it runs out."""
        start, keys, capture = time.perf_counter(), self._keys(), self._given_capture or CudaCapture()
        with _without_collection():
            for size, num_tokens, num_drafts in tqdm(keys, desc="Capturing decode steps", unit="graph"):
                rows, widths = self._rows[:size], self._widths[:size]
                part = f"the decode graph of {size} requests with {num_tokens} rows each"
                logits_bytes = size * num_tokens * self.step.table.vocab_size * self.step.target.lm_head.weight.itemsize
                with within_memory(part, logits_bytes, "lower --cuda-graph-max-bs or --mem-fraction-static"):
                    step = partial(self.step, rows, widths, num_tokens, num_drafts)
                    self._graphs[size, num_tokens, num_drafts] = capture(step)
            self._compile_other_widths()
        self.num_bytes = getattr(capture, "num_bytes", 0)
        seconds = time.perf_counter() - start
        logger.info("captured %d decode graphs in %.1f s, %.1f MiB", len(keys), seconds, self.num_bytes / MIB)

    def _compile_other_widths(self) -> None:
        """Where tokens are masked steps run without a graph, on as many rows as they have."""
        for width in range(1, max(self.depths) + 2):
            if width - 1 not in self.depths:
                self.step(self._rows[:1], self._widths[:1], width, 0)

    def release(self) -> int:
        """Forget all graphs, which know where weights and caches lie, and give back what a step keeps."""
        num_bytes, self.num_bytes = self.num_bytes, 0
        self._graphs.clear()
        return num_bytes + self.step.release()

    def restore(self) -> int:
        """Make them again. Raises ConfigError when memory runs out; `restore` may then be called again."""
        num_bytes = self.step.restore()
        self.capture()
        return num_bytes + self.num_bytes

    def _keys(self) -> list[tuple[int, int, int]]:
        return [
            (size, rows_behind + 1, num_drafts)
            for size in reversed(self.sizes)
            for rows_behind in reversed(self.depths)
            for num_drafts in reversed(self.depths)
        ]

    def run(self, batch: Batch) -> Sampled:
        """One decode step of the batch's requests, in the smallest graph that holds it."""
        rows, widths, num_tokens, num_drafts = batch.decode_shape
        size = next((size for size in self.sizes if size >= len(rows)), None)
        if size is None:
            return self.step.run(batch)
        num_tokens = next(depth for depth in self.depths if depth >= num_tokens - 1) + 1
        num_drafts = next(depth for depth in self.depths if depth >= num_drafts)
        padding = size - len(rows)
        plan = to_device([[*rows, *[0] * padding], [*widths, *[1] * padding]], self._rows.device)
        self._rows[:size], self._widths[:size] = plan
        replay, sampled = self._graphs[size, num_tokens, num_drafts]
        replay()
        return _first(sampled, len(rows), num_tokens)


def graph_sizes(max_batch: int) -> list[int]:
    """Batch sizes up to max_batch: powers of two, from 8 on with one between every two."""
    sizes, power = {max_batch}, 1
    while power < max_batch:
        sizes |= {power, power * 3 // 2} if power >= 8 else {power}
        power *= 2
    return sorted(size for size in sizes if size <= max_batch)


def graph_depths(mtp_step: int, is_adaptive: bool) -> list[int]:
    """Drafts per request that have graphs of their own, others take the next larger ones: none, one and all; always all
    where they do not adapt."""
    return sorted({0, min(1, mtp_step), mtp_step}) if is_adaptive else [mtp_step]


class CudaCapture:
    """Captures functions as CUDA graphs with one pool of memory; `num_bytes` is what it has grown to."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._pool: Any = None
        # Of its own: what libraries keep per stream is captured too, and must not be shared with other graphs.
        self._stream = torch.cuda.Stream()

    def __call__(self, function: Callable[[], Sampled]) -> tuple[Callable[[], None], Sampled]:
        function()  # compiles kernels and allocates what libraries keep
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
        # Other threads may copy weights meanwhile, which is no part of the capture and must not end it.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = function()
        self._pool = self._pool or graph.pool()
        self.num_bytes += torch.cuda.memory_reserved() - before
        return graph.replay, results


@contextmanager
def _without_collection() -> Iterator[None]:
    """Garbage may hold memory of the device, and freeing that while a graph is captured ends the capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _first(sampled: Sampled, count: int, num_tokens: int) -> Sampled:
    """The results of the first requests."""
    by_request = {
        name: getattr(sampled, name)[:count] for name in ("token_ids", "accept_lens", "match_lens", "is_finite")
    }
    rows = {name: getattr(sampled, name)[: count * num_tokens] for name in ("next_ids", "logits")}
    return replace(sampled, **by_request, **rows, widths=[num_tokens] * count)
