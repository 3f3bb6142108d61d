"""Items of a request as messages, and blocks of an answer as items."""

from typing import Any

import msgspec
import pytest

from server.api.message_blocks import CALL, CLOSED, CONTENT, GREW, OPENED, REASONING, Block
from server.api.message_parser import ToolCallStart
from server.api.response_items import read_items, write_events, write_item
from server.errors import InvalidRequest

CALL_ITEM = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'}
OTHER_CALL = {"type": "function_call", "call_id": "c2", "name": "clock", "arguments": ""}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]}
TEXT = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi"}]}
USER = {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}


def call(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A call as a chat template reads it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def read(*items: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of items."""
    return read_items([(msgspec.json.encode(item), f"input[{i}]") for i, item in enumerate(items)])


CALLS = [call("c1", "weather", {"city": "Oslo"}), call("c2", "clock", {})]


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([USER], [{"role": "user", "content": "ab"}]),
        (
            [THOUGHT, TEXT, CALL_ITEM, OTHER_CALL],
            [{"role": "assistant", "content": "Hi", "reasoning_content": "Look.", "tool_calls": CALLS}],
        ),
        ([CALL_ITEM], [{"role": "assistant", "content": "", "tool_calls": CALLS[:1]}]),
        ([TEXT, TEXT], [{"role": "assistant", "content": "Hi"}] * 2),
        (
            [CALL_ITEM, TEXT],
            [{"role": "assistant", "content": "", "tool_calls": CALLS[:1]}, {"role": "assistant", "content": "Hi"}],
        ),
        (
            [TEXT, THOUGHT],
            [
                {"role": "assistant", "content": "Hi"},
                {"role": "assistant", "content": "", "reasoning_content": "Look."},
            ],
        ),
        (
            [{"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "5"}]}],
            [{"role": "tool", "tool_call_id": "c1", "content": "5"}],
        ),
        (
            [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, USER],
            [{"role": "system", "content": "A\n\nB"}, {"role": "user", "content": "ab"}],
        ),
        (
            [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "S"}]}],
            [{"role": "assistant", "content": "", "reasoning_content": "S"}],
        ),
    ],
)
def test_items_become_messages(items: list[Any], messages: list[Any]) -> None:
    assert read(*items) == messages


def test_system_messages_later_on_are_turns_of_the_users_where_they_stand() -> None:
    found = read(USER, {"role": "system", "content": "A"}, {"role": "developer", "content": "B"})
    assert found == [{"role": "user", "content": content} for content in ("ab", "A", "B")]


def test_a_call_that_was_cut_off_is_what_there_is_of_it() -> None:
    (message,) = read({**CALL_ITEM, "arguments": '{"city": "Os', "status": "incomplete"})
    assert message["tool_calls"] == [call("c1", "weather", {"city": "Os"})]
    (message,) = read({**CALL_ITEM, "arguments": "[]"})
    assert message["tool_calls"] == [call("c1", "weather", {"arguments": "[]"})]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"type": "web_search_call", "id": "x"}, "input[0].type is 'web_search_call', it must be one of message,"),
        ({"type": 5}, "input[0].type is 5"),
        ({"role": "user"}, "input[0].content is null"),
        ({"role": "user", "content": [{"type": "input_image"}]}, "input[0].content[0].type is 'input_image'"),
        ({"type": "function_call", "name": "x"}, "input[0].call_id is null, it must be a string"),
        ({"type": "function_call", "call_id": "c"}, "input[0].name is null, it must be a string"),
        ({**CALL_ITEM, "arguments": []}, "input[0].arguments is [], it must be the JSON of an object"),
        ({"type": "function_call_output", "call_id": "c", "output": 5}, "input[0].output is 5, it must be"),
        ({"type": "reasoning", "content": [{"text": 5}]}, "input[0].content[0].text is 5, it must be a string"),
        ({"type": "reasoning", "content": "x"}, "input[0].content"),
    ],
)
def test_a_wrong_item_is_named(item: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(item)
    assert message in caught.value.message
    assert caught.value.param is not None
    assert caught.value.param.startswith("input[0]")


@pytest.mark.parametrize("kind", [REASONING, CONTENT, CALL])
def test_events_open_grow_and_close_an_item_that_reads_back(kind: str) -> None:
    block = Block(3, kind, ToolCallStart(0, "c1", "weather") if kind == CALL else None)
    opened = list(write_events(OPENED, block, "", ()))
    assert opened[0]["item"]["status"] == "in_progress"
    block.parts.append('{"city": "Oslo"}')
    grown = list(write_events(GREW, block, block.parts[0], ()))
    assert [event["delta"] for event in grown] == ['{"city": "Oslo"}']
    block.is_open, block.is_whole = False, True
    closed = list(write_events(CLOSED, block, "", ()))
    assert closed[-1] == {"type": "response.output_item.done", "output_index": 3, "item": write_item(block)}
    events = [*opened, *grown, *closed]
    assert len(events) == (4 if kind == CALL else 6)
    assert {event["output_index"] for event in events} == {3}
    assert len({event.get("item_id", event.get("item", {}).get("id")) for event in events}) == 1
    assert closed[-1]["item"]["status"] == "completed"
    (message,) = read(closed[-1]["item"])
    told = message.get("tool_calls") or message.get("reasoning_content") or message["content"]
    assert told == (CALLS[:1] if kind == CALL else '{"city": "Oslo"}')


def test_an_item_that_was_cut_off_is_incomplete() -> None:
    assert write_item(Block(0, CONTENT, None, ["x"], is_open=False))["status"] == "incomplete"
