"""How responses are written: the whole one is what the events add up to, wherever steps cut it."""

import asyncio
import json
import re
import threading
from typing import Any

import httpx
import pytest

from server.api.chat_format import MessageRules
from server.api.generation import Generation
from server.api.response_answer import ResponseAnswer, ResponseJob
from server.api.response_store import ResponseStore
from server.api.terms import Terms
from server.messages import SamplingParams
from unit_tests.server.api.conftest import CALL, ScriptedServing, Serving
from unit_tests.server.api.test_responses import PATH, WEATHER
from unit_tests.server.fake_engine import BROKEN_ID, FOREVER_ID

# One letter per event, without `response.`
LETTERS = {
    "created": "c",
    "in_progress": "i",
    "output_item.added": "a",
    "content_part.added": "p",
    "output_text.delta": "d",
    "reasoning_text.delta": "d",
    "function_call_arguments.delta": "d",
    "output_text.done": "t",
    "reasoning_text.done": "t",
    "function_call_arguments.done": "t",
    "content_part.done": "q",
    "output_item.done": "z",
    "completed": "e",
    "incomplete": "e",
}
SEQUENCE = re.compile(r"ci((apd+tqz)|(ad*tz))*e")
TEXTS = [
    "Hi 中文😀\n",
    "It is cold.\n</think>\n\nZero 😀.",
    f"Look.</think>\n\nI look.\n\n{CALL}\n{CALL}",
    f"I look at it.{CALL}\nand then",
    f"a < b <think> c {CALL[:50]}",
    "",
]


