"""Replay against snapshots: the same tokens and acceptance through both kernels, equal bits, and the time of each."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_suite.bytes import gated_delta_rule_verify
from benchmarks.gpu_suite.card import CardSpeed, Timer, speed_row
from benchmarks.gpu_suite.case import Setting
from benchmarks.gpu_suite.delta_cases import DeltaMemory, make_inputs, shape_of
from benchmarks.gpu_suite.dimensions import dimensions_of
from benchmarks.gpu_suite.log import Log
from benchmarks.gpu_suite.snapshot_kernel import snapshot_verify
from kernels.gpu.gated_delta_rule import gated_delta_rule_verify as replay_verify

MODEL, BATCHES, MTP_STEPS = "27B", (32, 128), (1, 3)
_COLUMNS = (8, 16)  # of a program of the snapshot kernel: the faster counts
_STEPS = 4  # of the comparison


def run_rollback(card: CardSpeed, timer: Timer, decode_rows: Iterable[dict[str, Any]], log: Log) -> None:
    """A row per batch and mtp_step; `decode_rows` are those of the decode part, for what a whole step would take."""
    steps = {(row["batch"], row["mtp"]): row["step_ms"] for row in decode_rows if row["model"] == MODEL}
    for batch in BATCHES:
        for mtp_step in MTP_STEPS:
            if log.is_over():
                log.skip(f"rollback batch {batch} mtp {mtp_step}")
                continue
            setting = Setting(MODEL, dimensions_of(MODEL), batch, mtp_step + 1, torch.bfloat16)
            log.add("rollback", **compare_schemes(setting, card, timer, steps.get((batch, mtp_step))))
            torch.cuda.empty_cache()


@torch.no_grad()
def compare_schemes(setting: Setting, card: CardSpeed, timer: Timer, step_ms: float | None) -> dict[str, Any]:
    """Equal bits over some steps, seconds of one layer, and what a measured step of step_ms becomes with snapshots."""
    is_equal = equal_bits(setting)
    sizes, num_tokens, batch = setting.sizes, setting.num_tokens, setting.batch
    inputs, _ = make_inputs(setting, setting.rows)
    shape, rows, start_lens = shape_of(setting), setting.row_ids(), setting.start_lens()
    accept_lens = setting.integers(1, num_tokens + 1, batch)
    memory = DeltaMemory(setting)
    place = (rows, start_lens, accept_lens)
    replay = timer.seconds(lambda: replay_verify(inputs, shape, memory.state, memory.ring, *place))
    pool = setting.normal(batch + 1, num_tokens, *memory.state.shape[1:], dtype=torch.float32)
    cuts = [partial(snapshot_verify, inputs, shape, pool, rows, accept_lens, columns) for columns in _COLUMNS]
    snapshots = min(timer.seconds(cut) for cut in cuts)
    moved = gated_delta_rule_verify(
        batch, num_tokens, sizes, setting.element, accept_lens.sum().item(), batch
    ).num_bytes
    extra_ms = 1e3 * sizes.num_delta_layers * (snapshots - replay)
    return {
        "model": setting.model,
        "batch": batch,
        "mtp": num_tokens - 1,
        "ok": is_equal,
        "replay_us": 1e6 * replay,
        "snapshots_us": 1e6 * snapshots,
        "ratio": snapshots / replay,
        "replay_share": speed_row(moved, 0.0, replay, card)["share"],
        "step_ms": step_ms,
        "step_with_snapshots_ms": step_ms and step_ms + extra_ms,
        "step_ratio": step_ms and 1 + extra_ms / step_ms,
    }


def equal_bits(setting: Setting) -> bool:
    """Both give the same outputs over steps with random acceptance, from the same state."""
    shape, rows, num_tokens = shape_of(setting), setting.row_ids(), setting.num_tokens
    memory = DeltaMemory(setting)
    memory.state.mul_(0.1)
    pool = torch.full((setting.batch + 1, num_tokens, *memory.state.shape[1:]), torch.nan, device=setting.device)
    pool[:, 0] = memory.state
    start_lens = setting.start_lens()
    accept_lens = torch.zeros_like(start_lens)
    results: list[bool] = []
    for _ in range(_STEPS):
        inputs, _ = make_inputs(setting, setting.rows)
        mine = replay_verify(inputs, shape, memory.state, memory.ring, rows, start_lens, accept_lens)
        theirs = snapshot_verify(inputs, shape, pool, rows, accept_lens)
        results.append(_same(mine, theirs))
        accept_lens = setting.integers(1, num_tokens + 1, setting.batch)
        start_lens = start_lens + accept_lens
    return all(results)


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(torch.equal(one, other) and one.isfinite().all())
