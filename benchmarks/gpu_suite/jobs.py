"""What the suite consists of: jobs, each a process of its own, so that none can take the others down with it.

A job is named part/detail. Jobs of one stage run side by side where only their results matter, else alone on the card.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_suite import checks, decode, equality
from benchmarks.gpu_suite.card import CardSpeed, Timer, measure_card
from benchmarks.gpu_suite.case import Setting
from benchmarks.gpu_suite.dimensions import dimensions_of
from benchmarks.gpu_suite.log import Log
from benchmarks.gpu_suite.rollback import run_rollback
from benchmarks.gpu_suite.timeline import run_timeline

MODELS = decode.MODELS
# Of the larger models, whose weights take a while, and of the first, which compiles, and has a peer.
_WEIGHTS = {"0.8B": 2.2, "27B": 2.0, "35B-A3B": 1.5}
PARTS = ("kernels", "equality", "decode", "rollback", "trace")


@dataclass(frozen=True)
class Stage:
    """Jobs that run side by side, and their share of the time that is left, relative to that of later stages."""

    jobs: tuple[str, ...]
    weight: float


def plan(parts: tuple[str, ...], models: tuple[str, ...]) -> list[Stage]:
    """The stages in their order: first the card, then what can be red, then speed."""
    checked = [f"checks/{model}/{dtype}" for model in checks.MODELS if model in models for dtype in checks.DTYPES]
    compared = [f"equality/{name}" for name in ("delta", *equality.MODELS)]
    together = [*(checked if "kernels" in parts else []), *(compared if "equality" in parts else [])]
    stages = [Stage(("card",), 0.3), Stage(tuple(together), 4.0)]
    if "decode" in parts:
        stages += [Stage((f"decode/{model}",), _WEIGHTS.get(model, 1.0)) for model in decode.MODELS if model in models]
    stages += [Stage((name,), 0.7) for name in ("rollback", "trace") if name in parts]
    if "kernels" in parts:
        stages += [Stage((f"times/{model}",), 0.8) for model in checks.MODELS if model in models]
    return [stage for stage in stages if stage.jobs]


def run_job(job: str, known: list[dict[str, Any]], log: Log, trace_path: Path) -> None:
    """Do one job. `known` are the rows of all jobs before."""
    kind, *details = job.split("/")
    if kind == "card":
        speed = measure_card()
        shown = {
            "tb_s": speed.bandwidth / 1e12,
            "tflop_s": speed.matmul_rate / 1e12,
            "empty_us": 1e6 * speed.empty_seconds,
        }
        log.add("card", **shown, **speed.row())
    elif kind == "checks":
        model, dtype = details
        checks.run_checks(checks.make_settings(model, dtype, is_ragged=True), log)
    elif kind == "equality":
        _check_equality(details[0], log)
    elif kind == "times":
        settings = list(checks.make_settings(details[0], "bfloat16", is_ragged=False))
        checks.run_times(settings, checks.red_cases(known), card_speed(known), Timer(), log)
    elif kind == "decode":
        decode.run_decode(details[0], card_speed(known), log)
    elif kind == "rollback":
        decode_rows = [row for row in known if row["table"] == "decode"]
        run_rollback(card_speed(known), Timer(), decode_rows, log)
    else:
        assert kind == "trace", job
        run_timeline(trace_path, log)


def card_speed(rows: list[dict[str, Any]]) -> CardSpeed:
    """What the first job has measured."""
    row = next(row for row in rows if row["table"] == "card")
    return CardSpeed(**{name: row[name] for name in ("bandwidth", "matmul_rate", "empty_seconds")})


def _check_equality(name: str, log: Log) -> None:
    if name != "delta":
        equality.check_model(name, log)
        return
    for model in checks.MODELS:
        equality.check_chains(Setting(model, dimensions_of(model), 4, 1, torch.bfloat16), log)
