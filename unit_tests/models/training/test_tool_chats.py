"""Tool chats: calls that the definitions allow, drawn anew, written in the model's own markup."""

import random

import pytest

from models.training.tool_chats import TOOLS, Call, draw_definitions, draw_tool_chat

TYPES = {"string": str, "integer": int}


@pytest.fixture(scope="module")
def chats():
    rng = random.Random(0)
    return [draw_tool_chat(rng) for _ in range(300)]


def test_every_call_is_allowed_by_a_definition(chats):
    for chat in chats:
        functions = {entry["function"]["name"]: entry["function"]["parameters"] for entry in chat.definitions}
        for call in chat.calls:
            schema = functions[call.name]
            assert set(schema.get("required", call.arguments)) == set(call.arguments)
            for key, value in call.arguments.items():
                assert type(value) is TYPES[schema["properties"][key]["type"]]


def test_every_argument_stands_in_the_question_and_every_call_has_a_result(chats):
    for chat in chats:
        assert len(chat.results) == len(chat.calls)
        assert all(str(value) in chat.question for call in chat.calls for value in call.arguments.values())
        assert all(result in chat.answer for result in chat.results)


def test_every_kind_of_tool_one_to_three_of_them_and_two_calls_are_drawn(chats):
    assert {len(chat.definitions) for chat in chats} == {1, 2, 3}
    assert {len(chat.calls) for chat in chats} == {1, 2}
    rng = random.Random(1)
    assert {definitions[0].tool for definitions in (draw_definitions(rng) for _ in range(100))} == set(TOOLS)


def test_the_tools_of_one_chat_are_of_different_kinds():
    rng = random.Random(2)
    for _ in range(100):
        kinds = [definition.tool for definition in draw_definitions(rng)]
        assert len(set(kinds)) == len(kinds)


def test_names_are_often_new():
    rng = random.Random(3)
    known = {name for tool in TOOLS for name in tool.names}
    names = [draw_tool_chat(rng).calls[0].name for _ in range(200)]
    assert 10 < sum(name not in known for name in names) < 60


def test_a_call_is_written_as_the_template_writes_it():
    call = Call("add", {"a": 1, "b": 23})
    expected = (
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n23\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    assert call.markup == expected
    assert call.message == {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 23}}}
