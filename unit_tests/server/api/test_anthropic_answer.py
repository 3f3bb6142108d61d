"""How Anthropic's messages are written: the whole one is what the events add up to, wherever steps cut it."""

import asyncio
import json
import re
from typing import Any

import httpx
import pytest

from server.api.anthropic_answer import MessageAnswer
from server.api.chat import ChatJob
from server.api.chat_format import MessageRules
from server.api.generation import Generation
from server.api.terms import Terms
from server.api.transport import EventStream
from server.messages import SamplingParams
from unit_tests.server.api.conftest import CALL, ScriptedServing
from unit_tests.server.api.test_response_answer import TEXTS, without_ids
from unit_tests.server.fake_engine import BROKEN_ID

PATH = "/v1/messages"
WEATHER = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}
LETTERS = {
    "message_start": "s",
    "ping": "p",
    "content_block_start": "b",
    "content_block_delta": "d",
    "content_block_stop": "e",
    "message_delta": "m",
    "message_stop": "z",
}


def read_events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, whose names are checked."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.split("\n\n")
    assert blocks.pop() == ""
    events = [json.loads(block.split("\n")[1].removeprefix("data: ")) for block in blocks]
    assert [block.split("\n")[0] for block in blocks] == [f"event: {event['type']}" for event in events]
    return events


def join_events(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that events add up to, as a client joins them."""
    message: dict[str, Any] = {**events[0]["message"], "content": []}
    arguments = ""
    for event in events:
        kind = event["type"]
        if kind == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(dict(event["content_block"]))
            arguments = ""
        elif kind == "content_block_delta":
            delta, block = event["delta"], message["content"][event["index"]]
            assert event["index"] == len(message["content"]) - 1
            arguments += delta.get("partial_json", "")
            for name in ("text", "thinking", "signature"):
                if name in delta:
                    block[name] += delta[name]
        elif kind == "content_block_stop" and message["content"][-1]["type"] == "tool_use":
            message["content"][-1]["input"] = json.loads(arguments) if arguments.endswith("}") else {}
        elif kind == "message_delta":
            message.update(event["delta"])
            message["usage"] = event["usage"]
    return message


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_events_add_up_to_the_whole_message(scripted: ScriptedServing, text: str, thinks: bool, ends: bool) -> None:
    scripted.say(text + ("" if ends else "x"), ends)
    num_tokens = len(scripted.engine.script)
    body = {
        **BODY,
        "max_tokens": 200 if ends else num_tokens,
        "tools": [WEATHER],
        "thinking": {"type": "enabled" if thinks else "disabled"},
    }
    whole = scripted.http.post(PATH, json=body).json()
    assert (whole["usage"]["output_tokens_details"]["thinking_tokens"] > 0) is thinks
    has_call = any(block["type"] == "tool_use" for block in whole["content"])
    assert whole["stop_reason"] == ("max_tokens" if not ends else "tool_use" if has_call else "end_turn")
    for _ in range(4):
        events = read_events(scripted.http.post(PATH, json={**body, "stream": True}))
        assert re.fullmatch("sp(bd+e|be)*mz", "".join(LETTERS[event["type"]] for event in events))
        assert without_ids(join_events(events)) == without_ids(whole)


def test_arguments_that_were_cut_off_are_none(scripted: ScriptedServing) -> None:
    scripted.say(CALL)
    body = {**BODY, "tools": [WEATHER], "max_tokens": len(scripted.tokenizer.encode(CALL[: CALL.index("lo\n")]))}
    message = scripted.http.post(PATH, json=body).json()
    assert (message["content"][0]["input"], message["stop_reason"]) == ({}, "max_tokens")


def test_arguments_are_told_as_they_came(scripted: ScriptedServing) -> None:
    scripted.say(CALL.replace("\n3\n", f"\n{10**30}\n"))
    answer = scripted.http.post(PATH, json={**BODY, "tools": [WEATHER]})
    assert answer.json()["content"][0]["input"] == {"city": "Oslo", "days": 10**30}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_is_named_and_cut(scripted: ScriptedServing, stream: bool) -> None:
    scripted.say("the quick brown fox")
    answer = scripted.http.post(PATH, json={**BODY, "stop_sequences": ["zzz", " brown"], "stream": stream})
    message = join_events(read_events(answer)) if stream else answer.json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", " brown")
    assert message["content"] == [{"type": "text", "text": "the quick"}]


def test_an_answer_that_fills_the_context_says_so(make_serving) -> None:
    serving = make_serving()
    with serving.listening():
        body = {**BODY, "messages": [{"role": "user", "content": "the fox " * 20}], "max_tokens": 200}
        message = serving.http.post(PATH, json={**body, "ignore_eos": True}).json()
    assert message["usage"]["output_tokens"] < 200
    assert message["stop_reason"] == "model_context_window_exceeded"


def test_tokens_of_the_prompt_that_were_reused_count_apart(make_serving) -> None:
    serving = make_serving()
    with serving.listening():
        body = {**BODY, "max_tokens": 4, "cache_salt": "me"}
        first, second = (serving.http.post(PATH, json=body).json()["usage"] for _ in range(2))
    assert first["cache_read_input_tokens"] == 0
    assert (second["input_tokens"], second["cache_read_input_tokens"]) == (1, first["input_tokens"] - 1)
    assert first["output_tokens"] == second["output_tokens"] == 4


def test_a_failure_is_the_last_event(make_serving) -> None:
    serving = make_serving()
    services = serving.services
    job = ChatJob(
        prompts=[[BROKEN_ID, 70]], sampling=SamplingParams(), n=1, terms=Terms(), stream=True, rules=MessageRules()
    )

    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        async with serving.delivering():
            generation = Generation(job, services.tokenizer, services.client, services.metrics)
            stream = EventStream(MessageAnswer(services, job, generation).events(), closing=b"")
            await stream({"type": "http", "path": PATH}, receive, send)

    asyncio.run(run())
    events = b"".join(message.get("body", b"") for message in sent).split(b"\n\n")
    assert events[-2].startswith(b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":')
    assert b"not finite" in events[-2] and events[-1] == b""
