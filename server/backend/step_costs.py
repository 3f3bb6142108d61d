"""What passes of each size cost on this machine, measured once at start for whoever plans the depth of drafts."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from tqdm import trange

from models.forward_batch import ForwardBatch
from server.backend.batch import build_forward_batch
from server.backend.runner import Decode, Runner
from server.backend.sampler import Sampled
from server.messages import Generate, SamplingParams
from server.request import Batch, Request, Work

# Tokens that the measured requests have in the cache, if the longest request may have as many.
_CONTEXT_LEN = 256
# Rounds over all sizes, after one to warm up.
_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 2, 20, 1.0

Costs = tuple[dict[tuple[int, int], float], dict[int, float], dict[tuple[int, int], float], dict[int, float]]
_Result = TypeVar("_Result")


class _Stopwatch:
    """The least seconds that each kind of pass took, by its name and size.

    Rounds go over all sizes: a bad moment of the machine then falls on one round of many sizes and not on all of one,
    which would look dear beside the others for as long as the server runs.
    """

    def __init__(self, device: str):
        self._device = device
        self.seconds: dict[tuple[str, int, int], float] = {}

    def rounds(self) -> Iterator[None]:
        """Count what is timed in each; the first one is forgotten."""
        start = time.perf_counter()
        for number in trange(1 + _MAX_ROUNDS, desc="Measuring steps", unit="round"):
            if number > _MIN_ROUNDS and time.perf_counter() - start > _SECONDS:
                return
            yield
            if number == 0:
                self.seconds.clear()

    def time(self, name: str, batch_size: int, width: int, function: Callable[[], _Result]) -> _Result:
        """Run it once, to its end on the device."""
        start = time.perf_counter()
        result = function()
        _wait_for(self._device)
        key, seconds = (name, batch_size, width), time.perf_counter() - start
        self.seconds[key] = min(seconds, self.seconds.get(key, seconds))
        return result

    def grid(self, name: str) -> dict[tuple[int, int], float]:
        """Seconds of the passes of this name, by (batch size, width)."""
        return {(size, width): seconds for (kind, size, width), seconds in self.seconds.items() if kind == name}


@torch.inference_mode()
def measure_costs(runner: Runner, mtp_step: int) -> Costs:
    """Seconds of a verify pass by (requests, tokens of each), of one more draft by requests, and of the draft head's
    first call by (requests, tokens of each); and of a whole step by requests in which half of them (rounded down) run
    and want one draft, the others none. Rows and the padding page are used for it and left as new ones are."""
    batches = list(_batch_sizes(runner.plan.limits.max_running_requests))
    widths = sorted({1, 2, mtp_step + 1})
    measure = _measure_parts if runner.decode is None else partial(_measure_decode, runner.decode)
    costs = measure(runner, mtp_step, batches, widths)
    for row in range(1, batches[-1] + 1):
        runner.table.cache.gdn.reset(row)
    return costs


def _measure_parts(runner: Runner, mtp_step: int, batches: list[int], widths: list[int]) -> Costs:
    drafter, watch, can_idle = runner.drafter, _Stopwatch(runner.table.device), runner.plan.limits.max_behind > 0
    assert drafter is not None
    _place(runner, batches[-1])
    for _ in watch.rounds():
        for size in batches:
            for width in widths:
                batch, deep = (_make_batch(size, width, num_drafts) for num_drafts in (1, min(2, mtp_step)))
                results = watch.time("verify", size, width, partial(_verify, runner, batch))
                watch.time("extend", size, width, partial(drafter.propose, *results, batch))
            watch.time("deep", size, width, partial(drafter.propose, *results, deep))
            if size > 1:
                watch.time("mixed", size, 1, partial(_step, runner, _make_mixed_batch(size, can_idle)))
    extend, mixed = watch.grid("extend"), {size: seconds for (size, _), seconds in watch.grid("mixed").items()}
    draft = {size: max(0.0, both - extend[size, width]) for (size, width), both in watch.grid("deep").items()}
    return watch.grid("verify"), draft, extend, mixed


def _measure_decode(decode: Decode, runner: Runner, mtp_step: int, batches: list[int], widths: list[int]) -> Costs:
    """The same where a decode step is one piece of work of the device, in which the draft head always runs over all
    rows: that is part of `verify` here, and `extend` is what the first draft adds."""
    watch = _Stopwatch(runner.table.device)

    def run(name: str, size: int, width: int, num_drafts: int) -> None:
        _place(runner, size)
        _wait_for(runner.table.device)
        watch.time(name, size, width, partial(decode.run, _make_batch(size, width, num_drafts)))

    for _ in watch.rounds():
        for size in batches:
            for width in widths:
                run("verify", size, width, 0)
                run("both", size, width, 1)
            run("deep", size, width, mtp_step)
            if size > 1:
                run("mixed", size, 2, 1)
    verify, both = watch.grid("verify"), watch.grid("both")
    extend = {key: max(0.0, seconds - verify[key]) for key, seconds in both.items()}
    draft = {
        size: max(0.0, (deep - verify[size, width] - extend[size, width]) / max(1, mtp_step - 1))
        for (size, width), deep in watch.grid("deep").items()
    }
    return verify, draft, extend, {size: seconds for (size, _), seconds in watch.grid("mixed").items()}


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


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
