"""Functions, the older form of tools, and what cannot be had together with a call that must be made."""

import json
from typing import Any

import openai
import pytest

from server.messages import Constraint
from unit_tests.server.api.conftest import ARGUMENTS, CALL, ScriptedServing
from unit_tests.server.api.test_chat_tools import CLOCK, MESSAGES, PATH, WEATHER
from unit_tests.server.api.test_requests import check_error

FUNCTIONS = [WEATHER["function"], CLOCK["function"]]


def ask(scripted: ScriptedServing, **fields: Any) -> dict[str, Any]:
    """The choice of an answer that must succeed."""
    answer = scripted.http.post(PATH, json={"messages": MESSAGES, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.parametrize(
    ("choice", "reason"), [("auto", "function_call"), (None, "function_call"), ({"name": "weather"}, "stop")]
)
def test_functions_are_tools_of_which_one_is_called(scripted: ScriptedServing, choice: Any, reason: str) -> None:
    scripted.say(f"I look.{CALL}\n{CALL}")
    body = {"functions": FUNCTIONS, "function_call": choice}
    answer = ask(scripted, **body)
    prompt = scripted.prompt()
    message = {"content": "I look.", "function_call": {"name": "weather", "arguments": ARGUMENTS}}
    assert answer["message"].items() >= message.items() and "tool_calls" not in answer["message"]
    assert answer["finish_reason"] == reason
    chunks = [event["choices"][0] for event in scripted.events(PATH, messages=MESSAGES, **body)]
    calls = [chunk["delta"]["function_call"] for chunk in chunks if "function_call" in chunk["delta"]]
    assert [call.get("name") for call in calls] == ["weather", *[None] * (len(calls) - 1)]
    assert "".join(call["arguments"] for call in calls) == ARGUMENTS
    assert chunks[-1]["finish_reason"] == reason
    scripted.say("x")
    ask(scripted, tools=[WEATHER, CLOCK])
    assert scripted.prompt() == prompt


def test_functions_that_are_not_to_be_called_are_not_offered(scripted: ScriptedServing) -> None:
    scripted.say(CALL)
    message = ask(scripted, functions=FUNCTIONS, function_call="none")["message"]
    assert message["content"] == CALL and "weather" not in scripted.prompt()


def test_a_function_call_and_its_result_read_like_those_of_a_tool(scripted: ScriptedServing) -> None:
    scripted.say("Zero.")
    call = {"name": "weather", "arguments": ARGUMENTS}
    older = [{"role": "assistant", "content": None, "function_call": call}, {"role": "function", "content": "0"}]
    ask(scripted, messages=[*MESSAGES, *older], functions=FUNCTIONS)
    prompt = scripted.prompt()
    newer = [{"role": "assistant", "tool_calls": [{"id": "c", "function": call}]}, {"role": "tool", "content": "0"}]
    ask(scripted, messages=[*MESSAGES, *newer], tools=[WEATHER, CLOCK])
    assert scripted.prompt() == prompt and CALL in prompt


@pytest.mark.parametrize(
    "constraint",
    [
        {"structured_outputs": {"regex": "a+"}},
        {"guided_choice": ["a"]},
        {"ebnf": 'root ::= "a"'},
    ],
    ids=lambda constraint: next(iter(constraint)),
)
@pytest.mark.parametrize(
    "demand",
    [
        {"tools": [WEATHER], "tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"functions": FUNCTIONS, "function_call": {"name": "clock"}},
    ],
    ids=["required", "named", "function"],
)
def test_a_call_that_must_be_made_leaves_no_room_for_another_form(
    scripted: ScriptedServing, demand: dict[str, Any], constraint: dict[str, Any]
) -> None:
    ((field, _),) = constraint.items()
    refusal = scripted.http.post(PATH, json={"messages": MESSAGES, **demand, **constraint})
    check_error(refusal, 400, field, field, list(demand)[1])
    auto = {"tools": [WEATHER], "tool_choice": "auto"}
    assert scripted.http.post(PATH, json={"messages": MESSAGES, **auto, **constraint}).status_code == 200


def constraint_of(scripted: ScriptedServing, **fields: Any) -> Constraint | None:
    """What the engine is told that the answer to this must match."""
    assert scripted.http.post(PATH, json={"messages": MESSAGES, "tools": [WEATHER], **fields}).status_code == 200
    return scripted.engine.requests[-1].sampling.constraint


def test_a_format_holds_for_a_message_without_calls(scripted: ScriptedServing) -> None:
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}}
    call = constraint_of(scripted, tool_choice="required")
    assert call is not None and call.kind == "structural_tag"
    assert constraint_of(scripted, **form, tool_choice="required") == call
    found = constraint_of(scripted, **form)
    assert found is not None and (found.kind, json.loads(found.text)) == ("json_schema", {"type": "object"})
    assert found.alternative == (call.kind, call.text)
    without = constraint_of(scripted, **form, tool_choice="none")
    assert without is not None and without.alternative is None
    regex = constraint_of(scripted, guided_regex="a+")
    assert regex is not None and regex.alternative is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [], "function_call": {"name": "weather"}}, "function_call"),
        ({"functions": [{"name": "a b"}]}, "functions"),
        ({"functions": FUNCTIONS, "function_call": "required"}, "function_call"),
        ({"functions": FUNCTIONS, "function_call": 5}, "function_call"),
        ({"functions": FUNCTIONS, "function_call": {"name": "other"}}, "function_call"),
        ({"function_call": "auto"}, "function_call"),
        ({"functions": FUNCTIONS, "tools": [WEATHER]}, "tools"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_mistake_names_the_field(scripted: ScriptedServing, fields: Any, param: str, stream: bool) -> None:
    body = {"messages": MESSAGES, "stream": stream, **fields}
    check_error(scripted.http.post(PATH, json=body), 400, param, param)


def test_the_official_client_reads_a_function_call(scripted: ScriptedServing) -> None:
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=scripted.http)
    scripted.say(f"I look.{CALL}")
    fields: Any = {"model": "", "messages": MESSAGES, "functions": FUNCTIONS}
    choice = client.chat.completions.create(**fields).choices[0]
    call = choice.message.function_call
    assert call is not None and (call.name, call.arguments) == ("weather", ARGUMENTS)
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**fields, stream=True)]
    parts = [chunk.delta.function_call for chunk in chunks if chunk.delta.function_call is not None]
    assert parts[0].name == "weather" and "".join(part.arguments or "" for part in parts) == ARGUMENTS
    assert chunks[-1].finish_reason == choice.finish_reason == "function_call"
    again = [*MESSAGES, choice.message.to_dict(), {"role": "function", "name": "weather", "content": "0"}]
    client.chat.completions.create(**{**fields, "messages": again})
