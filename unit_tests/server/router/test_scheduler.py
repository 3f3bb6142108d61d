import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from server.cache_ops import ClearPage
from server.config import Limits
from server.messages import Failed, Generate, SamplingParams, TokenOutput
from server.request import Batch, Outcome, Request
from server.router.planner import Planner
from server.router.scheduler import Scheduler

EOS = 99


def make_scheduler(**sizes: Any) -> Scheduler:
    defaults = {
        "max_running_requests": 4,
        "chunked_prefill_size": 16,
        "page_size": 4,
        "num_pages": 40,
        "mtp_step": 2,
        "stream_slowdown": math.inf,
    }
    limits = Limits(**defaults | sizes)  # type: ignore[arg-type]
    return Scheduler(limits, Planner(limits.mtp_step, None, is_adaptive=False))


def make_request(name: str, prompt_len: int, max_tokens: int = 8, **sampling: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Request.create(Generate(name, list(range(prompt_len)), params), (EOS,), max_model_len=64)


def plan(scheduler: Scheduler) -> list[Batch]:
    step = scheduler.schedule()
    return step.batches if step is not None else []


def answer(batch: Batch, accept_len: int, token: int = 1) -> Outcome:
    """What the device would give: every request emits up to accept_len tokens."""
    lens = [min(accept_len, work.num_tokens) if batch.is_verify else int(work.ends_prompt) for work in batch.works]
    size = len(batch.works)
    return Outcome([[token] * 3] * size, lens, lens, [[] for _ in range(size)], [True] * size, 0.001)


def play(scheduler: Scheduler, accept_len: int = 1, token: int = 1) -> list[Batch]:
    """One step, answered at once; the passes it had."""
    step = scheduler.schedule()
    assert step is not None
    scheduler.collect(step, [answer(batch, accept_len, token) for batch in step.batches])
    return step.batches


def ids(batch: Batch) -> list[str]:
    return [work.request.id for work in batch.works]


def counts(batch: Batch) -> list[int]:
    return [work.num_tokens for work in batch.works]


def test_a_prompt_is_cut_into_chunks_and_then_decodes() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt_len=35))
    passes = [play(scheduler)[0] for _ in range(4)]
    assert [counts(one) for one in passes[:3]] == [[16], [16], [3]]
    assert passes[3].is_verify and counts(passes[3]) == [3], "a verify pass runs K + 1 tokens of each request"


def test_a_long_prompt_delays_decoding_requests_by_one_chunk_at_a_time() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("short", prompt_len=2, max_tokens=50))
    play(scheduler)
    scheduler.add(make_request("long", prompt_len=48))
    for _ in range(3):
        prefill, decode = play(scheduler)
        assert counts(prefill) == [16] and ids(decode) == ["short"]
    assert len(plan(scheduler)[0].works) == 2


def test_the_chunk_budget_is_shared_by_prompts() -> None:
    scheduler = make_scheduler()
    for name, length in (("a", 10), ("b", 3), ("c", 9)):
        scheduler.add(make_request(name, length))
    assert counts(plan(scheduler)[0]) == [10, 3, 3]


def test_a_token_that_stops_inside_an_accepted_run_cuts_the_output_there() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt_len=2, max_tokens=50))
    play(scheduler)
    step = scheduler.schedule()
    assert step is not None
    (output,) = scheduler.collect(step, [Outcome([[5, EOS, 7]], [2], [3], [[]], [True], 0.001)])
    assert isinstance(output, TokenOutput)
    assert output.token_ids == [5, EOS] and output.finish_reason == "stop" and output.stop_token_id is None
    assert (output.num_proposed, output.num_accepted) == (2, 2)
    assert not scheduler.has_work() and scheduler.pages.num_free == 40


def test_max_tokens_cuts_inside_an_accepted_run_and_a_stop_token_is_named() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("length", prompt_len=2, max_tokens=2))
    scheduler.add(make_request("stop", prompt_len=2, max_tokens=50, stop_token_ids=(6,)))
    play(scheduler)
    step = scheduler.schedule()
    assert step is not None and counts(step.batches[0]) == [3, 1], "no drafts for a request with two tokens to go"
    outcome = Outcome([[6, 6, 6], [5, 0, 0]], [1, 1], [3, 1], [[], []], [True, True], 0.001)
    stop, length = scheduler.collect(step, [outcome])
    assert isinstance(length, TokenOutput) and isinstance(stop, TokenOutput)
    assert length.token_ids == [5] and length.finish_reason == "length"
    assert stop.token_ids == [6] and stop.stop_token_id == 6
    assert scheduler.counters.num_proposed == 1, "drafts behind the end are not judged"


