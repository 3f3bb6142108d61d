"""Steps that were handed over before something happened to their requests."""

from dataclasses import replace
from itertools import count

from server.request import Batch, Outcome, Step
from server.router.scheduler import Scheduler
from unit_tests.server.router.test_scheduler import answer, ids, make_request, make_scheduler, play


def begin(scheduler: Scheduler, name: str = "a", **sampling: object) -> None:
    """A request whose prompt has run."""
    scheduler.add(make_request(name, prompt_len=4, max_tokens=40, **sampling))
    play(scheduler, token=10)


def schedule(scheduler: Scheduler) -> Step:
    step = scheduler.schedule()
    assert step is not None
    return step


def emitting(batch: Batch, *token_ids: int) -> Outcome:
    """Of one request that gives these."""
    padded = [*token_ids, *[0] * (batch.works[0].num_tokens - len(token_ids))]
    return Outcome([padded], [len(token_ids)], [len(token_ids)], [[]], [True], 0.001)


def test_what_follows_on_logits_that_were_not_finite_is_not_emitted() -> None:
    """The step behind them was on its way: its logits may be numbers, but a hole would be before its tokens."""
    scheduler = make_scheduler()
    begin(scheduler)
    (request,) = scheduler.running
    bad, behind = schedule(scheduler), schedule(scheduler)
    assert scheduler.collect(bad, [replace(emitting(bad.batches[0], 11, 12), is_finite=[False])]) == []
    assert scheduler.collect(behind, [emitting(behind.batches[0], 13, 14)]) == []
    assert request.output_ids == [10] and request in scheduler.waiting
    again = schedule(scheduler)
    (output,) = scheduler.collect(again, [replace(answer(again.batches[0], 1), token_ids=[[11]])])
    assert output.token_ids == [11] and request.output_ids == [10, 11]  # type: ignore[union-attr]


def test_an_answer_ends_at_a_stop_token_that_the_device_does_not_know() -> None:
    """It knows so many; what it accepted behind another one is no part of the answer, nor of what others may reuse."""
    scheduler = make_scheduler(page_size=2, mtp_step=4, num_checkpoints=4, num_pages=80)
    begin(scheduler, stop_token_ids=tuple(range(200, 220)))
    for tokens in ((11,), (219, 31, 32, 33, 34)):
        step = schedule(scheduler)
        outputs = scheduler.collect(step, [emitting(step.batches[0], *tokens)])
    assert outputs[0].token_ids == [219] and outputs[0].finish_reason == "stop"  # type: ignore[union-attr]
    assert not scheduler.has_work()
    scheduler.cache.check([])


def test_depths_are_chosen_for_those_that_have_a_next_step() -> None:
    scheduler, asked = make_scheduler(max_running_requests=8, num_pages=400, chunked_prefill_size=100), list[int]()
    plan, names = scheduler.planner.plan, count()
    scheduler.planner.plan = lambda states: (asked.append(len(states)), plan(states))[1]  # type: ignore[method-assign]
    begin(scheduler)
    for max_tokens in (0, 1, 1, 2):
        scheduler.add(make_request(f"b{next(names)}", prompt_len=3, max_tokens=max_tokens))
    prefill, verify = play(scheduler)
    assert (len(ids(prefill)), ids(verify), asked) == (4, ["a"], [1, 2])
    assert sum(scheduler.planner.requests_per_depth) == 3
