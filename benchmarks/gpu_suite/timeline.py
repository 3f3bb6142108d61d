"""A Chrome trace of captured decode steps, and which kernels they spend their time in."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_suite.decode import CONTEXT
from benchmarks.gpu_suite.log import Log
from benchmarks.gpu_suite.static_decode import StaticDecode, config_directory, load_largest

# Models, of which the first that fits is traced; requests; drafts.
TRACES = ((("27B", "9B", "4B"), 32, 1), (("0.8B",), 1, 0))
NUM_STEPS = 3
_NUM_KERNELS = 15

Trace = tuple[Sequence[str], int, int]


def run_timeline(
    path: Path, log: Log, traces: Sequence[Trace] = TRACES, context: int = CONTEXT, **settings: Any
) -> None:
    """Trace steps of each, and write the first trace that could be made to `path`."""
    path.unlink(missing_ok=True)
    for models, batch, mtp_step in traces:
        for preset in models:
            with config_directory(preset) as directory:
                try:
                    llm, _ = load_largest(directory, [batch], mtp_step, context, **settings)
                except MemoryError as failure:
                    log.add("skipped", what=f"trace of {preset}", why=str(failure)[:300])
                    continue
                key = {"model": preset, "batch": batch, "mtp": mtp_step}
                _trace(StaticDecode(llm, context), key, None if path.exists() else path, log)
                del llm
                break
        gc.collect()


def _trace(bench: StaticDecode, key: dict[str, Any], path: Path | None, log: Log) -> None:
    has_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_cuda else [])]
    with bench.captured(key["batch"], key["mtp"], bench.context) as captured:
        captured.replay()
        with profile(activities=activities) as profiler:
            for _ in range(NUM_STEPS):
                captured.replay()
            if has_cuda:
                torch.cuda.synchronize()
    if path is not None:
        profiler.export_chrome_trace(str(path))
        log.add("trace", **key, steps=NUM_STEPS, file=path.name)
    for row in summarise(profiler.key_averages()):
        log.add("where a step goes", **key, **row)


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
