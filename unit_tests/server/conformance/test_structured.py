"""Outputs that must match something, in every spelling, greedy and sampled, with and without drafts."""

import concurrent.futures
import json
import re
from typing import Any

import openai
import pydantic
import pytest

from server.config import DEMO_MODEL
from server.tokenizer import Tokenizer
from unit_tests.server.conformance.answers import CHAT, COMPLETIONS, STRANGE_QUESTION, Answer, ask, assert_same, say
from unit_tests.server.conformance.conftest import Pair

pytestmark = pytest.mark.slow
ENDPOINT = pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
LAWS = {"greedy": {"temperature": 0}, "seeded": {"temperature": 1.5, "seed": 21}}
LAW = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}
COLOURS = ["dark red", "green", "grün", "blue"]
EXPRESSION = """
root ::= term ("+" term)? ";"
term ::= [0-9] | "(" [a-c] ")"
"""
EXPRESSION_PATTERN = re.compile(r"(\d|\([a-c]\))(\+(\d|\([a-c]\)))?;")
ISO_DATE = r"\d{4}-(0[1-9]|1[0-2])-[0-3]\d"


class Order(pydantic.BaseModel):
    """As `ORDER`."""

    name: str = pydantic.Field(max_length=8)
    count: int = pydantic.Field(ge=0, le=99)


def is_order(text: str) -> bool:
    order = json.loads(text)
    is_small = len(order["name"]) <= 8 and 0 <= order["count"] <= 99 and set(order["tags"]) <= {"a", "b"}
    return order.keys() == ORDER["properties"].keys() and is_small and len(order["tags"]) <= 2


def is_date(text: str) -> bool:
    return re.fullmatch(ISO_DATE, text) is not None


def is_expression(text: str) -> bool:
    return EXPRESSION_PATTERN.fullmatch(text) is not None


SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "order", "strict": True, "schema": ORDER}}
TAG = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "<o>", "content": {"type": "json_schema", "json_schema": ORDER}, "end": "</o>"},
}
# Spelling -> (fields, whether a finished text matches).
FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "response_format json_schema": ({"response_format": SCHEMA_FORMAT}, is_order),
    "structured_outputs json": ({"structured_outputs": {"json": ORDER}}, is_order),
    "structured_outputs json text": ({"structured_outputs": {"json": json.dumps(ORDER)}}, is_order),
    "guided_json": ({"guided_json": ORDER}, is_order),
    "json_schema": ({"json_schema": json.dumps(ORDER)}, is_order),
    "structured_outputs regex": ({"structured_outputs": {"regex": ISO_DATE}}, is_date),
    "guided_regex": ({"guided_regex": ISO_DATE}, is_date),
    "regex": ({"regex": ISO_DATE}, is_date),
    "structured_outputs choice": ({"structured_outputs": {"choice": COLOURS}}, COLOURS.__contains__),
    "guided_choice": ({"guided_choice": COLOURS}, COLOURS.__contains__),
    "structured_outputs grammar": ({"structured_outputs": {"grammar": EXPRESSION}}, is_expression),
    "guided_grammar": ({"guided_grammar": EXPRESSION}, is_expression),
    "ebnf": ({"ebnf": EXPRESSION}, is_expression),
    "structural_tag": ({"response_format": TAG}, lambda text: is_order(text.removeprefix("<o>").removesuffix("</o>"))),
}
LENGTH = 120
PLACE = {"type": "object", "properties": {"location": {"type": "string", "maxLength": 20}}, "required": ["location"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PLACE}}


@ENDPOINT
@LAW
@pytest.mark.parametrize("form", FORMS)
def test_an_output_matches_in_every_spelling(pair: Pair, endpoint: str, law: dict[str, Any], form: str) -> None:
    fields, matches = FORMS[form]
    answer = pair.ask(endpoint, **say(endpoint, STRANGE_QUESTION), max_tokens=LENGTH, **fields, **law)
    assert answer.first.finish_reason == "stop"
    assert matches(answer.first.text), answer.first.text


@ENDPOINT
def test_an_object_is_an_object(pair: Pair, endpoint: str) -> None:
    """A small model may write a string for ever: only what has ended must be JSON, and all of it begins like it."""
    for seed in range(4):
        fields: dict[str, Any] = {"response_format": {"type": "json_object"}, "temperature": 1.5, "seed": seed}
        choice = pair.ask(endpoint, **say(endpoint, STRANGE_QUESTION), max_tokens=40, **fields).first
        assert (choice.text or "").startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.text or ""), dict)
    assert pair.ask(endpoint, response_format={"type": "text"}, max_tokens=5).num_tokens == 5


