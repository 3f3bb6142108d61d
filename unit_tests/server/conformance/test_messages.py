"""Reasoning and tool calls: what of a message goes where, whole and streamed, with and without drafts."""

import json
from typing import Any

import openai
import pytest

from unit_tests.server.conformance.answers import CHAT, QUESTION, STRANGE_QUESTION, ask, create, say
from unit_tests.server.conformance.conftest import Pair

pytestmark = pytest.mark.slow
LAWS = {"greedy": {"temperature": 0}, "seeded": {"temperature": 1.3, "seed": 17}}
LAW = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
THOUGHTLESS = {"enable_thinking": False}
THINKS = {"chat_template_kwargs": {"enable_thinking": True}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
LENGTH = 100


@pytest.mark.parametrize(
    "switch",
    [THINKS, {"enable_thinking": True}, {"reasoning_effort": "low"}, {"reasoning_effort": "max"}],
    ids=lambda switch: next(iter(switch)),
)
def test_thoughts_are_told_apart(pair: Pair, switch: dict[str, Any]) -> None:
    answer = pair.ask(CHAT, temperature=0, max_tokens=LENGTH, **switch)
    choice = answer.first
    assert choice.reasoning and choice.text and choice.finish_reason == "stop"
    assert "think>" not in choice.reasoning + choice.text
    assert 0 < answer.usage[2] < answer.num_tokens
    assert choice.text == choice.text.lstrip("\n")


@pytest.mark.parametrize(
    "switch",
    [{}, {"enable_thinking": False}, {"reasoning_effort": "none"}, {"chat_template_kwargs": THOUGHTLESS}],
    ids=str,
)
def test_without_thinking_there_are_no_thoughts(pair: Pair, switch: dict[str, Any]) -> None:
    answer = pair.ask(CHAT, temperature=0, max_tokens=LENGTH, **switch)
    assert answer.first.reasoning is None and answer.first.text and answer.usage[2] == 0


def test_an_explicit_switch_goes_before_an_effort(pair: Pair) -> None:
    fields = {"temperature": 0, "max_tokens": LENGTH, "reasoning_effort": "none", **THINKS}
    assert pair.ask(CHAT, **fields).first.reasoning


@LAW
@pytest.mark.parametrize("max_tokens", range(1, 8))
def test_thoughts_that_are_cut_off_are_thoughts(pair: Pair, law: dict[str, Any], max_tokens: int) -> None:
    answer = pair.ask(CHAT, max_tokens=max_tokens, min_tokens=max_tokens, bad_words=["</think>"], **THINKS, **law)
    assert answer.first.text is None and answer.first.finish_reason == "length"
    assert answer.usage[1:3] == [max_tokens, max_tokens]


@LAW
@pytest.mark.parametrize("budget", [0, 1, 2, 5])
def test_a_budget_ends_the_thoughts(pair: Pair, law: dict[str, Any], budget: int) -> None:
    fields = {**say(CHAT, STRANGE_QUESTION), "thinking_token_budget": budget, "max_tokens": 40, **THINKS, **law}
    answer = pair.ask(CHAT, **fields)
    assert answer.usage[2] <= budget < answer.num_tokens


def test_thoughts_may_be_left_out_or_stay_in_the_text(pair: Pair) -> None:
    fields = {"temperature": 0, "max_tokens": LENGTH, **THINKS}
    told = pair.ask(CHAT, **fields)
    hidden = pair.ask(CHAT, include_reasoning=False, **fields)
    assert hidden.first.reasoning is None and hidden.first.text == told.first.text
    assert hidden.usage[:3] == told.usage[:3]
    joined = pair.ask(CHAT, separate_reasoning=False, **fields).first
    assert joined.reasoning is None and (joined.text or "").startswith(told.first.reasoning or "?")
    assert "</think>" in (joined.text or "") and (joined.text or "").endswith(told.first.text or "?")


@LAW
@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")], ids=["required", "named"])
@pytest.mark.parametrize("switch", [{}, {**THINKS, "thinking_token_budget": 6}], ids=["direct", "after thinking"])
def test_a_demanded_call_comes_and_fits_its_schema(
    pair: Pair, law: dict[str, Any], choice: Any, reason: str, switch: dict[str, Any]
) -> None:
    fields = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": LENGTH, "parallel_tool_calls": False}
    found = pair.ask(CHAT, **say(CHAT, STRANGE_QUESTION), **fields, **switch, **law).first
    ((name, text),) = found.calls
    arguments = json.loads(text)
    assert name == "get_weather" and found.finish_reason == reason and found.text is None
    assert isinstance(arguments["city"], str) and len(arguments["city"]) <= 12 and arguments["days"] <= 9
    assert (found.reasoning is not None) == bool(switch)


@LAW
def test_any_of_several_tools_may_be_called_and_one_at_most_without_parallel_calls(
    pair: Pair, law: dict[str, Any]
) -> None:
    fields = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "max_tokens": LENGTH, **law}
    several = pair.ask(CHAT, **say(CHAT, STRANGE_QUESTION), **fields).first
    assert several.calls and {name for name, _ in several.calls} <= {"get_weather", "clock"}
    one = pair.ask(CHAT, **say(CHAT, STRANGE_QUESTION), parallel_tool_calls=False, **fields).first
    assert len(one.calls) == 1