def test_ignore_eos_runs_on() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt_len=2, ignore_eos=True))
    play(scheduler, token=EOS)
    assert [request.output_ids for request in scheduler.running] == [[EOS]]


def test_the_youngest_is_preempted_when_pages_run_out_and_keeps_its_tokens() -> None:
    scheduler = make_scheduler(num_pages=11, chunked_prefill_size=64)
    old, young = make_request("old", 15, max_tokens=40), make_request("young", 14, max_tokens=40)
    scheduler.add(old)
    scheduler.add(young)
    while young.row is not None or not young.output_ids:
        play(scheduler, 3)
    assert old.row is not None and scheduler.waiting[0] is young
    assert young.num_computed == 0 and young.id not in scheduler.holdings and young.output_ids
    assert scheduler.counters.num_preemptions == 1


def test_known_ids_span_prompt_and_output() -> None:
    request = make_request("a", prompt_len=4)
    request.output_ids = [7, 8, 9]
    assert request.known_ids(2, 6) == [2, 3, 7, 8]
    assert request.known_ids(5, 9) == [8, 9]


def test_a_chunk_that_leaves_one_known_token_is_not_the_end_of_the_prompt() -> None:
    scheduler = make_scheduler(chunked_prefill_size=1)
    request = make_request("resumed", prompt_len=2)
    request.output_ids = [5]
    scheduler.add(request)
    for _ in range(3):
        (batch,) = play(scheduler)
        assert not batch.is_verify and counts(batch) == [1]
    assert plan(scheduler)[0].is_verify


@pytest.mark.parametrize("seed", range(20))
def test_free_and_held_pages_and_rows_add_up_after_any_history(seed: int) -> None:
    rng = random.Random(seed)
    mtp_step = rng.randrange(4)
    scheduler = make_scheduler(
        num_pages=rng.randint(19, 40), mtp_step=mtp_step, chunked_prefill_size=rng.choice([1, 5, 64])
    )
    names: list[str] = []
    for step in range(400):
        if rng.random() < 0.2:
            names.append(str(step))
            scheduler.add(make_request(names[-1], rng.randint(1, 60), max_tokens=rng.randint(1, 12)))
        if names and rng.random() < 0.05:
            scheduler.abort(rng.choice(names))
        if scheduler.has_work():
            play(scheduler, rng.randint(1, mtp_step + 1), token=rng.choice([1, 2, EOS]))
        check_ownership(scheduler)
    while scheduler.has_work():
        play(scheduler, token=EOS)
    assert scheduler.pages.num_free == scheduler.pages.count and scheduler.rows.num_free == scheduler.rows.count


def check_ownership(scheduler: Scheduler) -> None:
    limits = scheduler.limits
    held = [page for holding in scheduler.holdings.values() for page in holding.page_list]
    assert len(scheduler.holdings) == len(scheduler.running)
    assert len(held) == len(set(held)) and 0 not in held
    assert len(held) + scheduler.pages.num_free == scheduler.pages.count
    rows = [request.row for request in scheduler.running]
    assert len(rows) == len(set(rows)) and 0 not in rows
    assert len(rows) + scheduler.rows.num_free == scheduler.rows.count
    for request in scheduler.running:
        held_len = scheduler.holdings[request.id].num_pages * limits.page_size
        assert held_len >= request.num_computed + limits.mtp_step
    assert all(request.row is None for request in scheduler.waiting)


def test_a_preempted_request_comes_back_before_those_that_waited_behind_it() -> None:
    scheduler = make_scheduler(num_pages=11, chunked_prefill_size=64)
    for name in ("old", "young", "later"):
        scheduler.add(make_request(name, 14, max_tokens=40))
    while not scheduler.counters.num_preemptions:
        play(scheduler, 3)
    assert [request.id for request in scheduler.waiting] == ["young", "later"]


