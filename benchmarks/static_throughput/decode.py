"""Decode steps of requests that all stand at the same length: their times, what they emit, and what they must move."""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_suite.roofline import Workload, floor_bytes
from benchmarks.report import percentile, spread
from benchmarks.static_throughput.acceptance import REAL, Acceptance, ForcedAcceptance
from benchmarks.static_throughput.machine import BandwidthProbe, peak_memory, reset_peak, used_memory
from benchmarks.static_throughput.presets import Preset
from benchmarks.word_problems import draw_problem
from benchmarks.workload import draw_tokens
from server.config import lookahead
from server.llm import LLM, Generate, SamplingParams
from server.messages import TokenOutput

EOS_FREE = SamplingParams(temperature=0, ignore_eos=True)
MIB = 2**20
_WARM_UP_STEPS = 2
_PAGE_SIZE = 16


class Sample(NamedTuple):
    """One step: seconds in all and of the draft part, tokens emitted."""

    seconds: float
    draft_seconds: float
    num_tokens: int


@dataclass(frozen=True)
class Cell:
    """B requests with `context` tokens each in the cache, of which steps are timed, with at most max_draft drafts."""

    batch: int
    context: int
    max_draft: int | None = None


class SkippedPrompts:
    """In place of a target while prompts pass through the engine: computes nothing."""

    def __init__(self, target: Any):
        weight, scale = target.embed_tokens.weight, target.norm.scale  # the weight may be quantized
        self._nothing = scale.new_zeros(1, len(scale), dtype=weight.dtype)
        self.compute_logits = target.compute_logits

    def forward_jointly(self, passes: list[Any]) -> list[Tensor]:
        return [self._nothing.expand(len(forward.token_ids), -1) for forward in passes]


class DecodeBench:
    """An engine with room for `batch` requests of up to `longest` tokens, num_tokens in all. Depths are fixed, nothing
    is reused, the host's work is not hidden, if `settings` do not say otherwise.

    Prompts of random weights are not computed: their keys, values and states are random numbers, as would be what they
    stand for. With overlap a step returns the tokens of the one before it, and the draft part is timed on another
    thread: sums of many steps are right, single ones are not.
    """

    def __init__(
        self, preset: Preset, mtp_step: int, batch: int, longest: int, num_tokens: int | None = None, **settings: Any
    ):
        ahead = lookahead(mtp_step) + 4 * _PAGE_SIZE
        defaults = {
            "model": str(preset.directory),
            "mtp_step": mtp_step,
            "speculation": "fixed",
            "overlap": "off",
            "prefix_cache": "off",
            "page_size": _PAGE_SIZE,
            "max_running_requests": batch,
            "max_model_len": longest,
            "max_total_tokens": (num_tokens or batch * longest) + batch * ahead,
        }
        self.llm = LLM(**(defaults | settings))
        self.preset, self.mtp_step, self.engine = preset, mtp_step, self.llm.engine
        runner = self.engine.runner
        self.forced = ForcedAcceptance(runner.sampler)
        self._draft_seconds, self._num_started = 0.0, 0
        if runner.drafter is not None:
            runner.drafter.propose = self._timed(runner.drafter.propose)  # type: ignore[method-assign]
        if preset.is_random:
            pages = runner.table.cache.kv.data
            pages[:, :, :1].normal_()
            pages[:, :, 1:] = pages[:, :, :1]

    def start(self, cell: Cell, seed: int = 0) -> None:
        """Bring the cell's requests behind their prompts. Those of the demo are word problems."""
        self.stop()
        engine, scheduler, rng = self.engine, self.engine.scheduler, random.Random(seed)
        # One pass for all prompts: nobody decodes while others are in theirs.
        scheduler.limits = replace(scheduler.limits, chunked_prefill_size=cell.batch * cell.context)
        params = replace(EOS_FREE, max_draft=cell.max_draft)
        for _ in range(cell.batch):
            self._num_started += 1
            engine.add(Generate(str(self._num_started), self._draw_prompt(rng, cell.context), params))
        runner = engine.runner
        if self.preset.is_random:
            target: Any = SkippedPrompts(runner.target)
            engine.runner = replace(runner, target=target, drafter=None)
        while scheduler.waiting or not all(request.is_decoding for request in scheduler.running):
            engine.step()
        engine.drain()
        engine.runner = runner
        for row in [request.row for request in scheduler.running] if self.preset.is_random else []:
            runner.table.cache.gdn.state[:, row].normal_(std=0.1)

    def stop(self) -> None:
        """Drop all requests."""
        for request in list(self.engine.scheduler.running):
            self.engine.abort(request.id)
        while self.engine.has_work():
            self.engine.step()

    def measure(self, num_steps: int, lens: Sequence[Tensor] | None = None) -> list[Sample]:
        """Samples of that many steps; with `lens` they accept so many tokens."""
        if lens is not None and self.engine.runner.decode is not None:
            raise SystemExit("acceptance is forced on a CPU only: see benchmarks.gpu_suite for a GPU's decode steps")
        self.forced.force(lens)
        samples = []
        for _ in range(num_steps):
            self._draft_seconds, start = 0.0, time.perf_counter()
            outputs = self.engine.step()
            seconds = time.perf_counter() - start
            num_tokens = sum(len(output.token_ids) for output in outputs if isinstance(output, TokenOutput))
            samples.append(Sample(seconds, self._draft_seconds, num_tokens))
        assert lens is None or self.forced.num_steps >= num_steps - 1, "steps pass by what forces their acceptance"
        return samples

    def measure_at(self, cell: Cell, num_steps: int, number: int = 0, acceptance: Acceptance = REAL) -> list[Sample]:
        """The same of new requests, after a few steps to warm up; other ones with another `number`."""
        lens = acceptance.draw(num_steps, cell.batch, self.mtp_step, number * num_steps)
        self.start(cell, number)
        self.measure(_WARM_UP_STEPS)
        return self.measure(num_steps, lens)

    def speed(self, cell: Cell, num_steps: int, number: int) -> float:
        """Tokens per second over that many steps."""
        samples = self.measure_at(cell, num_steps, number)
        return sum(sample.num_tokens for sample in samples) / sum(sample.seconds for sample in samples)

    def count_bytes(self, cell: Cell, accept_len: float) -> float:
        """What a step must move: weights once, keys and values, states read and written, logits, and what drafts
        take."""
        runner = self.engine.runner
        work = Workload(
            batch=cell.batch,
            mtp_step=self.mtp_step,
            context=cell.context,
            accept_len=accept_len,
            element=runner.table.cache.kv.data.element_size(),
            weight_element=runner.plan.sizes.weights / self.preset.num_weights,
            draft_vocab=0 if runner.draft is None else runner.draft.vocabulary.num_first,
        )
        return floor_bytes(self.preset.dimensions, work)

    def _draw_prompt(self, rng: random.Random, context: int) -> list[int]:
        if self.preset.is_random:
            return draw_tokens(rng, context, self.engine.ready.vocab_size)
        token_ids: list[int] = []
        while len(token_ids) < context:
            token_ids = self.llm.tokenizer.encode(draw_problem(rng) + "\n" * bool(token_ids)) + token_ids
        return token_ids[-context:]

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            self._draft_seconds += time.perf_counter() - start
            return result

        return timed


