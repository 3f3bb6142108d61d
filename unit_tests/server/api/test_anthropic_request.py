"""Anthropic's messages as a chat template reads them, and what is refused."""

from typing import Any

import msgspec
import pytest

from server.api.anthropic_request import MESSAGES_FIELDS, read_conversation
from server.api.conversations import Conversation
from server.api.fields import Fields
from server.api.tools import AUTO, NAMED, REQUIRED
from server.errors import InvalidRequest

USER = {"role": "user", "content": "hi"}
CLOCK: dict[str, Any] = {"name": "clock", "input_schema": {"type": "object"}}
TEXT, USE = {"type": "text", "text": "Hi"}, {"type": "tool_use", "id": "t1", "name": "clock", "input": {"x": 1}}
CALLS = [{"id": "t1", "type": "function", "function": {"name": "clock", "arguments": {"x": 1}}}]


def read(**values: Any) -> Conversation:
    """The conversation of a request."""
    return read_conversation(Fields(MESSAGES_FIELDS, msgspec.json.encode({"messages": [USER], **values})))


def turn(role: str, *content: dict[str, Any]) -> dict[str, Any]:
    """A message of blocks."""
    return {"role": role, "content": list(content)}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (USER, [USER]),
        (turn("user", TEXT, TEXT), [{"role": "user", "content": "HiHi"}]),
        (turn("user"), [{"role": "user", "content": ""}]),
        (turn("system", TEXT), [{"role": "system", "content": "Hi"}]),
        (
            turn("assistant", {**USE, "input": '{"x": 1, "y'}),
            [{"role": "assistant", "content": "", "tool_calls": CALLS}],
        ),
        (
            turn("assistant", {"type": "thinking", "thinking": "Look.", "signature": "s"}, TEXT, USE, USE),
            [{"role": "assistant", "content": "Hi", "reasoning_content": "Look.", "tool_calls": CALLS * 2}],
        ),
        (turn("assistant", {"type": "redacted_thinking", "data": "x"}, TEXT), [{"role": "assistant", "content": "Hi"}]),
        (
            turn(
                "user",
                {"type": "tool_result", "tool_use_id": "t1", "content": "5"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [TEXT, TEXT], "is_error": True},
                {"type": "tool_result", "tool_use_id": "t3"},
                TEXT,
            ),
            [
                {"role": "tool", "tool_call_id": "t1", "content": "5"},
                {"role": "tool", "tool_call_id": "t2", "content": "HiHi"},
                {"role": "tool", "tool_call_id": "t3", "content": ""},
                {"role": "user", "content": "Hi"},
            ],
        ),
    ],
)
def test_a_turn_becomes_messages(message: Any, expected: list[Any]) -> None:
    assert read(messages=[message]).messages == expected


@pytest.mark.parametrize("system", ["Be", [{"type": "text", "text": "B"}, {"type": "text", "text": "e"}]])
def test_the_system_prompt_comes_first(system: Any) -> None:
    assert read(system=system).messages == [{"role": "system", "content": "Be"}, USER]


def test_turns_of_the_systems_are_one_at_the_beginning_and_the_users_later() -> None:
    system = turn("system", TEXT)
    assert read(system="Be", messages=[system, USER, system]).messages == [
        {"role": "system", "content": "Be\n\nHi"},
        USER,
        {"role": "user", "content": "Hi"},
    ]
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "5"}
    found = read(messages=[USER, turn("assistant", TEXT, USE), turn("user", result), system])
    assert found.messages[2:] == [
        {"role": "tool", "tool_call_id": "t1", "content": "5"},
        {"role": "tool", "content": "Hi"},
    ]
    assert not read(messages=[USER, turn("assistant", TEXT), system]).continues