def test_nobody_is_admitted_into_pages_that_the_next_step_needs() -> None:
    scheduler = make_scheduler(num_pages=10, page_size=4, mtp_step=2, chunked_prefill_size=64)
    scheduler.add(make_request("old", 19))  # 19 + 5 positions: 6 pages
    scheduler.add(make_request("young", 11))  # 4 pages would fit, but old may need one more
    assert ids(plan(scheduler)[0]) == ["old"]


def test_prompt_tokens_are_counted_once_although_preemption_computes_them_again() -> None:
    scheduler = make_scheduler(num_pages=11, chunked_prefill_size=64)
    for name in ("old", "young"):
        scheduler.add(make_request(name, 15, max_tokens=20))
    while scheduler.has_work():
        play(scheduler, 3)
    assert scheduler.counters.num_preemptions and scheduler.counters.num_prompt_tokens == 30


def test_a_lower_priority_is_served_first_and_a_higher_one_is_preempted_first() -> None:
    scheduler = make_scheduler(max_running_requests=1)
    for name, priority in (("first", 0), ("late", 5), ("urgent", -1), ("second", 0)):
        request = make_request(name, 4, max_tokens=1)
        request.priority = priority
        scheduler.add(request)
    order = []
    while scheduler.has_work():
        order += ids(play(scheduler)[0])
    assert order == ["urgent", "first", "second", "late"]
    scheduler = make_scheduler(num_pages=11, chunked_prefill_size=64)
    for name, priority in (("background", 1), ("young", 0)):
        request = make_request(name, 15, max_tokens=40)
        request.priority = priority
        scheduler.add(request)
    while not scheduler.counters.num_preemptions:
        play(scheduler, 3)
    assert [request.id for request in scheduler.waiting] == ["background"]


def test_a_request_whose_time_is_over_ends_with_what_it_has() -> None:
    now = [0.0]
    limits = make_scheduler(max_running_requests=1).limits
    scheduler = Scheduler(limits, Planner(2, None, is_adaptive=False), clock=lambda: now[0])
    running, waiting = make_request("running", 4, max_tokens=50), make_request("waiting", 4)
    running.deadline, waiting.deadline = 10.0, 10.0
    scheduler.add(running)
    scheduler.add(waiting)
    play(scheduler)
    now[0] = 10.5
    assert scheduler.schedule() is None
    ended, failed = scheduler.take_notices()
    assert isinstance(ended, TokenOutput) and ended.finish_reason == "abort" and ended.token_ids == []
    assert isinstance(failed, Failed) and failed.error == "RequestTimeout" and failed.request_id == "waiting"
    assert not scheduler.has_work() and scheduler.pages.num_free == 40 and scheduler.counters.num_timeouts == 2


def test_a_step_is_planned_before_the_last_one_is_known_and_results_of_others_are_dropped() -> None:
    scheduler = make_scheduler()
    for name in ("a", "b"):
        scheduler.add(make_request(name, 4, max_tokens=3))
    play(scheduler)
    first, second, third = scheduler.schedule(), scheduler.schedule(), scheduler.schedule()
    assert first is not None and second is not None
    assert third is None, "each of two steps in flight gives one token at least, and there are two to go"
    scheduler.abort("a")
    for step in (first, second):
        assert ids(step.batches[0]) == ["a", "b"]
        (output,) = scheduler.collect(step, [answer(step.batches[0], 1)])
        assert output.request_id == "b"
    assert not scheduler.has_work()


def test_results_are_waited_for_while_a_token_of_a_masked_output_is_in_flight() -> None:
    scheduler = make_scheduler()
    masked = make_request("masked", prompt_len=20)
    masked.matcher = object()
    for request in (make_request("free", prompt_len=4), masked):
        scheduler.add(request)
    assert not scheduler.waits_for_results()
    steps = [scheduler.schedule()]
    assert not scheduler.waits_for_results(), "a chunk inside its prompt gives no token"
    steps.append(scheduler.schedule())
    assert scheduler.waits_for_results()
    for step in steps:
        assert step is not None
        scheduler.collect(step, [answer(batch, 1) for batch in step.batches])
    assert not scheduler.waits_for_results()


def test_a_preempted_request_is_not_admitted_before_its_step_in_flight_is_known() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4, max_tokens=20))
    play(scheduler)
    step = scheduler.schedule()
    assert step is not None
    scheduler._preempt(scheduler.running[0])
    assert scheduler.schedule() is None
    scheduler.collect(step, [answer(step.batches[0], 2)])
    (batch,) = plan(scheduler)
    assert batch.works[0].token_ids == (0, 1, 2, 3, 1, 1, 1) and batch.works[0].output_ids == (1, 1, 1)