@LAW
def test_functions_are_answered_like_tools_of_which_one_is_called(pair: Pair, law: dict[str, Any]) -> None:
    fields = {**say(CHAT, STRANGE_QUESTION), "max_tokens": LENGTH, **law}
    function = {name: value for name, value in WEATHER["function"].items() if name != "strict"}
    found = pair.ask(CHAT, **fields, functions=[function], function_call={"name": "get_weather"})
    tools = {"tools": [{"type": "function", "function": function}], "tool_choice": NAMED, "parallel_tool_calls": False}
    expected = pair.ask(CHAT, **fields, **tools)
    assert found.first.token_ids == expected.first.token_ids and found.usage == expected.usage


@LAW
def test_one_call_ends_an_answer_that_may_have_one(pair: Pair, law: dict[str, Any]) -> None:
    fields = {"tools": [WEATHER, CLOCK], "max_tokens": LENGTH, "parallel_tool_calls": False, **law}
    for choice in ("required", "auto"):
        found = pair.ask(CHAT, **say(CHAT, "How warm is it in Oslo?"), tool_choice=choice, **fields)
        assert len(found.first.calls) <= 1 and len(found.first.token_ids) == found.num_tokens
    assert len(pair.ask(CHAT, **say(CHAT, STRANGE_QUESTION), tool_choice="required", **fields).first.calls) == 1


def test_a_call_that_is_cut_off_ends_by_length(pair: Pair) -> None:
    fields = {"tools": [WEATHER], "tool_choice": "required", "temperature": 0}
    for max_tokens in (9, 12, 15):
        choice = pair.ask(CHAT, max_tokens=max_tokens, **fields).first
        assert choice.finish_reason == "length" and "<" not in (choice.text or "")


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_the_model_decides_unless_it_must_not_call(pair: Pair, choice: str | None) -> None:
    fields = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "temperature": 0, "max_tokens": LENGTH}
    found = pair.ask(CHAT, **say(CHAT, "How warm is it in Oslo?"), **fields).first
    assert (found.finish_reason == "tool_calls") == bool(found.calls)
    if choice == "none":
        assert not found.calls and found.text


def test_a_streamed_call_begins_with_its_name_and_goes_on_with_arguments(client: openai.OpenAI) -> None:
    fields = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
    stream = create(client, CHAT, stream=True, max_tokens=LENGTH, **fields)
    deltas = [call for chunk in stream for choice in chunk.choices for call in choice.delta.tool_calls or []]
    first, *rest = deltas
    assert (first.index, first.type) == (0, "function")
    assert (first.function.name, first.function.arguments) == ("get_weather", "")
    assert first.id and all(call.id is None and call.function.name is None for call in rest)
    assert len(rest) > 1 and json.loads("".join(call.function.arguments for call in rest)).keys() == {"city", "days"}


def test_a_conversation_with_calls_goes_on(pair: Pair) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How warm is "}, {"type": "text", "text": "Oslo?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "I must ask."},
        {"role": "tool", "tool_call_id": "c1", "content": "12 degrees"},
    ]
    fields = {"tools": [WEATHER], "max_tokens": 20, "temperature": 0}
    answer = pair.ask(CHAT, messages=messages, **fields)
    same = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How warm is Oslo?"},
        {**messages[2], "content": "", "reasoning_content": None, "reasoning": "I must ask.", "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "12 degrees"}]},
    ]
    again = pair.ask(CHAT, messages=same, **fields)
    assert again.first == answer.first and again.usage[0] == answer.usage[0]


def test_an_answer_goes_on_where_it_was_left(pair: Pair) -> None:
    whole = pair.ask(CHAT, temperature=0, max_tokens=LENGTH).first.text or ""
    begun = whole[: len(whole) // 2]
    messages = [*say(CHAT)["messages"], {"role": "assistant", "content": begun}]
    fields = {"temperature": 0, "max_tokens": LENGTH, "continue_final_message": True, "add_generation_prompt": False}
    rest = pair.ask(CHAT, messages=messages, **fields).first
    assert rest.finish_reason == "stop" and rest.text
    echoed = pair.ask(CHAT, messages=messages, echo=True, **fields).first
    assert echoed.text == begun + rest.text


def test_without_an_opened_turn_the_prompt_is_shorter(client: openai.OpenAI) -> None:
    opened = ask(client, CHAT, max_tokens=1).usage[0]
    assert ask(client, CHAT, max_tokens=1, add_generation_prompt=False).usage[0] < opened


def test_a_template_without_thinking_has_the_question_once(client: openai.OpenAI) -> None:
    """Unknown variables for the template change nothing."""
    fields = {"temperature": 0, "max_tokens": 8}
    plain = ask(client, CHAT, **fields)
    assert ask(client, CHAT, **fields, chat_template_kwargs={"no_such_variable": [QUESTION]}).first == plain.first