def read_events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, whose names and numbers are checked."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.split("\n\n")
    assert blocks.pop() == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def join_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that the deltas add up to, which must be those that are told at their ends."""
    items: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            texts.append("")
        elif kind.endswith(".delta"):
            assert event["output_index"] == len(items)
            texts[-1] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == texts[-1]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == texts[-1]
        elif kind == "output_item.done":
            items.append(event["item"])
            item = items[-1]
            told = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
            assert told == texts[-1]
    return items


def without_ids(value: Any) -> Any:
    """What does not differ between two answers to the same request."""
    if isinstance(value, list):
        return [without_ids(each) for each in value]
    if not isinstance(value, dict):
        return value
    hidden = ("id", "call_id", "created_at", "completed_at", "item_id")
    return {name: without_ids(each) for name, each in value.items() if name not in hidden}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_events_add_up_to_the_whole_response(scripted: ScriptedServing, text: str, thinks: bool, ends: bool) -> None:
    scripted.say(text + ("" if ends else "x"), ends)
    body = {
        "input": "hi",
        "tools": [WEATHER],
        "reasoning": {"effort": "low" if thinks else "none"},
        "include": ["message.output_text.logprobs"],
    }
    whole = scripted.http.post(PATH, json=body).json()
    assert whole["status"] == ("completed" if ends else "incomplete")
    for _ in range(4):
        events = read_events(scripted.http.post(PATH, json={**body, "stream": True}))
        assert SEQUENCE.fullmatch("".join(LETTERS[event["type"].removeprefix("response.")] for event in events))
        final = events[-1]["response"]
        assert events[-1]["type"] == f"response.{whole['status']}"
        assert without_ids(final) == without_ids(whole)
        assert join_events(events) == final["output"]
        assert events[0]["response"]["output"] == []
        assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"


def test_scores_are_those_of_the_tokens_of_the_text(scripted: ScriptedServing) -> None:
    scripted.say(f"Look.</think>Hello{CALL}\nBye")
    body = {"input": "hi", "tools": [WEATHER], "reasoning": {"effort": "low"}, "top_logprobs": 1}
    output = scripted.http.post(PATH, json=body).json()["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "message"]
    parts = [item["content"][0] for item in output if item["type"] == "message"]
    assert [part["text"] for part in parts] == ["Hello", "Bye"]
    told = ["".join(entry["token"] for entry in part["logprobs"]) for part in parts]
    assert told == ["Hello", "\nBye<|im_end|>"]
    assert all(len(entry["top_logprobs"]) == 1 for part in parts for entry in part["logprobs"])


@pytest.mark.parametrize(("fields", "is_apart"), [({}, False), ({"top_logprobs": 0}, True)])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_with_many_scores_is_written_off_the_event_loop_while_the_response_is_to_be_found(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], is_apart: bool, stream: bool
) -> None:
    found, write = [], ResponseAnswer._write

    def record(answer: ResponseAnswer, response: dict[str, Any]) -> Any:
        found.append((threading.current_thread().name.startswith("reader"), list(answer._running) == [answer.id]))
        return write(answer, response)

    monkeypatch.setattr(ResponseAnswer, "_write", record)
    monkeypatch.setattr("server.api.generation.MANY_SCORES", 1)
    answer = serving.http.post(PATH, json={"input": "hi", "max_output_tokens": 16, "stream": stream, **fields})
    whole = read_events(answer)[-1]["response"] if stream else answer.json()
    assert found == [(is_apart, True)]
    assert serving.http.get(f"{PATH}/{whole['id']}").json() == whole


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        ("Look.</think>A <tool_call> is markup.", ["A <tool_call> is markup.<|im_end|>"]),
        (f"Look.</think>A <tool_call> is{CALL}Bye", ["A <tool_call> is", "Bye<|im_end|>"]),
        (f"Look.</think>A{CALL.removeprefix('<tool_call>')}B{CALL}C", ["A", "B", "C<|im_end|>"]),
        (f"Look. <tool_call> is{CALL}Bye", ["Bye<|im_end|>"]),
    ],
)
def test_scores_are_those_of_their_own_text_whatever_looks_like_a_call(
    scripted: ScriptedServing, text: str, contents: list[str]
) -> None:
    scripted.say(text)
    body = {"input": "hi", "tools": [WEATHER], "reasoning": {"effort": "low"}, "top_logprobs": 0}
    output = scripted.http.post(PATH, json=body).json()["output"]
    parts = [item["content"][0] for item in output if item["type"] == "message"]
    assert [part["text"] for part in parts] == [content.removesuffix("<|im_end|>") for content in contents]
    assert ["".join(entry["token"] for entry in part["logprobs"]) for part in parts] == contents


def make_answer(
    serving: Serving, prompt: list[int], running: dict[str, ResponseAnswer], max_tokens: int | None = None
) -> tuple[ResponseAnswer, ResponseStore]:
    """An answer whose model repeats the prompt."""
    job = ResponseJob(
        prompts=[prompt],
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        n=1,
        terms=Terms(),
        stream=True,
        rules=MessageRules(),
        settings={},
        items=[b'{"role":"user","content":"hi"}'],
        is_stored=True,
    )
    services, store = serving.services, ResponseStore()
    generation = Generation(job, services.tokenizer, services.client, services.metrics, "x")
    return ResponseAnswer(services, job, generation, store, running), store


def decode(event: bytes) -> dict[str, Any]:
    """What an event says."""
    return json.loads(event.split(b"data: ")[1])


def test_a_response_that_is_cancelled_ends_where_it_is(make_serving) -> None:
    serving = make_serving()
    running: dict[str, ResponseAnswer] = {}

    async def run() -> list[dict[str, Any]]:
        answer, store = make_answer(serving, [FOREVER_ID, 70], running)
        found = []
        async with serving.delivering():
            async for event in answer.events():
                found.append(decode(event))
                if found[-1]["type"] == "response.output_text.delta" and running:
                    assert running[answer.id].describe("in_progress")["output"][0]["status"] == "in_progress"
                    answer.cancel()
        stored = store.get(answer.id)
        assert json.loads(stored.body) == found[-1]["response"]
        assert json.loads(stored.input_items) == [json.loads(item) for item in answer.items]
        assert [json.loads(item) for item in stored.own_items.values()] == found[-1]["response"]["output"]
        return found

    events = asyncio.run(run())
    assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.incomplete", "cancelled")
    text = "".join(event.get("delta", "") for event in events)
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == text != ""
    assert running == {}
    assert serving.client.num_in_flight == 0


def test_a_failure_is_the_last_event(make_serving) -> None:
    serving = make_serving()

    async def run() -> list[dict[str, Any]]:
        async with serving.delivering():
            answer, _ = make_answer(serving, [BROKEN_ID, 70], {})
            return [decode(event) async for event in answer.events()]

    events = asyncio.run(run())
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["status"] == "failed"
    assert "not finite" in events[-1]["response"]["error"]["message"]


def test_a_client_that_goes_ends_the_response(make_serving) -> None:
    serving = make_serving()
    running: dict[str, ResponseAnswer] = {}

    async def run() -> None:
        async with serving.delivering():
            answer, _ = make_answer(serving, [FOREVER_ID, 70], running)
            events = answer.events()
            await anext(events)
            assert list(running) == [answer.id]
            await events.aclose()

    asyncio.run(run())
    assert running == {}
    assert serving.client.num_in_flight == 0