def test_prompts_beside_decoding_requests_make_steps_take_about_twice_as_long_on_average() -> None:
    """A pass costs 40 ms and 1 ms per token: chunks of 80 tokens in every third step or so."""
    scheduler = make_scheduler(stream_slowdown=2.0, chunked_prefill_size=512, num_pages=1000, max_running_requests=2)
    short, long = (
        Request.create(Generate(name, [7] * length, SamplingParams(max_tokens=200)), (EOS,), max_model_len=3300)
        for name, length in (("short", 2), ("long", 3000))
    )

    def take_step() -> int:
        """Prompt tokens of the next step."""
        step = scheduler.schedule()
        assert step is not None
        sizes = [sum(counts(batch)) for batch in step.batches if not batch.is_verify]
        seconds = [0.04 + 0.001 * size for size in sizes] + [0.05]
        outcomes = zip(step.batches, seconds, strict=False)
        scheduler.collect(step, [replace(answer(batch, 1), seconds=took) for batch, took in outcomes])
        return sum(sizes)

    scheduler.add(short)
    while not short.is_decoding:
        take_step()
    scheduler.add(long)
    steps = []
    while not long.is_decoding:
        steps.append(take_step())
    places = [number for number, size in enumerate(steps) if size]
    assert steps[0] == 512 and {steps[place] for place in places[4:-1]} <= {79, 80}
    assert {after - before for before, after in pairwise(places[4:])} == {2, 3}


