"""Events come in any pieces, tokens are counted by the best that the server tells, and times are those of events."""

import json
from typing import Any

import pytest

from benchmarks.serving.answer import Answer, Arrival, EventSplitter, RequestFailed, error_message

USAGE = {"prompt_tokens": 5, "completion_tokens": 0}


def text_event(text: str, num_so_far: int | None = None, tokens: int = 0, finish: str | None = None) -> dict[str, Any]:
    logprobs = {"tokens": ["x"] * tokens} if tokens else None
    event: dict[str, Any] = {"choices": [{"text": text, "logprobs": logprobs, "finish_reason": finish}]}
    return event if num_so_far is None else event | {"usage": USAGE | {"completion_tokens": num_so_far}}


def last_usage(count: int) -> dict[str, Any]:
    return {"choices": [], "usage": USAGE | {"completion_tokens": count}}


def taken(*timed: tuple[float, dict[str, Any]], sent: float = 1.0) -> Answer:
    answer = Answer(0, 0, sent)
    for seconds, event in timed:
        answer.take(json.dumps(event).encode(), seconds)
    return answer


def test_events_are_cut_the_same_however_the_bytes_come() -> None:
    stream = b': keep-alive\r\n\r\nevent: x\r\ndata: {"a": 1}\r\n\r\ndata:{"b": 2}\n\ndata: [DONE]\n\n'
    expected = [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]
    for size in range(1, len(stream) + 1):
        splitter = EventSplitter()
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert [event for piece in pieces for event in splitter.push(piece)] == expected


def test_usage_in_every_event_tells_how_many_tokens_came() -> None:
    answer = taken((1.5, text_event(" a", 1)), (2.0, text_event(" b c d", 4)), (2.25, text_event("", 5, finish="stop")))
    assert answer.arrivals == [Arrival(1.5, 1), Arrival(2.0, 3), Arrival(2.25, 1)]
    assert (answer.counting, answer.event_counting) == ("usage", "continuous usage")
    assert (answer.ttft, answer.e2e, answer.tpot, answer.num_tokens) == (0.5, 1.25, 0.1875, 5)
    assert answer.gaps == [(0.5, 3), (0.25, 1)]
    assert answer.text == " a b c d" and answer.finish_reason == "stop" and answer.prompt_tokens == 5


def test_an_event_without_new_tokens_is_no_arrival() -> None:
    answer = taken((1.5, text_event("", 0)), (2.0, text_event(" a", 2)), (3.0, text_event("b", 2, finish="length")))
    assert answer.arrivals == [Arrival(2.0, 2)] and answer.ttft == 1.0 and answer.gaps == []


def test_logprobs_tell_it_where_usage_does_not() -> None:
    answer = taken((2.0, text_event(" a", tokens=1)), (2.5, text_event(" b c", tokens=2)), (2.5, last_usage(3)))
    assert (answer.counting, answer.event_counting) == ("usage", "logprobs")
    assert answer.arrivals == [Arrival(2.0, 1), Arrival(2.5, 2)]
    without_usage = taken((2.0, text_event(" a", tokens=1)), (2.5, text_event(" b c", tokens=2)))
    assert (without_usage.counting, without_usage.num_tokens) == ("logprobs", 3)


def test_else_an_event_with_text_is_a_token_and_only_the_sum_is_known_from_usage() -> None:
    events = [(2.0, text_event(" a b")), (3.0, text_event(" c d")), (3.0, text_event("", finish="stop"))]
    answer = taken(*events, (3.0, last_usage(5)))
    assert (answer.counting, answer.event_counting, answer.num_tokens) == ("usage", "events", 5)
    assert answer.arrivals == [Arrival(2.0, 1), Arrival(3.0, 1)] and answer.tpot == 0.25
    assert (taken(*events).counting, taken(*events).num_tokens) == ("events", 2)


def test_one_token_has_no_time_per_further_token() -> None:
    answer = taken((2.0, text_event(" a", 1, finish="length")))
    assert answer.tpot is None and answer.ttft == answer.e2e == 1.0


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_a_chat_s_role_is_no_token_and_its_thoughts_are(name: str) -> None:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, {name: "Hm"}, {"content": "Yes"}, {}]
    events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    answer = taken(*zip((1.5, 2.0, 3.0, 4.0), events, strict=True))
    assert answer.arrivals == [Arrival(2.0, 1), Arrival(3.0, 1)]
    assert (answer.thought, answer.text) == ("Hm", "Yes")


def test_tool_calls_are_tokens_and_cached_prompt_tokens_are_noted() -> None:
    call = {"choices": [{"delta": {"tool_calls": [{"index": 0}]}, "finish_reason": None}]}
    details = {"prompt_tokens_details": {"cached_tokens": 3}}
    answer = taken((2.0, call), (2.0, {"choices": [], "usage": USAGE | details}))
    assert answer.arrivals == [Arrival(2.0, 1)] and answer.cached_tokens == 3


@pytest.mark.parametrize(
    "data", [b"nonsense", b"[1]", b'{"choices": [3]}', b'{"usage": {"prompt_tokens": 1}}', b"\xff"]
)
def test_an_event_that_is_not_openai_s_is_a_failure(data: bytes) -> None:
    with pytest.raises(RequestFailed, match="broken event"):
        Answer(0, 0, 0.0).take(data, 1.0)


@pytest.mark.parametrize("error", [{"message": "out of memory"}, "out of memory"])
def test_an_error_in_the_stream_is_a_failure(error: object) -> None:
    with pytest.raises(RequestFailed, match="error in the stream: out of memory"):
        taken((1.0, {"error": error}))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": {"message": "no such model", "code": 404}}', "no such model"),
        ('{"object": "error", "message": "too long"}', "too long"),
        ('{"detail": "Not Found"}', "{'detail': 'Not Found'}"),
        ("Unauthorized", "Unauthorized"),
        ("{}", "{}"),
    ],
)
def test_an_error_s_body_is_read_for_its_message(body: str, message: str) -> None:
    assert error_message(body) == message
