"""Decode steps of one cell beside those of others, in interleaved rounds: transformers, overlap, another checkout."""

import gc
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import spread
from benchmarks.static_throughput.decode import Cell, DecodeBench, room_of
from benchmarks.static_throughput.presets import Preset
from benchmarks.versions import Task, compare_versions


class TransformersBench:
    """`transformers.generate` on the same files, greedy, with its cache; the clock reads after every token."""

    def __init__(self, preset: Preset, cell: Cell):
        from transformers import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        model_class: Any = Qwen3_5MoeForCausalLM if preset.dimensions.experts else Qwen3_5ForCausalLM
        self.model = model_class.from_pretrained(preset.directory, dtype=getattr(torch, preset.dtype)).eval()
        self.model.generation_config.eos_token_id = None
        self.prompts = torch.randint(1, self.model.config.vocab_size, (cell.batch, cell.context))

    def measure(self, num_steps: int) -> list[float]:
        """Seconds of each of so many decode steps; the prompt is not counted."""
        clock = _Clock()
        self.model.generate(
            self.prompts, max_new_tokens=num_steps + 1, do_sample=False, pad_token_id=0, stopping_criteria=[clock]
        )
        return [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]


class _Clock:
    """A stopping criterion that never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def compare_transformers(
    preset: Preset, cell: Cell, num_steps: int, num_rounds: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """A row at mtp_step 0: median milliseconds of a step, tokens per second, and the median ratio of the rounds."""
    ours = DecodeBench(preset, 0, cell.batch, cell.context + room_of(num_steps, 0), **settings)
    theirs = TransformersBench(preset, cell)
    rounds = []
    for number in range(num_rounds + 1):
        own = statistics.median(sample.seconds for sample in ours.measure_at(cell, num_steps, number))
        rounds.append((own, statistics.median(theirs.measure(num_steps))))
    step, peer_step = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    return {
        "batch": cell.batch,
        "context": cell.context,
        "tandem_step_ms": 1e3 * step,
        "transformers_step_ms": 1e3 * peer_step,
        "tandem_tok_s": cell.batch / step,
        "transformers_tok_s": cell.batch / peer_step,
        **spread("ratio", (peer / own for own, peer in rounds[1:])),
    }


def compare_overlap(
    preset: Preset, cell: Cell, mtp_steps: Sequence[int], num_steps: int, num_rounds: int, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows per mtp_step: tokens per second with and without overlap."""
    rows = []
    for k in mtp_steps:
        rounds = _overlap_rounds(preset, cell, k, num_steps, num_rounds, settings)
        gc.collect()  # two engines at a time
        rows.append(
            {
                "batch": cell.batch,
                "context": cell.context,
                "mtp_step": k,
                "overlap_off_tok_s": statistics.median(plain for plain, _ in rounds),
                "overlap_on_tok_s": statistics.median(overlapped for _, overlapped in rounds),
                **spread("on_over_off", (overlapped / plain for plain, overlapped in rounds)),
            }
        )
    return rows


def _overlap_rounds(
    preset: Preset, cell: Cell, mtp_step: int, num_steps: int, num_rounds: int, settings: dict[str, Any]
) -> list[tuple[float, float]]:
    longest = cell.context + room_of(num_steps, mtp_step)
    off, on = (
        DecodeBench(preset, mtp_step, cell.batch, longest, **(settings | {"overlap": overlap}))
        for overlap in ("off", "on")
    )
    rounds = [
        (off.speed(cell, num_steps, number), on.speed(cell, num_steps, number)) for number in range(num_rounds + 1)
    ]
    return rounds[1:]


def compare_baseline(
    preset: Preset,
    cell: Cell,
    mtp_steps: Sequence[int],
    baseline: Path,
    num_steps: int,
    num_rounds: int,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Rows per mtp_step: tokens per second of the checkout at `baseline` and of this one, both with their defaults."""
    tasks = []
    for k in mtp_steps:
        longest = cell.context + (num_rounds + 2) * num_steps * (k + 1) + cell.batch
        own = {"model": str(preset.directory), "mtp_step": k, "max_running_requests": cell.batch}
        tasks.append(Task(own | {"max_model_len": longest} | settings, cell.batch, cell.context, num_steps))
    speeds = compare_versions(baseline, tasks, num_rounds)
    named = [{"batch": cell.batch, "context": cell.context, "mtp_step": k} for k in mtp_steps]
    return [name | speed for name, speed in zip(named, speeds, strict=True)]


def trace_steps(
    preset: Preset, cell: Cell, mtp_step: int, path: Path, num_steps: int, settings: dict[str, Any]
) -> float:
    """Write a timeline of decode steps with overlap; the hidden share of the host's work."""
    longest = cell.context + 2 * room_of(num_steps, mtp_step)
    bench = DecodeBench(preset, mtp_step, cell.batch, longest, **(settings | {"overlap": "on"}))
    bench.measure_at(cell, num_steps)
    trace = bench.engine.start_trace()
    bench.measure(num_steps)
    events = list(trace.events)
    path.write_text(json.dumps({"traceEvents": events}))
    return hidden_share(events)


def hidden_share(events: list[dict[str, Any]]) -> float:
    """Share of the time of planning and booking, on the host, that lies inside steps of the device; spans of one kind
    do not overlap each other."""
    spans = [(event["tid"], event["name"], event["ts"], event["ts"] + event["dur"]) for event in events]
    steps = [(start, end) for track, name, start, end in spans if (track, name) == ("device", "step")]
    work = [span[2:] for span in spans if span[0] == "host" and span[1] in ("schedule", "collect")]
    hidden = sum(max(0.0, min(end, until) - max(start, since)) for start, end in work for since, until in steps)
    return hidden / sum(end - start for start, end in work)