def test_chunks_short_enough_share_the_pass_of_those_that_decode_and_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30 ms for decoding alone and 1 ms per token: chunks of 30 tokens. The planner is told of decoding alone."""
    scheduler = make_scheduler(stream_slowdown=2.0, chunked_prefill_size=512, num_pages=1000, max_joint_tokens=64)
    short, long = (
        Request.create(Generate(name, [7] * length, SamplingParams(max_tokens=200)), (EOS,), max_model_len=3300)
        for name, length in (("short", 100), ("long", 2000))
    )

    def take_step() -> tuple[list[int], bool]:
        """Prompt tokens of the next step's passes, and whether they are one."""
        step = scheduler.schedule()
        assert step is not None and step.is_joint == (len(step.batches) > 1)
        sizes = [sum(counts(batch)) for batch in step.batches if not batch.is_verify]
        seconds = 0.001 * sum(sizes) + 0.03 * any(batch.is_verify for batch in step.batches)
        scheduler.collect(step, [replace(answer(batch, 1), seconds=seconds) for batch in step.batches])
        return sizes, step.is_joint

    told: list[float] = []
    monkeypatch.setattr(scheduler.planner, "record_step", lambda *args: told.append(args[3]))
    scheduler.add(short)
    assert take_step() == ([100], False), "nobody decodes yet"
    scheduler.add(long)
    steps = []
    while not long.is_decoding:
        steps.append(take_step())
    assert steps[0] == ([], False), "what decoding takes alone is not known yet"
    assert {sum(sizes) for sizes, is_joint in steps[1:-1] if is_joint} <= {23, 24, 25, 26, 27, 28, 29, 30}
    assert {sum(sizes) for sizes, is_joint in steps[30:-1] if is_joint} <= {29, 30}
    assert 3 <= sum(not is_joint for _, is_joint in steps[1:]) <= 8, "the seldomer the more is known"
    assert len(told) == len(steps) and told == pytest.approx([0.03] * len(told), rel=0.02)


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [([26], 64, [26]), ([30], 64, [20, 10]), ([47], 64, [20, 27]), ([26, 26], 64, [26]), ([26], 25, [20, 6])],
)
def test_what_is_less_than_a_chunk_and_a_half_is_computed_in_one(
    lengths: list[int], most: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of a prompt is not worth a pass, unless that would be longer than passes may be."""
    scheduler = make_scheduler(chunked_prefill_size=most, num_pages=1000)
    monkeypatch.setattr(scheduler._pace, "budget", lambda _widths, _waiting, _most: 20)
    for number, length in enumerate(lengths):
        scheduler.add(make_request(f"{number}", length))
    sizes = [sum(counts(batch)) for _ in expected for batch in play(scheduler) if not batch.is_verify]
    assert sizes == expected


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([26], [26]), ([28], [20, 8]), ([30], [20, 10]), ([10, 14], [24]), ([10, 18], [20, 8]), ([21, 7], [21, 7])],
)
def test_what_is_less_than_a_chunk_and_a_half_may_not_make_a_pass_too_long_to_share(
    lengths: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make_scheduler(chunked_prefill_size=64, num_pages=1000, max_joint_tokens=27)
    monkeypatch.setattr(scheduler._pace, "budget", lambda _widths, _waiting, _most: 20)
    for number, length in enumerate(lengths):
        scheduler.add(make_request(f"{number}", length))
    sizes = [sum(counts(batch)) for _ in expected for batch in play(scheduler) if not batch.is_verify]
    assert sizes == expected


def test_chunks_follow_limits_that_are_replaced() -> None:
    scheduler = make_scheduler(chunked_prefill_size=16)
    scheduler.limits = replace(scheduler.limits, chunked_prefill_size=5)
    scheduler.add(make_request("a", 12))
    assert counts(play(scheduler)[0]) == [5]


def test_logits_that_are_not_finite_are_computed_again_alone_and_then_fail() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("bad", 4, max_tokens=20))
    play(scheduler)
    step = scheduler.schedule()
    assert step is not None
    broken = replace(answer(step.batches[0], 1), is_finite=[False])
    assert scheduler.collect(step, [broken]) == []
    (request,) = scheduler.waiting
    assert request.is_plain and request.is_isolated and request.output_ids == [1]
    step = scheduler.schedule()
    assert step is not None and any(isinstance(op, ClearPage) for op in step.before)
    assert step.batches[0].works[0].token_ids == (0, 1, 2, 3, 1) and step.batches[0].works[0].num_drafts == 0
    (failed,) = scheduler.collect(step, [replace(answer(step.batches[0], 1), is_finite=[False])])
    assert isinstance(failed, Failed) and failed.error == "ModelFailure"
    assert scheduler.counters.faults["non_finite"] == 2 and not scheduler.running and not scheduler.waiting


@pytest.mark.parametrize(("is_adaptive", "widths_after"), [(True, [1] * 5), (False, [3] * 5)])
def test_64_steps_without_an_accepted_draft_are_a_fault_and_the_last_if_depths_adapt(
    is_adaptive: bool, widths_after: list[int]
) -> None:
    scheduler = Scheduler(make_scheduler(num_pages=100).limits, Planner(2, None, is_adaptive=is_adaptive))
    request = Request.create(Generate("a", [1], SamplingParams(max_tokens=90)), (EOS,), max_model_len=200)
    scheduler.add(request)
    play(scheduler)
    widths = [counts(play(scheduler, 1)[0])[0] for _ in range(70)]
    assert widths == [3] * 65 + widths_after and scheduler.counters.faults["zero_acceptance"] == 1
    assert request.is_plain == is_adaptive


def test_max_draft_bounds_the_drafts_of_one_request_and_equal_widths_lie_side_by_side() -> None:
    scheduler = make_scheduler(max_running_requests=4, mtp_step=2, num_pages=80)
    for name, max_draft in (("none", 0), ("all", None), ("one", 1), ("many", 9)):
        scheduler.add(make_request(name, 2, max_tokens=30, max_draft=max_draft))
    play(scheduler)
    (batch,) = plan(scheduler)
    assert dict(zip(ids(batch), counts(batch), strict=True)) == {"none": 1, "all": 3, "one": 2, "many": 3}
    assert counts(batch) == [3, 3, 2, 1]


def test_who_has_the_beginning_of_a_prompt_in_prefill_waits_for_it() -> None:
    scheduler = make_scheduler(num_checkpoints=8, num_pages=400, chunked_prefill_size=60)
    long = [7] * 150
    for name, prompt in (("first", long), ("same", [*long[:100], 1]), ("other", [5] * 20)):
        scheduler.add(Request.create(Generate(name, prompt, SamplingParams(max_tokens=2)), (EOS,), max_model_len=300))
    assert ids(plan(scheduler)[0]) == ["first"]
    assert [request.id for request in scheduler.running] == ["first", "other"]
