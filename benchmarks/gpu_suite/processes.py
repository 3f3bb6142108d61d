"""Runs the suite's jobs as processes within its time, and gathers the rows that they write."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.jobs import Stage
from benchmarks.gpu_suite.log import read_rows

Rows = list[dict[str, Any]]

_RESERVE = 10.0  # seconds at the end for the report
_LEAST = 15.0  # a stage with less is left out: starting takes most of it
_SHORT = 45.0  # starting is most of a short job: what its share lacks comes from later stages
_GRACE = 12.0  # what a job may take to end by itself
_ERROR_LINES = 25


@dataclass(frozen=True)
class _Running:
    job: str
    process: subprocess.Popen[bytes]
    rows: Path
    output: Path


def run_stages(command: Sequence[str], stages: Sequence[Stage], folder: Path, seconds: float) -> Rows:
    """Rows of all jobs of all stages, with one of each job itself in the table "jobs". `command` starts a job when its
    flags are added."""
    end, rows = time.time() + seconds - _RESERVE, []
    for index, stage in enumerate(stages):
        left = end - time.time()
        share = left * stage.weight / sum(later.weight for later in stages[index:])
        share = min(left - _GRACE, max(share, _SHORT))
        if share < _LEAST:
            rows += [{"table": "skipped", "what": job, "why": "time ran out"} for job in stage.jobs]
            continue
        rows += run_stage(command, stage, rows, folder, time.time() + share)
        if stage.jobs == ("card",) and not any(row["table"] == "card" for row in rows):
            return rows
    return rows


def run_stage(command: Sequence[str], stage: Stage, known: Rows, folder: Path, deadline: float) -> Rows:
    """Rows of the stage's jobs, which run side by side, no more than there are processors."""
    known_path = folder / "known.json"
    known_path.write_text(json.dumps(known), encoding="utf-8")
    waiting = list(stage.jobs)
    running: list[_Running] = []
    rows: Rows = []
    while waiting or running:
        while waiting and len(running) < max(1, os.cpu_count() or 1):
            running.append(_start(command, waiting.pop(0), known_path, folder, deadline))
        for one in [one for one in running if _has_ended(one, deadline)]:
            running.remove(one)
            rows += _collect(one, deadline)
        time.sleep(0.1)
    return rows


def _start(command: Sequence[str], job: str, known: Path, folder: Path, deadline: float) -> _Running:
    print(f"{time.strftime('%H:%M:%S')} {job}, {deadline - time.time():.0f} s at most", file=sys.stderr, flush=True)
    name = job.replace("/", "-")
    rows, output = folder / f"{name}.rows", folder / f"{name}.output"
    flags = ["--job", job, "--rows", str(rows), "--known", str(known), "--deadline", str(deadline)]
    with output.open("wb") as file:
        process = subprocess.Popen([*command, *flags], stdout=file, stderr=subprocess.STDOUT)
    return _Running(job, process, rows, output)


def _has_ended(one: _Running, deadline: float) -> bool:
    """Ends the job if it is long over its time."""
    if one.process.poll() is not None:
        return True
    if time.time() < deadline + _GRACE:
        return False
    one.process.kill()
    one.process.wait()
    return True


def _collect(one: _Running, deadline: float) -> Rows:
    code = one.process.returncode
    rows = read_rows(one.rows)
    if code == 0:
        return rows
    if code < 0 and time.time() >= deadline:
        return [*rows, {"table": "skipped", "what": f"the rest of {one.job}", "why": "it did not end in time"}]
    lines = one.output.read_text(encoding="utf-8", errors="replace").splitlines()
    print("\n".join([f"{one.job} crashed:", *lines[-_ERROR_LINES:]]), file=sys.stderr, flush=True)
    last = next((line for line in reversed(lines) if line.strip()), "")
    return [*rows, {"table": "crashes", "job": one.job, "code": code, "ok": False, "note": last[:300]}]
