"""How long whole decode steps take at real dimensions, against the roofline floor, the host and transformers."""

import itertools
import random
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_suite.bytes import step_bytes
from benchmarks.gpu_suite.card import FAILURES, CardSpeed
from benchmarks.gpu_suite.dimensions import Dimensions, dimensions_of
from benchmarks.gpu_suite.log import Log
from benchmarks.gpu_suite.prefill import SHAPES, measure_prefill
from benchmarks.gpu_suite.roofline import Card, Workload, floor_seconds
from benchmarks.gpu_suite.static_decode import ACCEPTANCE, Measured, StaticDecode, config_directory, load_largest
from benchmarks.random_checkpoint import make_config
from benchmarks.workload import draw_tokens
from server.llm import LLM, Generate, SamplingParams

MODELS = ("0.8B", "4B", "9B", "27B", "35B-A3B")
BATCHES, MTP_STEPS, CONTEXT = (1, 8, 32, 128, 256), (0, 1, 3), 2048
PEER_MODEL, PEER_BATCHES = "0.8B", (1, 32)
_LOOP_BATCH, _LOOP_STEPS, _PROMPT_LEN = 32, 40, 64
_PEER_TOKENS = 16
_ROW_SECONDS = 6.0  # about what one more measurement takes, capture included
MIB, GIB = 2**20, 2**30


def run_decode(
    preset: str,
    card: CardSpeed,
    log: Log,
    batches: Sequence[int] = BATCHES,
    context: int = CONTEXT,
    **settings: Any,
) -> None:
    """Rows of every batch size and mtp_step, then of a real engine loop, then of transformers for one small model."""
    with config_directory(preset) as directory:
        start = time.perf_counter()
        try:
            llm, largest = load_largest(directory, batches, max(MTP_STEPS), context, **settings)
        except MemoryError as failure:
            log.add("skipped", what=f"decode {preset}", why=str(failure)[:300])
            return
        log.add("decode start", model=preset, largest_batch=largest, seconds=time.perf_counter() - start)
        if largest < max(batches):
            log.add("skipped", what=f"decode {preset} above batch {largest}", why="does not fit the memory")
        bench = StaticDecode(llm, context)
        _measure_batches(preset, bench, [batch for batch in batches if batch <= largest], card, log)
        if log.is_over(2 * _ROW_SECONDS):
            log.skip(f"engine loop of {preset}")
            return
        log.add("engine loop", **measure_loop(llm, preset, min(_LOOP_BATCH, largest)))
        for batch, num_tokens in SHAPES:
            if batch <= largest and num_tokens <= context and not log.is_over(_ROW_SECONDS):
                row = measure_prefill(llm, preset, batch, num_tokens, card, partial(_synchronize, llm.config.device))
                log.add("prefill", **row)
        if preset == PEER_MODEL:
            compare_transformers(preset, llm, bench, card, log)


def _measure_batches(preset: str, bench: StaticDecode, batches: Sequence[int], card: CardSpeed, log: Log) -> None:
    """The most telling ones first, in case that time runs out."""
    sizes = dimensions_of(preset)
    for batch in sorted(batches, key=lambda batch: (batch not in (32, 128, 1), batch)):
        plain: Measured | None = None
        for mtp_step in MTP_STEPS:
            if log.is_over(_ROW_SECONDS):
                log.skip(f"decode {preset} batch {batch} mtp {mtp_step}")
                continue
            _reset_peak()
            try:
                measured = bench.measure(batch, mtp_step)
            except torch.cuda.OutOfMemoryError:
                log.add(
                    "skipped", what=f"decode {preset} batch {batch} mtp {mtp_step}", why="out of memory in its graph"
                )
                continue
            plain = measured if mtp_step == 0 else plain
            work = Workload(batch, mtp_step, bench.context, ACCEPTANCE, draft_vocab=bench.draft_vocab)
            row = {"model": preset, "batch": batch, "mtp": mtp_step, **describe(measured, sizes, work, card)}
            row["gain"] = plain and row["tok_s"] * plain.seconds / batch
            log.add("decode", **row, **_memory(measured))


def describe(measured: Measured, sizes: Dimensions, work: Workload, card: CardSpeed) -> dict[str, Any]:
    """Speed of a step, and what share of it the floor and the bytes of its kernels explain on this card. Tokens per
    second are those of the acceptance asked for: the trace of a few steps of few requests has another."""
    floor = floor_seconds(sizes, work, Card(card.bandwidth, card.matmul_rate))
    moving = step_bytes(sizes, work) / card.bandwidth
    return {
        "step_ms": 1e3 * measured.seconds,
        "tok_per_step": measured.tokens_per_step,
        "tok_s": work.batch * work.tokens_per_step / measured.seconds,
        "floor_ms": 1e3 * floor,
        "share_of_floor": floor / measured.seconds,
        "share_of_bytes": moving / measured.seconds,
    }


