"""Messages of a chat request, as a template reads them."""

import json
from typing import Any

import msgspec
import pytest

from server.api.chat_messages import MAX_ARGUMENTS_CHARS, merge_messages, read_messages
from server.api.fields import Fields, known_fields
from server.errors import InvalidRequest


def read(*messages: Any) -> list[dict[str, Any]]:
    """The messages of a request."""
    return read_messages(Fields(known_fields("messages"), msgspec.json.encode({"messages": messages})))


def read_one(message: Any) -> dict[str, Any]:
    """The only message of a request."""
    (read_message,) = read(message)
    return read_message


def call(arguments: Any, **fields: Any) -> dict[str, Any]:
    """One entry of `tool_calls`."""
    return {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments, **fields}}


def test_content_is_a_text_or_parts_that_are_joined() -> None:
    parts = [
        {"type": "text", "text": "a "},
        {"type": "input_text", "text": "b "},
        {"type": "output_text", "text": "c "},
        {"type": "refusal", "refusal": "no"},
    ]
    assert read({"role": "user", "content": "a b c no"}, {"role": "user", "content": parts}) == [
        {"role": "user", "content": "a b c no"},
        {"role": "user", "content": "a b c no"},
    ]


def test_a_developer_is_a_system() -> None:
    assert read_one({"role": "developer", "content": "x"}) == {"role": "system", "content": "x"}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_read_by_either_name(name: str) -> None:
    message = read_one({"role": "assistant", "content": "yes", name: "hm"})
    assert message == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}


def test_an_answer_of_this_server_can_be_sent_back_as_it_is() -> None:
    answer = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "reasoning": "hm",
        "reasoning_content": "hm",
        "tool_calls": [call('{"x": 1}')],
    }
    assert read_one(answer) == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [call({"x": 1})],
    }


@pytest.mark.parametrize("calls", [None, []])
def test_no_calls_are_no_field(calls: Any) -> None:
    assert read_one({"role": "assistant", "content": "a", "tool_calls": calls}) == {"role": "assistant", "content": "a"}


def test_a_refusal_is_what_an_assistant_said_who_said_nothing_else() -> None:
    assert read_one({"role": "assistant", "refusal": "no"})["content"] == "no"
    assert read_one({"role": "assistant", "content": "yes", "refusal": "no"})["content"] == "yes"


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ('{"x": [1, {"y": null}], "é": "\\n"}', {"x": [1, {"y": None}], "é": "\n"}),
        ({"x": 1}, {"x": 1}),
        ("", {}),
        (" ", {}),
        (None, {}),
        ("{}", {}),
    ],
)
def test_arguments_become_an_object(arguments: Any, value: dict[str, Any]) -> None:
    message = read_one({"role": "assistant", "content": "", "tool_calls": [call(arguments)]})
    assert message["tool_calls"][0]["function"]["arguments"] == value


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ('{"city": "Par', {"city": "Par"}),
        ('{"city": "Par\\u00', {"city": "Par"}),
        ('{"city": "Paris", "days": [1, {"x": "y', {"city": "Paris", "days": [1, {"x": "y"}]}),
        ('{"city": "Paris", "da', {"city": "Paris"}),
        ('{"city": "Paris", "days":', {"city": "Paris"}),
        ('{"city": "Paris", "days": tru', {"city": "Paris"}),
        ('{"city": "Paris", "days": 1.', {"city": "Paris"}),
        (" {", {}),
    ],
)
def test_arguments_that_were_cut_off_are_what_there_is_of_them(arguments: str, value: dict[str, Any]) -> None:
    (read_call,) = read_one({"role": "assistant", "tool_calls": [call(arguments)]})["tool_calls"]
    assert read_call == call(value)
    older = read_one({"role": "assistant", "function_call": {"name": "f", "arguments": arguments}})
    assert older["tool_calls"][0]["function"]["arguments"] == value


@pytest.mark.parametrize(
    "arguments", ["Paris", "[1]", "[1", '"x"', "5", "-", "null", '{"x": 1,}', '{"x": 1} y', "{'x': 1"]
)
def test_arguments_that_are_no_object_are_one_argument(arguments: str) -> None:
    (read_call,) = read_one({"role": "assistant", "tool_calls": [call(arguments)]})["tool_calls"]
    assert read_call == call({"arguments": arguments})


