"""What pauses and updates ask of admission; the rest is tested through the scheduler's steps."""

from server.messages import TokenOutput
from unit_tests.server.router.test_scheduler import make_request, make_scheduler, plan, play


def test_whoever_is_held_back_waits_and_keeps_the_place_it_came_for() -> None:
    scheduler = make_scheduler(max_running_requests=1)
    scheduler.add(make_request("runs", 4))
    play(scheduler)
    scheduler.hold_back({"on its way"})
    for name in ("late", "later"):
        scheduler.add(make_request(name, 4))
    scheduler.add(make_request("on its way", 4))
    assert scheduler.num_waiting == 3 and scheduler.in_flight() == {"runs", "on its way"}
    scheduler.abort("later")
    assert "later" not in scheduler and "late" in scheduler
    scheduler.abort("runs")
    (batch,) = plan(scheduler)
    assert [work.request.id for work in batch.works] == ["on its way"]
    scheduler.abort("on its way")
    assert plan(scheduler) == []
    scheduler.let_in()
    (batch,) = plan(scheduler)
    assert [work.request.id for work in batch.works] == ["late"]


def test_the_time_of_those_held_back_goes_on() -> None:
    scheduler = make_scheduler()
    now = [0.0]
    scheduler.clock = lambda: now[0]
    scheduler.hold_back(())
    request = make_request("late", 4)
    request.deadline = 5.0
    scheduler.add(request)
    assert not scheduler.has_late_requests() and not scheduler.has_work()
    now[0] = 6.0
    assert scheduler.has_late_requests()
    scheduler.end_late_requests()
    assert [notice.request_id for notice in scheduler.take_notices()] == ["late"] and not scheduler.num_waiting


def test_all_end_with_what_they_have() -> None:
    scheduler = make_scheduler(max_running_requests=1)
    for name in ("runs", "waits"):
        scheduler.add(make_request(name, 4))
    play(scheduler)
    assert scheduler.num_begun == 1
    scheduler.hold_back(())
    scheduler.add(make_request("held", 4))
    assert scheduler.end_all() == 3
    notices = scheduler.take_notices()
    assert {(notice.request_id, notice.finish_reason) for notice in notices if isinstance(notice, TokenOutput)} == {
        (name, "abort") for name in ("runs", "waits", "held")
    }
    assert not scheduler.running and not scheduler.num_waiting and scheduler.rows.num_free == 1


def test_those_that_ran_wait_again_in_their_places_and_leave_nothing() -> None:
    scheduler = make_scheduler(num_checkpoints=4, checkpoint_bytes=1, page_bytes=1, mtp_step=0)
    for name in ("first", "second"):
        scheduler.add(make_request(name, 20))
    for _ in range(4):
        play(scheduler)
    requests = list(scheduler.running)
    assert len(requests) == 2
    scheduler.flush_cache()
    assert scheduler.retract() == 2
    scheduler.cache.begin_step()
    assert scheduler.waiting == requests and scheduler.pages.num_free == scheduler.pages.count
    assert all(request.row is None and request.output_ids for request in requests)
    (batch,) = plan(scheduler)
    assert batch.works[0].start == 0 and not batch.is_verify


def test_a_new_version_drops_drafts_and_forgets_refusals() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4))
    for _ in range(2):
        play(scheduler)
    (request,) = scheduler.running
    request.num_refused, request.is_plain = 64, True
    before = request.speculation
    assert request.num_drafts == 2
    scheduler.flush_cache()
    scheduler.start_version()
    assert (request.num_drafts, request.num_refused, request.is_plain) == (0, 0, False)
    assert request.speculation is not before
    (batch,) = plan(scheduler)
    assert batch.works[0].num_tokens == 1


def test_nobody_waits_for_a_prefix_that_older_weights_compute() -> None:
    scheduler = make_scheduler(num_checkpoints=4, checkpoint_bytes=1, page_bytes=1, page_size=8, num_pages=80)
    prompt_len = 60 + 64
    scheduler.add(make_request("computes", prompt_len))
    play(scheduler)
    scheduler.add(make_request("same", prompt_len))
    play(scheduler)
    assert len(scheduler.running) == 1  # it can be reused in a moment
    scheduler.flush_cache()
    play(scheduler)
    assert len(scheduler.running) == 2