def measure_loop(llm: LLM, preset: str, batch: int, num_steps: int = _LOOP_STEPS) -> dict[str, Any]:
    """A real `engine.step()` loop of greedy requests: what the device does not spend in decode steps, by events around
    each. Its work between two steps (table, results) counts as idle as well. `host_waits` per step should be 0."""
    engine, mtp_step = llm.engine, llm.config.mtp_step
    decode: Any = engine.runner.decode
    if hasattr(decode, "sizes"):
        graphs = type(decode)(decode.step, batch, decode.depths)
        graphs.sizes = [batch]
        graphs.capture()
        engine.runner, decode = replace(engine.runner, decode=graphs), graphs
    spans, run_step = [], decode.run

    def timed(*args: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = run_step(*args)
        end.record()
        spans.append((start, end))
        return result

    decode.run = timed
    rng, greedy = random.Random(0), SamplingParams(temperature=0, ignore_eos=True)
    for index in range(batch):
        prompt = draw_tokens(rng, _PROMPT_LEN, engine.ready.vocab_size)
        engine.add(Generate(f"loop {index}", prompt, greedy))
    while engine.scheduler.waiting or not all(request.is_decoding for request in engine.scheduler.running):
        engine.step()
    for _ in range(4):
        engine.step()
    spans.clear()
    begin = time.perf_counter()
    with _watch_waits() as waits:
        for _ in range(num_steps):
            engine.step()
    engine.drain()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    for index in range(batch):
        engine.abort(f"loop {index}")
    busy = [1e3 * start.elapsed_time(end) for start, end in spans]
    idle = [1e3 * one[1].elapsed_time(other[0]) for one, other in itertools.pairwise(spans)]
    return {
        "model": preset,
        "batch": batch,
        "mtp": mtp_step,
        "wall_ms": 1e3 * seconds / num_steps,
        "device_ms": statistics.median(busy) / 1e3,
        "idle_us": statistics.median(idle),
        "idle_us_worst": max(idle),
        "idle_share": sum(idle) / (sum(busy) + sum(idle)),
        "host_waits": len(waits) / num_steps,
    }


@contextmanager
def _watch_waits() -> Iterator[list[warnings.WarningMessage]]:
    """What torch warns of inside: operations that make the host wait for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")


def compare_transformers(preset: str, llm: LLM, bench: StaticDecode, card: CardSpeed, log: Log) -> None:
    """Rows of `transformers.generate` without drafts beside ours: a step at the same length, and a prompt."""
    device = bench.table.device
    try:
        model = make_transformers(preset, device, bench.step.target.embed_tokens.weight.dtype)
        for batch in PEER_BATCHES:
            if log.is_over(2 * _ROW_SECONDS):
                log.skip(f"transformers {preset} batch {batch}")
                return
            _time_generate(model, batch, _PROMPT_LEN, 2, device)
            first, whole = (_time_generate(model, batch, _PROMPT_LEN, count, device) for count in (1, _PEER_TOKENS + 1))
            theirs = (whole - first) / _PEER_TOKENS
            ours = bench.measure(batch, 0, context=_PROMPT_LEN + _PEER_TOKENS // 2).seconds
            row = {"model": preset, "batch": batch, "transformers_ms": 1e3 * theirs, "tandem_ms": 1e3 * ours}
            log.add("transformers", **row, ratio=theirs / ours)
        length = bench.context
        times = [_time_generate(model, 1, length, 1, device) for _ in range(3)]
        ours = measure_prefill(llm, preset, 1, length, card, partial(_synchronize, device))["ms"] / 1e3
        row = {"model": preset, "tokens": length, "transformers_ms": 1e3 * min(times), "tandem_ms": 1e3 * ours}
        log.add("transformers prefill", **row, ratio=min(times) / ours)
    except FAILURES as failure:
        log.add("skipped", what=f"transformers {preset}", why=f"{type(failure).__name__}: {failure}"[:300])


def make_transformers(preset: str, device: str, dtype: torch.dtype) -> Any:
    """The preset's model with random weights. Raises ImportError where transformers does not know it."""
    from transformers import Qwen3_5ForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    model_class: Any = Qwen3_5ForCausalLM
    with torch.device(device):
        model = model_class(model_class.config_class.from_dict(make_config(preset))).to(dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def _time_generate(model: Any, batch: int, length: int, num_tokens: int, device: str) -> float:
    prompts = torch.randint(1, model.config.vocab_size, (batch, length), device=device)
    _synchronize(device)
    start = time.perf_counter()
    model.generate(prompts, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    _synchronize(device)
    return time.perf_counter() - start


def _memory(measured: Measured) -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    return {"graph_mib": measured.graph_bytes / MIB, "peak_gib": torch.cuda.max_memory_allocated() / GIB}


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
