"""Acceptance of random weights is next to nothing: here it follows a trace, inside the captured step as well.

The wrapped `accept_and_commit` sees a window whose drafts are the target's own tokens as far as the trace says, and
others behind. Nothing else changes: what the step computes, stores and rolls back is what it would be.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import power_of_two
from kernels.gpu.speculative import CommitTable, accept_and_commit


def make_trace(num_steps: int, batch: int, mtp_step: int, acceptance: float, device: str) -> Tensor:
    """Accepted drafts [num_steps, B] int64: each is right with probability `acceptance` if the one before was; the same
    at every call."""
    source = torch.Generator().manual_seed(0)
    is_right = torch.rand(num_steps, batch, mtp_step, generator=source) < acceptance
    return is_right.long().cumprod(dim=-1).sum(dim=-1).to(device)


@contextmanager
def forced_acceptance(module: ModuleType, trace: Tensor) -> Iterator[Tensor]:
    """Inside, steps of `module`'s class (which calls its global accept_and_commit) accept by the trace, one row of it
    per step, again from the start behind its end. Gives the count of steps, a number on the device."""
    counter = torch.zeros(1, dtype=torch.int64, device=trace.device)

    def accept(
        token_ids: Tensor, window: Tensor, widths: Tensor, rows: Tensor, table: CommitTable
    ) -> tuple[Tensor, Tensor]:
        forced = torch.empty_like(window)
        num_tokens = len(window) // len(rows)
        _force_kernel[(len(rows),)](
            *(token_ids, window, trace, counter, forced, num_tokens, len(trace), trace.shape[1]),
            ROWS=power_of_two(num_tokens),
            num_warps=1,
        )
        counter.add_(1)
        return accept_and_commit(token_ids, forced, widths, rows, table)

    original = module.accept_and_commit
    module.accept_and_commit = accept  # type: ignore[attr-defined]
    try:
        yield counter
    finally:
        module.accept_and_commit = original  # type: ignore[attr-defined]


@triton.jit
def _force_kernel(
    token_ids_ptr, window_ptr, trace_ptr, counter_ptr, forced_ptr, width, num_steps, num_requests, ROWS: tl.constexpr
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    step = tl.load(counter_ptr) % num_steps
    count = tl.load(trace_ptr + step * num_requests + b)
    t = tl.arange(0, ROWS)
    is_draft = (t > 0) & (t < width)
    own = tl.load(token_ids_ptr + b * width + t - 1, mask=is_draft, other=0)
    newest = tl.load(window_ptr + b * width)
    forced = tl.where(t == 0, newest, tl.where(t <= count, own, own + 1))
    tl.store(forced_ptr + b * width + t, forced, mask=t < width)
