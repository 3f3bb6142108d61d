"""Decode steps of requests that all stand at the same length, with dummy weights and forced acceptance: no prompts, no
host. Reaches through `LLM` to the engine's runner."""

import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_suite.card import FAILURES, capture_graph, time_rounds
from benchmarks.gpu_suite.forced_acceptance import forced_acceptance, make_trace
from benchmarks.random_checkpoint import make_config
from server.config import lookahead
from server.llm import LLM, TandemError

PAGE_SIZE, ROUNDS, ACCEPTANCE = 16, 20, 0.85
_FAR = 2**40  # no request ends


@dataclass(frozen=True)
class Measured:
    """Median seconds of a step, tokens that a request emits in one, and bytes of the captured graph."""

    seconds: float
    tokens_per_step: float
    graph_bytes: int


class Captured(NamedTuple):
    """What runs a step, the bytes that its graph keeps, and the number of steps so far, on the device."""

    replay: Callable[[], None]
    graph_bytes: int
    num_steps: Tensor


class StaticDecode:
    """An engine's decode step for up to as many requests as it has rows, each with up to `context` tokens."""

    def __init__(self, llm: LLM, context: int):
        self.runner, self.context = llm.engine.runner, context
        decode: Any = self.runner.decode
        self.step = getattr(decode, "step", decode)  # of the graphs, or what runs without
        assert self.step is not None, "there are no whole decode steps without Triton's kernels"
        self.table = self.runner.table
        self._randomise()

    @property
    def draft_vocab(self) -> int:
        """Tokens that draft passes score."""
        draft = self.step.draft
        return 0 if draft is None else draft.vocabulary.num_first

    def _randomise(self) -> None:
        """A cache of zeros would need less power than a real one."""
        cache = self.table.cache
        cache.kv.data.normal_()
        cache.gdn.state.normal_(std=0.1)

    def place(self, batch: int, context: int) -> None:
        """Rows 1..B in mid-request, each on pages of its own."""
        table, rows = self.table, slice(1, batch + 1)
        per_request = table.page_table.shape[1]
        pages = 1 + torch.arange(batch * per_request, device=table.device)
        assert len(pages) < table.cache.kv.data.shape[2], "too few pages for so many requests"
        table.page_table[rows] = pages.view(batch, per_request)
        table.seq_len[rows], table.accept_len[rows] = context, 1
        table.next_ids[rows] = torch.randint(1, table.vocab_size, table.next_ids[rows].shape, device=table.device)
        table.stop_ids[rows], table.longest_len[rows] = -1, _FAR

    def measure(self, batch: int, mtp_step: int, context: int | None = None) -> Measured:
        """Median of ROUNDS steps at `context`, or the longest."""
        context = context or self.context
        with self.captured(batch, mtp_step, context) as captured:
            seconds = statistics.median(time_rounds(captured.replay, ROUNDS))
            emitted = (self.table.seq_len[1 : batch + 1] - context).sum().item()
            num_steps = captured.num_steps.item()
        assert num_steps == ROUNDS + 2, f"{num_steps} steps have run, {ROUNDS + 2} were launched"
        return Measured(seconds, emitted / num_steps / batch, captured.graph_bytes)

    @contextmanager
    def captured(self, batch: int, mtp_step: int, context: int) -> Iterator[Captured]:
        """The step as a graph, with the requests placed. mtp_step 0 leaves the draft head out."""
        device = self.table.device
        step = self.step if mtp_step else type(self.step)(self.step.target, None, self.table, 0)
        rows = torch.arange(1, batch + 1, device=device)
        widths = torch.full_like(rows, mtp_step + 1)
        trace = make_trace(64, batch, mtp_step, ACCEPTANCE, device)
        module = sys.modules[type(step).__module__]
        with torch.inference_mode(), forced_acceptance(module, trace) as count:
            self.place(batch, context)
            replay, _, graph_bytes = capture_graph(lambda: step(rows, widths, mtp_step + 1, mtp_step))
            self.place(batch, context)
            count.zero_()
            yield Captured(replay, graph_bytes, count)


def room_of(mtp_step: int) -> int:
    """Tokens that `measure` may emit: two runs for the capture do not count, two warm up."""
    return (ROUNDS + 4) * (mtp_step + 1)


def load(directory: Path, batch: int, mtp_step: int, context: int, **settings: Any) -> LLM:
    """An engine with dummy weights and room for `batch` requests. Raises what `LLM` does."""
    longest = context + room_of(mtp_step)
    pages = -(-(longest + lookahead(mtp_step)) // PAGE_SIZE)
    settings = {
        "device": "cuda",
        "load_format": "dummy",
        "speculation": "fixed",
        "prefix_cache": "off",
        "mtp_step": mtp_step,
        "page_size": PAGE_SIZE,
        "max_running_requests": batch,
        "max_model_len": longest,
        "max_total_tokens": batch * pages * PAGE_SIZE,
        "chunked_prefill_size": 2048,
        "mem_fraction_static": 0.97,
        "cuda_graph_max_bs": 1,  # the suite captures the sizes that it wants
        **settings,
    }
    return LLM(model=str(directory), **settings)


def load_largest(
    directory: Path, batches: Sequence[int], mtp_step: int, context: int, **settings: Any
) -> tuple[LLM, int]:
    """The engine with the largest of the batch sizes that fits. Raises MemoryError if none does."""
    reasons = []
    for batch in sorted(batches, reverse=True):
        try:
            return load(directory, batch, mtp_step, context, **settings), batch
        except (TandemError, *FAILURES) as failure:
            reasons.append(f"batch {batch}: {failure}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise MemoryError("; ".join(reasons))


@contextmanager
def config_directory(preset: str) -> Iterator[Path]:
    """A directory with the preset's config.json, which is all that dummy weights need."""
    with TemporaryDirectory(prefix="tandem-") as name:
        (Path(name) / "config.json").write_text(json.dumps(make_config(preset)))
        yield Path(name)
