"""A Chrome trace of captured decode steps, and which kernels they spend their time in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_suite.decode import CONTEXT
from benchmarks.gpu_suite.log import Log
from benchmarks.gpu_suite.static_decode import StaticDecode, config_directory, load_largest

MODELS, BATCH, MTP_STEP, NUM_STEPS = ("27B", "9B", "4B", "0.8B"), 32, 1, 3
_NUM_KERNELS = 15


def run_timeline(path: Path, log: Log, models: Sequence[str] = MODELS, context: int = CONTEXT, **settings: Any) -> None:
    """Trace the first of the models that fits, and write the trace to `path`."""
    for preset in models:
        with config_directory(preset) as directory:
            try:
                llm, batch = load_largest(directory, [BATCH], MTP_STEP, context, **settings)
            except MemoryError as failure:
                log.add("skipped", what=f"trace of {preset}", why=str(failure)[:300])
                continue
            _trace(StaticDecode(llm, context), preset, batch, path, log)
            return


def _trace(bench: StaticDecode, preset: str, batch: int, path: Path, log: Log) -> None:
    has_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_cuda else [])]
    with bench.captured(batch, MTP_STEP, bench.context) as captured:
        captured.replay()
        with profile(activities=activities) as profiler:
            for _ in range(NUM_STEPS):
                captured.replay()
            if has_cuda:
                torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    log.add("trace", model=preset, batch=batch, mtp=MTP_STEP, steps=NUM_STEPS, file=path.name)
    for row in summarise(profiler.key_averages()):
        log.add("where a step goes", model=preset, batch=batch, mtp=MTP_STEP, **row)


def summarise(averages: Any) -> list[dict[str, Any]]:
    """The kernels that take longest: launches and microseconds per step, and their share of all kernels' time."""
    kernels = [(event.key, event.count, float(getattr(event, "self_device_time_total", 0.0))) for event in averages]
    total = sum(microseconds for _, _, microseconds in kernels)
    longest = sorted(kernels, key=lambda kernel: -kernel[2])[:_NUM_KERNELS]
    return [
        {
            "kernel": name[:60],
            "launches": count / NUM_STEPS,
            "us": microseconds / NUM_STEPS,
            "share": microseconds / total,
        }
        for name, count, microseconds in longest
        if microseconds > 0
    ]
