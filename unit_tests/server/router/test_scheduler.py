import random

import pytest

from server.config import Limits
from server.messages import Generate, SamplingParams
from server.request import Batch, Request
from server.router.scheduler import Scheduler

EOS = 99


def make_scheduler(**sizes: int) -> Scheduler:
    defaults = {
        "max_running_requests": 4,
        "chunked_prefill_size": 16,
        "page_size": 4,
        "num_pages": 40,
        "mtp_step": 2,
    }
    return Scheduler(Limits(**defaults | sizes))


def make_request(name: str, prompt_len: int, max_tokens: int = 8, **sampling: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Request.create(Generate(name, list(range(prompt_len)), params), (EOS,), max_model_len=64)


def play(scheduler: Scheduler, batch: Batch, accept_len: int, token: int = 1) -> list:
    """Answer a batch as the device would: every request emits accept_len tokens."""
    size = len(batch.requests)
    accepts = [accept_len if batch.is_verify else int(batch.ends_prompt(i)) for i in range(size)]
    return scheduler.collect(batch, [[token] * 3] * size, accepts, [[] for _ in range(size)])


def test_a_prompt_is_cut_into_chunks_and_then_decodes() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt_len=35))
    counts = []
    while not (batch := scheduler.schedule()[0]).is_verify:
        counts += batch.token_counts
        play(scheduler, batch, 1)
    assert counts == [16, 16, 3]
    assert batch.token_counts == [3], "a verify batch runs K + 1 tokens of each request"


def test_a_long_prompt_delays_decoding_requests_by_one_chunk_at_a_time() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("short", prompt_len=2, max_tokens=50))
    play(scheduler, scheduler.schedule()[0], 1)
    scheduler.add(make_request("long", prompt_len=48))
    for _ in range(3):
        prefill, decode = scheduler.schedule()
        assert prefill.token_counts == [16] and [request.id for request in decode.requests] == ["short"]
        play(scheduler, prefill, 1)
        play(scheduler, decode, 1)
    assert len(scheduler.schedule()[0].requests) == 2


def test_the_chunk_budget_is_shared_by_prompts() -> None:
    scheduler = make_scheduler()
    for name, length in (("a", 10), ("b", 3), ("c", 9)):
        scheduler.add(make_request(name, length))
    assert scheduler.schedule()[0].token_counts == [10, 3, 3]


def test_a_token_that_stops_inside_an_accepted_run_cuts_the_output_there() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt_len=2, max_tokens=50))
    play(scheduler, scheduler.schedule()[0], 1)
    (output,) = scheduler.collect(scheduler.schedule()[0], [[5, EOS, 7]], [3], [[]])
    assert output.token_ids == [5, EOS] and output.finish_reason == "stop" and output.stop_token_id is None
    assert (output.num_proposed, output.num_accepted) == (2, 2)
    assert not scheduler.has_work() and scheduler.pages.num_free == 40


def test_max_tokens_cuts_inside_an_accepted_run_and_a_stop_token_is_named() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("length", prompt_len=2, max_tokens=3))
    scheduler.add(make_request("stop", prompt_len=2, max_tokens=50, stop_token_ids=(6,)))
    play(scheduler, scheduler.schedule()[0], 1)
    length, stop = scheduler.collect(scheduler.schedule()[0], [[5, 5, 5], [6, 6, 6]], [3, 3], [[], []])
    assert length.token_ids == [5, 5] and length.finish_reason == "length"
    assert stop.token_ids == [6] and stop.stop_token_id == 6
    assert scheduler.counters.num_proposed == 3, "drafts behind the end are not judged"


def test_ignore_eos_runs_on() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt_len=2, ignore_eos=True))
    (output,) = play(scheduler, scheduler.schedule()[0], 1, token=EOS)
    assert output.finish_reason is None


def test_the_youngest_is_preempted_when_pages_run_out_and_keeps_its_tokens() -> None:
    scheduler = make_scheduler(num_pages=11, chunked_prefill_size=64)
    old, young = make_request("old", 15, max_tokens=40), make_request("young", 14, max_tokens=40)
    scheduler.add(old)
    scheduler.add(young)
    while young.row is not None or not young.output_ids:
        for batch in scheduler.schedule():
            play(scheduler, batch, 3)
    assert old.row is not None and scheduler.waiting[0] is young
    assert young.num_computed == 0 and young.pages == [] and young.output_ids
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
        (batch,) = scheduler.schedule()
        assert not batch.is_verify and batch.token_counts == [1]
        play(scheduler, batch, 1)
    assert scheduler.schedule()[0].is_verify


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
        for batch in scheduler.schedule():
            play(scheduler, batch, rng.randint(1, mtp_step + 1), token=rng.choice([1, 2, EOS]))
        check_ownership(scheduler)
    while scheduler.has_work():
        for batch in scheduler.schedule():
            play(scheduler, batch, 1, token=EOS)
    assert scheduler.pages.num_free == scheduler.pages.count and scheduler.rows.num_free == scheduler.rows.count


def check_ownership(scheduler: Scheduler) -> None:
    limits = scheduler.limits
    held = [page for request in scheduler.running for page in request.pages]
    assert len(held) == len(set(held)) and 0 not in held
    assert len(held) + scheduler.pages.num_free == scheduler.pages.count
    rows = [request.row for request in scheduler.running]
    assert len(rows) == len(set(rows)) and 0 not in rows
    assert len(rows) + scheduler.rows.num_free == scheduler.rows.count
    for request in scheduler.running:
        assert len(request.pages) * limits.page_size >= request.num_computed + limits.mtp_step
    assert all(request.row is None and not request.pages for request in scheduler.waiting)


def test_a_preempted_request_comes_back_before_those_that_waited_behind_it() -> None:
    scheduler = make_scheduler(num_pages=11, chunked_prefill_size=64)
    for name in ("old", "young", "later"):
        scheduler.add(make_request(name, 14, max_tokens=40))
    while not scheduler.counters.num_preemptions:
        for batch in scheduler.schedule():
            play(scheduler, batch, 3)
    assert [request.id for request in scheduler.waiting] == ["young", "later"]


def test_nobody_is_admitted_into_pages_that_the_next_step_needs() -> None:
    scheduler = make_scheduler(num_pages=10, page_size=4, mtp_step=2, chunked_prefill_size=64)
    scheduler.add(make_request("old", 19))  # 19 + 5 positions: 6 pages
    scheduler.add(make_request("young", 11))  # 4 pages would fit, but old may need one more
    assert [request.id for request in scheduler.schedule()[0].requests] == ["old"]


def test_prompt_tokens_are_counted_once_although_preemption_computes_them_again() -> None:
    scheduler = make_scheduler(num_pages=11, chunked_prefill_size=64)
    for name in ("old", "young"):
        scheduler.add(make_request(name, 15, max_tokens=20))
    while scheduler.has_work():
        for batch in scheduler.schedule():
            play(scheduler, batch, 3)
    assert scheduler.counters.num_preemptions and scheduler.counters.num_prompt_tokens == 30