def room_of(num_steps: int, mtp_step: int) -> int:
    """Tokens that a request may emit in `measure_at`."""
    return (num_steps + _WARM_UP_STEPS + 2) * (mtp_step + 1)


@dataclass
class Contestant:
    """A way of decoding, what its rounds gave, and the most bytes that its engine took."""

    bench: DecodeBench
    acceptance: Acceptance
    peak_bytes: int
    rounds: list[list[Sample]] = field(default_factory=list)


def measure_cell(
    preset: Preset,
    cell: Cell,
    mtp_steps: Sequence[int],
    acceptances: Sequence[Acceptance],
    probe: BandwidthProbe,
    num_steps: int,
    num_rounds: int,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """A row for every mtp_step and acceptance, in interleaved rounds after one to warm up; ratios are against the
    first row."""
    contestants = []
    for k in mtp_steps:
        bench, peak = _make_bench(preset, k, cell, num_steps, settings)
        contestants += [Contestant(bench, acceptance, peak) for acceptance in (acceptances if k else acceptances[:1])]
    for number in range(num_rounds + 1):
        first = number % len(contestants)
        for one in contestants[first:] + contestants[:first]:
            samples = one.bench.measure_at(cell, num_steps, number, one.acceptance)
            one.rounds += [samples] if number else []
        probe.read()
    return [_describe(one, contestants[0], cell, probe) for one in contestants]


def _make_bench(
    preset: Preset, mtp_step: int, cell: Cell, num_steps: int, settings: dict[str, Any]
) -> tuple[DecodeBench, int]:
    """With the most bytes that it takes while it serves, beyond what the process had before."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = used_memory(device)
    bench = DecodeBench(preset, mtp_step, cell.batch, cell.context + room_of(num_steps, mtp_step), **settings)
    reset_peak(device)
    bench.measure_at(cell, _WARM_UP_STEPS)
    return bench, peak_memory(device) - before


def _speed(samples: Sequence[Sample]) -> float:
    return sum(sample.num_tokens for sample in samples) / sum(sample.seconds for sample in samples)


def _verify_ms(samples: Sequence[Sample]) -> float:
    return 1e3 * statistics.median(sample.seconds - sample.draft_seconds for sample in samples)


def _describe(one: Contestant, base: Contestant, cell: Cell, probe: BandwidthProbe) -> dict[str, Any]:
    bench, samples, pairs = one.bench, [*chain.from_iterable(one.rounds)], [*zip(one.rounds, base.rounds, strict=True)]
    seconds, speed = [sample.seconds for sample in samples], _speed(samples)
    accept_len = sum(sample.num_tokens for sample in samples) / len(samples) / cell.batch
    num_bytes, step = bench.count_bytes(cell, accept_len), statistics.median(seconds)
    gdn = bench.engine.runner.table.cache.gdn
    return {
        "batch": cell.batch,
        "context": cell.context,
        "mtp_step": bench.mtp_step,
        "acceptance": one.acceptance.name if bench.mtp_step else "-",
        "step_ms": 1e3 * step,
        "step_ms_p10": 1e3 * percentile(seconds, 10),
        "step_ms_p90": 1e3 * percentile(seconds, 90),
        "tok_s": speed,
        **spread("gain", (_speed(mine) / _speed(plain) for mine, plain in pairs)),
        "itl_ms": 1e3 * cell.batch / speed,
        "accept_len": accept_len,
        "mib_per_step": num_bytes / MIB,
        "bandwidth_share": num_bytes / step / probe.bytes_per_second,
        "peak_mib": one.peak_bytes / MIB,
        "verify_ms": _verify_ms(samples),
        **spread("verify_ratio", (_verify_ms(mine) / _verify_ms(plain) for mine, plain in pairs)),
        "draft_ms": 1e3 * statistics.median(sample.draft_seconds for sample in samples),
        "gdn_state_bytes_per_request": gdn.state_bytes_per_row,
        "ring_bytes_per_request": gdn.ring_bytes_per_row,
    }


def pick(rows: Iterable[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The rows with these columns alone."""
    return [{name: row[name] for name in names} for row in rows]
