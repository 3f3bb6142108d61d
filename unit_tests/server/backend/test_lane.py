"""What is submitted runs in order, errors come with the result, and spans can be loaded into a trace viewer."""

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from server.backend.lane import Lane, NoTrace, Readback, Trace
from server.messages import SamplingParams
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.engines import make_engine, run

BOTH = pytest.mark.parametrize("is_threaded", [False, True])


def fail(message: str) -> None:
    raise ValueError(message)


@BOTH
def test_everything_runs_in_the_order_of_submission(is_threaded: bool) -> None:
    lane, seen = Lane(is_threaded), []

    def note(number: int, factor: int) -> int:
        seen.append(number)
        return number * factor

    futures = [lane.submit(note, number, 3) for number in range(200)]
    assert [future.result() for future in futures] == [3 * number for number in range(200)]
    assert seen == list(range(200))
    lane.close()


def test_an_error_in_the_thread_comes_with_its_own_result_and_the_lane_goes_on() -> None:
    lane = Lane(is_threaded=True)
    before, broken, after = lane.submit(str, 1), lane.submit(fail, "no"), lane.submit(str, 2)
    with pytest.raises(ValueError, match="no"):
        broken.result()
    assert (before.result(), after.result()) == ("1", "2")
    lane.close()


def test_without_a_thread_it_has_run_when_submit_returns_in_the_callers_thread() -> None:
    future = Lane(is_threaded=False).submit(threading.get_ident)
    assert future.done() and future.result() == threading.get_ident()


def test_with_a_thread_the_caller_goes_on_and_all_runs_in_one_other_thread() -> None:
    lane, may_go = Lane(is_threaded=True), threading.Event()
    first = lane.submit(may_go.wait)
    idents = [lane.submit(threading.get_ident) for _ in range(20)]
    assert not first.done() and not any(future.done() for future in idents), "all wait for the first"
    may_go.set()
    assert first.result() is True
    threads = {future.result() for future in idents}
    assert len(threads) == 1 and threading.get_ident() not in threads
    lane.close()


def test_closing_waits_for_what_was_submitted_and_ends_the_thread() -> None:
    lane = Lane(is_threaded=True)
    thread = lane.submit(threading.current_thread).result()
    assert thread.is_alive() and thread.name.startswith("tandem-device")
    futures = [lane.submit(pow, 2, number) for number in range(50)]
    lane.close()
    assert all(future.done() for future in futures) and not thread.is_alive()


def test_closing_a_lane_without_a_thread_does_nothing() -> None:
    lane = Lane(is_threaded=False)
    lane.close()
    assert lane.submit(int, "7").result() == 7


def test_a_readback_gives_lists_in_the_order_of_the_tensors() -> None:
    readback = Readback(torch.tensor([[1, 2], [3, 4]]), torch.tensor([5]), torch.tensor([True, False]))
    assert readback.read() == [[[1, 2], [3, 4]], [5], [True, False]]


def test_a_span_is_a_complete_event_with_its_track_and_arguments() -> None:
    trace = Trace()
    with trace.span("verify", "device", rows=3):
        pass
    [event] = json.loads(json.dumps(trace.events))
    assert set(event) == {"name", "ph", "pid", "tid", "args", "ts", "dur"}
    assert (event["name"], event["ph"], event["tid"], event["args"]) == ("verify", "X", "device", {"rows": 3})
    assert event["ts"] > 0 and 0 <= event["dur"] < 1e6


def ends(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def test_spans_inside_a_span_lie_inside_its_time_and_do_not_overlap() -> None:
    trace = Trace()
    with trace.span("outer", "host"):
        for name in ("a", "b"):
            with trace.span(name, "host"):
                sum(range(1000))
    a, b, outer = trace.events
    assert [event["name"] for event in trace.events] == ["a", "b", "outer"]
    assert outer["ts"] <= a["ts"] < ends(a) <= b["ts"] < ends(b)
    assert ends(b) <= ends(outer) + 1e-3  # microseconds, added up in floating point


def test_a_span_that_fails_is_recorded_and_its_error_goes_on() -> None:
    trace = Trace()
    with pytest.raises(ValueError, match="broken"), trace.span("step", "device"):
        fail("broken")
    assert [event["name"] for event in trace.events] == ["step"]


def test_spans_of_two_threads_are_all_recorded() -> None:
    trace, lane = Trace(), Lane(is_threaded=True)

    def record(track: str) -> None:
        for number in range(300):
            with trace.span(str(number), track):
                pass

    future = lane.submit(record, "device")
    record("host")
    future.result()
    lane.close()
    for track in ("host", "device"):
        events = [event for event in trace.events if event["tid"] == track]
        assert [event["name"] for event in events] == [str(number) for number in range(300)]
        assert all(ends(one) <= other["ts"] + 1e-3 for one, other in itertools.pairwise(events))


def test_no_trace_records_nothing_and_hides_no_error() -> None:
    with NoTrace().span("verify", "device", rows=3) as nothing:
        assert nothing is None
    with pytest.raises(ValueError, match="broken"), NoTrace().span("step", "device"):
        fail("broken")


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_an_engines_passes_lie_inside_its_steps(overlap: str, tmp_path: Path) -> None:
    engine = make_engine(make_checkpoint(tmp_path, num_layers=4), mtp_step=2, overlap=overlap)
    trace = engine.trace = Trace()
    run(engine, [[1, 2, 3], [4]], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    engine.lane.close()
    by_name = {name: [one for one in trace.events if one["name"] == name] for name in {e["name"] for e in trace.events}}
    assert set(by_name) == {"schedule", "wait", "collect", "step", "prefill", "verify", "draft"}
    assert {one["tid"] for name in ("schedule", "wait", "collect") for one in by_name[name]} == {"host"}
    steps = by_name["step"]
    for name in ("prefill", "verify", "draft"):
        for one in by_name[name]:
            assert one["tid"] == "device"
            assert sum(step["ts"] <= one["ts"] and ends(one) <= ends(step) + 1e-3 for step in steps) == 1
    assert sum(step["args"]["passes"] for step in steps) == len(by_name["prefill"]) + len(by_name["verify"])
    assert [one["args"]["rows"] for one in by_name["prefill"]] == [4]
    assert len(by_name["wait"]) == len(by_name["collect"]) == len(steps) <= len(by_name["schedule"])


def test_without_a_thread_an_error_comes_at_once() -> None:
    with pytest.raises(ValueError, match="no"):
        Lane(is_threaded=False).submit(fail, "no")