@LAW
@pytest.mark.parametrize("budget", [0, 1, 2, 3, 7])
def test_thinking_is_free_and_what_follows_matches(pair: Pair, law: dict[str, Any], budget: int) -> None:
    """The end of thinking comes at any place of a step."""
    fields = {"thinking_token_budget": budget, "enable_thinking": True, "max_tokens": LENGTH, **law}
    answer = pair.ask(CHAT, **say(CHAT, STRANGE_QUESTION), response_format=SCHEMA_FORMAT, **fields)
    assert answer.first.finish_reason == "stop" and is_order(answer.first.text or "")
    assert answer.usage[2] <= budget


@ENDPOINT
def test_a_constraint_goes_with_everything_else(pair: Pair, endpoint: str) -> None:
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": 3} if endpoint == CHAT else {"logprobs": 3}
    fields = {"presence_penalty": 1.5, "top_k": 20, "top_p": 0.95, "seed": 5, "n": 2, "logit_bias": {"40": 2}}
    answer = pair.ask(endpoint, response_format=SCHEMA_FORMAT, max_tokens=LENGTH, **fields, **wanted)
    assert all(is_order(choice.text or "") for choice in answer.choices)
    stopped = pair.ask(endpoint, response_format=SCHEMA_FORMAT, max_tokens=LENGTH, temperature=0, stop=['"count"'])
    assert '"count"' not in (stopped.first.text or "") and stopped.first.stop_reason == '"count"'
    cut = pair.ask(endpoint, response_format=SCHEMA_FORMAT, max_tokens=3, temperature=0)
    assert (cut.num_tokens, cut.first.finish_reason) == (3, "length")


@LAW
@pytest.mark.parametrize("city", ["Paris", "Rome", "Lima"])
def test_with_tools_an_answer_is_a_call_or_matches(pair: Pair, law: dict[str, Any], city: str) -> None:
    fields = {**say(CHAT, f"What is the weather in {city}?"), "tools": [WEATHER], "max_tokens": LENGTH, **law}
    called = pair.ask(CHAT, **fields, response_format=SCHEMA_FORMAT).first
    ((name, text),) = called.calls
    assert name == "get_weather" and json.loads(text).keys() == {"location"}
    assert called.finish_reason == "tool_calls" and not called.text
    (brace,) = Tokenizer(DEMO_MODEL).encode('{"')
    told = pair.ask(CHAT, **fields, response_format=SCHEMA_FORMAT, logit_bias={str(brace): 100}).first
    assert told.finish_reason == "stop" and is_order(told.text or "") and not told.calls


def test_many_at_once_all_match_and_are_what_each_is_alone(pair: Pair) -> None:
    forms = [form for form in FORMS if form.startswith("structured_outputs")]

    def ask_one(index: int) -> Answer:
        fields, _ = FORMS[forms[index % len(forms)]]
        law = {"temperature": index % 3 / 2, "seed": index}
        return ask(pair.drafting, CHAT, **say(CHAT, STRANGE_QUESTION), max_tokens=LENGTH, **fields, **law)

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask_one, range(32)))
    for index, answer in enumerate(answers):
        assert FORMS[forms[index % len(forms)]][1](answer.first.text), answer.first.text
    for index in range(0, 32, 5):
        assert_same(ask_one(index), answers[index])


def test_the_client_parses_models(client: openai.OpenAI) -> None:
    fields: Any = {"model": "", **say(CHAT, STRANGE_QUESTION), "temperature": 0, "max_tokens": LENGTH}
    parsed = client.chat.completions.parse(response_format=Order, **fields).choices[0].message.parsed
    assert isinstance(parsed, Order)
    tools = [openai.pydantic_function_tool(Order, name="order")]
    message = client.chat.completions.parse(tools=tools, tool_choice="required", **fields).choices[0].message
    assert message.tool_calls and isinstance(message.tool_calls[0].function.parsed_arguments, Order)


def test_the_clients_stream_helper_ends_with_the_whole_message(client: openai.OpenAI) -> None:
    fields: Any = {"model": "", **say(CHAT, STRANGE_QUESTION), "temperature": 0, "max_tokens": LENGTH}
    with client.chat.completions.stream(response_format=Order, **fields) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == Order.model_validate_json(final.choices[0].message.content or "")
