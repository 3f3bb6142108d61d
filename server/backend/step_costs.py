"""What passes of each size cost on this machine, measured once at start for whoever plans the depth of drafts."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from models.forward_batch import ForwardBatch
from server.backend.batch import build_forward_batch
from server.backend.runner import Decode, Runner
from server.backend.sampler import Sampled
from server.messages import Generate, SamplingParams
from server.request import Batch, Request, Work

# Tokens that the measured requests have in the cache, if the longest request may have as many.
_CONTEXT_LEN = 256
_MIN_ROUNDS, _MAX_ROUNDS, _ROUND_SECONDS = 2, 7, 0.03

Costs = tuple[dict[tuple[int, int], float], dict[int, float], dict[tuple[int, int], float], dict[int, float]]


@torch.inference_mode()
def measure_costs(runner: Runner, mtp_step: int) -> Costs:
    """Seconds of a verify pass by (requests, tokens of each), of one more draft by requests, and of the draft head's
    first call by (requests, tokens of each); and of a whole step by requests in which half of them (rounded down) run
    and want one draft, the others none. Rows and the padding page are used for it and left as new ones are."""
    if runner.decode is not None:
        return _measure_decode(runner, runner.decode, mtp_step)
    table, drafter = runner.table, runner.drafter
    assert drafter is not None
    batches = list(_batch_sizes(runner.plan.limits.max_running_requests))
    widths = sorted({1, 2, mtp_step + 1})
    verify: dict[tuple[int, int], float] = {}
    extend: dict[tuple[int, int], float] = {}
    draft: dict[int, float] = {}
    mixed: dict[int, float] = {}
    for batch_size in tqdm(batches, desc="Measuring steps", unit="batch size"):
        for width in widths:
            batch = _make_batch(batch_size, width, 1)
            _place(runner, batch_size)
            verify[batch_size, width] = _time(partial(_verify, runner, batch))
            hidden, sampled, forward = _verify(runner, batch)
            extend[batch_size, width] = _time(partial(drafter.propose, hidden, sampled, forward, batch))
        deep = _make_batch(batch_size, width, min(2, mtp_step))
        both = _time(partial(drafter.propose, hidden, sampled, forward, deep))
        draft[batch_size] = max(0.0, both - extend[batch_size, width])
        if batch_size > 1:
            mixed[batch_size] = _time(
                partial(_step, runner, _make_mixed_batch(batch_size, runner.plan.limits.max_behind > 0))
            )
    for row in range(1, batches[-1] + 1):
        table.cache.gdn.reset(row)
    return verify, draft, extend, mixed


def _measure_decode(runner: Runner, decode: Decode, mtp_step: int) -> Costs:
    """The same where a decode step is one piece of work of the device, in which the draft head always runs over all
    rows: that is part of `verify` here, and `extend` is what the first draft adds."""
    batches = list(_batch_sizes(runner.plan.limits.max_running_requests))
    verify, draft, extend, mixed = {}, {}, {}, {}

    def run(batch_size: int, width: int, num_drafts: int) -> float:
        _place(runner, batch_size)
        return _time(partial(decode.run, _make_batch(batch_size, width, num_drafts)))

    for batch_size in tqdm(batches, desc="Measuring steps", unit="batch size"):
        for width in sorted({1, 2, mtp_step + 1}):
            verify[batch_size, width] = run(batch_size, width, 0)
            extend[batch_size, width] = max(0.0, run(batch_size, width, 1) - verify[batch_size, width])
        chain = run(batch_size, width, mtp_step) - verify[batch_size, width] - extend[batch_size, width]
        draft[batch_size] = max(0.0, chain / max(1, mtp_step - 1))
        if batch_size > 1:
            mixed[batch_size] = run(batch_size, 2, 1)
    for row in range(1, batches[-1] + 1):
        runner.table.cache.gdn.reset(row)
    return verify, draft, extend, mixed


def _batch_sizes(most: int) -> Iterator[int]:
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


def _make_batch(batch_size: int, width: int, num_drafts: int) -> Batch:
    message = Generate("cost", [0], SamplingParams(temperature=0))
    request = Request.create(message, (), max_model_len=2**31)
    # As many pages as tokens: enough for any page size.
    work = Work(request=request, row=1, num_tokens=width, num_drafts=num_drafts, first_page=_CONTEXT_LEN)
    return Batch([replace(work, row=row) for row in range(1, batch_size + 1)], is_verify=True)


def _make_mixed_batch(batch_size: int, can_idle: bool) -> Batch:
    uniform = _make_batch(batch_size, 1, 0).works
    half = [replace(work, num_tokens=2, num_drafts=1) for work in uniform[: batch_size // 2]]
    return Batch([*half, *(replace(work, is_idle=can_idle) for work in uniform[len(half) :])], is_verify=True)


def _step(runner: Runner, batch: Batch) -> None:
    assert runner.drafter is not None
    runner.drafter.propose(*_verify(runner, batch), batch)


def _place(runner: Runner, batch_size: int) -> None:
    """Rows 1..batch_size in mid-request, on the padding page."""
    table, rows = runner.table, slice(1, batch_size + 1)
    table.page_table[rows] = 0
    table.seq_len[rows] = min(_CONTEXT_LEN, runner.plan.max_model_len // 2)
    table.accept_len[rows] = 1
    table.next_ids[rows] = 0


def _verify(runner: Runner, batch: Batch) -> tuple[torch.Tensor, Sampled, ForwardBatch]:
    """A pass that leaves the rows where they are."""
    forward = build_forward_batch(batch, runner.table)
    hidden = runner.target(forward)
    sampled = runner.sampler.sample(runner.target.compute_logits(hidden), forward, batch)
    no_tokens = torch.zeros_like(sampled.accept_lens)
    runner.table.commit(forward, no_tokens, sampled.token_ids[:, :0], no_tokens)
    runner.table.accept_len[: len(batch.works) + 1] = 1
    return hidden, sampled, forward


def _time(function: Callable[[], object]) -> float:
    """Seconds of one call: the least of several, after one to warm up."""
    function()
    seconds: list[float] = []
    while len(seconds) < _MIN_ROUNDS or (len(seconds) < _MAX_ROUNDS and sum(seconds) < _ROUND_SECONDS):
        start = time.perf_counter()
        function()
        _wait_for_device()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