@pytest.mark.parametrize(
    ("message", "continues"), [(USER, False), (turn("assistant", TEXT), True), (turn("assistant", TEXT, USE), False)]
)
def test_an_assistants_last_text_goes_on(message: Any, continues: bool) -> None:
    assert read(messages=[USER, message]).continues is continues


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        (None, (False, None)),
        ({"type": "enabled", "budget_tokens": 9}, (True, 9)),
        ({"type": "adaptive"}, (True, None)),
        ({"type": "disabled"}, (False, None)),
    ],
)
def test_it_thinks_when_it_is_asked_to(thinking: Any, expected: tuple[bool, int | None]) -> None:
    conversation = read(thinking=thinking, max_tokens=10)
    assert (conversation.thinks, conversation.thinking_budget) == expected


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, (AUTO, None, True)),
        ({"type": "auto"}, (AUTO, None, True)),
        ({"type": "any", "disable_parallel_tool_use": True}, (REQUIRED, None, False)),
        ({"type": "tool", "name": "clock"}, (NAMED, ("clock",), True)),
    ],
)
def test_tools_are_those_of_chat(choice: Any, expected: tuple[str, tuple[str, ...] | None, bool]) -> None:
    tool = {**CLOCK, "description": "Now", "cache_control": {"type": "ephemeral"}}
    tools = read(tools=[tool], tool_choice=choice).tools
    assert tools is not None
    assert (tools.choice, tools.allowed, tools.is_parallel) == expected
    function = {"name": "clock", "description": "Now", "parameters": {"type": "object"}}
    assert tools.definitions == [{"type": "function", "function": function}]


def test_tools_that_are_not_to_be_called_are_none() -> None:
    assert read(tools=[CLOCK], tool_choice={"type": "none"}).tools is None
    assert read(tools=[]).tools is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": []}, "messages is [], it must be a list of at least one entry"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].role is 'tool', it must be user, assistant or system",
        ),
        ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role is a list of 0 entries, it must be user, "),
        ({"messages": [{"role": "user"}]}, "messages[0].content is null, it must be a string or a list of blocks"),
        ({"messages": [turn("user", {"type": "image"})]}, "messages[0].content[0].type is 'image', it must be"),
        ({"messages": [turn("user", USE)]}, "messages[0].content[0].type is 'tool_use', it must be one of text, tool_"),
        ({"messages": [turn("assistant", {"type": "tool_use", "name": "x"})]}, "messages[0].content[0].id is null"),
        ({"messages": [turn("assistant", {**USE, "input": 5})]}, "messages[0].content[0].input is 5, it must be the"),
        ({"messages": [turn("user", {"type": "text"})]}, "messages[0].content[0].text is null, it must be a string"),
        ({"messages": [turn("user", {"type": "tool_result"})]}, "messages[0].content[0].tool_use_id is null"),
        ({"system": 5}, "system is 5, it must be a string or a list of text parts"),
        ({"thinking": {"type": "maybe"}}, "thinking.type is 'maybe', it must be one of enabled, adaptive, disabled"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens is 0, it must be in 1.."),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 9}, "max_tokens": 9},
            "thinking.budget_tokens is 9, it must be less than max_tokens, 9",
        ),
        ({"tools": [{"name": "clock"}]}, "tools[0].input_schema is null, it must be a JSON schema"),
        ({"tools": [{**CLOCK, "name": ""}]}, "tools[0].name is '', it must be 1..256 characters"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type is 'bash_20250124', it must be"),
        ({"tools": [CLOCK], "tool_choice": "any"}, 'tool_choice is "any", it must be a JSON object'),
        ({"tools": [CLOCK], "tool_choice": {"type": "all"}}, "tool_choice.type is 'all', it must be one of auto, any"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice names the function 'x'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice is required without tools"),
    ],
)
def test_a_wrong_value_is_named(values: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(**values)
    assert message in caught.value.message


def test_many_blocks_are_joined_in_no_time() -> None:
    blocks = [{"type": "text", "text": "x" * 1000}] * 1024
    messages = read(messages=[turn("user", *blocks)] * 3).messages
    assert [len(message["content"]) for message in messages] == [1024 * 1000] * 3