def test_a_call_can_be_cut_off_anywhere() -> None:
    whole = '{"city": "Osló \\" \\ud83d\\ude00", "n": [1, -2.5e3, {"k": null, "b": true}], "s": ""}'
    for length in range(1, len(whole)):
        (read_call,) = read_one({"role": "assistant", "tool_calls": [call(whole[:length])]})["tool_calls"]
        assert set(read_call["function"]["arguments"]) <= {"city", "n", "s"}


def test_long_arguments_are_read() -> None:
    arguments = json.dumps({"text": "x" * 500_000})
    message = read_one({"role": "assistant", "tool_calls": [call(arguments)]})
    assert len(message["tool_calls"][0]["function"]["arguments"]["text"]) == 500_000


def test_names_and_ids_reach_the_template_and_unknown_fields_do_not() -> None:
    message = {"role": "tool", "content": "sunny", "tool_call_id": "call_1", "name": "weather"}
    assert read_one({**message, "x": {"deep": [1]}, "audio": None}) == message
    bare = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}, "index": 0}]}
    assert read_one(bare)["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def calling(*calls: Any) -> list[Any]:
    """A user's message, and one of an assistant who calls."""
    return [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": list(calls)}]


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([], "messages", "messages is [], it must be a list of at least one entry"),
        ([{"role": "tool"}], "messages[0].content", "messages[0].content is null, only an assistant's may be"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], "messages[0].content[0].type", "the supported type is"),
        ([{"role": "user", "content": [{"type": "refusal"}]}], "messages[0].content[0].refusal", "refusal is null"),
        ([{"role": "assistant", "refusal": 5}], "messages[0].refusal", "messages[0].refusal is 5"),
        ([{"role": "assistant", "reasoning": 5}], "messages[0].reasoning", "messages[0].reasoning is 5"),
        (calling(5), "messages[1].tool_calls[0]", "messages[1].tool_calls[0] is 5, it must be a JSON object"),
        (calling({}), "messages[1].tool_calls[0].function", "function is null, it must be a JSON object"),
        (calling(call("{}", name=None)), "messages[1].tool_calls[0].function.name", "name is null"),
        (calling(call([1])), "messages[1].tool_calls[0].function.arguments", "it must be the JSON of an object"),
        (calling(call(5)), "messages[1].tool_calls[0].function.arguments", "it must be the JSON of an object"),
        (calling(call('{"a":' * 5000)), "messages[1].tool_calls[0].function.arguments", "arguments is"),
        (
            calling(call("x" * (MAX_ARGUMENTS_CHARS + 1))),
            "messages[1].tool_calls[0].function.arguments",
            f"has {MAX_ARGUMENTS_CHARS + 1} characters, the limit is {MAX_ARGUMENTS_CHARS}",
        ),
        (calling(*[call("")] * 1025), "messages[1].tool_calls", "more than 1024 entries"),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls", "must be a list"),
    ],
)
def test_a_mistake_is_named_with_its_message(messages: list[Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(*messages)
    assert message in caught.value.message
    assert caught.value.param == param
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("roles", "placed"),
    [
        (["system", "user"], ["system:0", "user:1"]),
        (["system", "developer", "system", "user"], ["system:0\n\n1\n\n2", "user:3"]),
        (["user", "system"], ["user:0", "user:1"]),
        (["system", "user", "developer", "user"], ["system:0", "user:1", "user:2", "user:3"]),
        (["user", "assistant", "system", "user"], ["user:0", "assistant:1", "user:2", "user:3"]),
        (["user", "tool", "system", "system"], ["user:0", "tool:1", "tool:2", "tool:3"]),
        (["system"], ["system:0"]),
    ],
)
def test_a_system_message_is_only_at_the_beginning(roles: list[str], placed: list[str]) -> None:
    found = read(*[{"role": role, "content": str(i)} for i, role in enumerate(roles)])
    assert [f"{message['role']}:{message['content']}" for message in found] == placed


def test_a_system_message_behind_calls_is_one_more_result() -> None:
    found = read(*calling(call("{}")), {"role": "system", "content": "a"}, {"role": "tool", "content": "b"})
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "tool"]


def test_parts_of_a_message_are_one() -> None:
    one = {"id": "c", "function": {}}
    parts = [
        {"role": "assistant", "content": "", "reasoning_content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [one]},
        {"role": "assistant", "content": "c", "tool_calls": [one], "reasoning_content": "d"},
    ]
    expected = {"role": "assistant", "content": "b--c", "reasoning_content": "ad", "tool_calls": [one, one]}
    assert merge_messages(parts, "--") == expected
    assert merge_messages(parts[:1]) == parts[0]
