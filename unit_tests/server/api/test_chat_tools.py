"""Reasoning and tool calls of /v1/chat/completions: the same message whole and streamed, however steps cut it."""

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from models.training import demo_tokenizer
from server.config import ServerConfig
from server.messages import Constraint
from server.tokenizer import Tokenizer
from unit_tests.server.api import conftest
from unit_tests.server.api.conftest import ARGUMENTS, CALL
from unit_tests.server.api.scripted_engine import ScriptedEngine
from unit_tests.server.api.test_requests import check_error

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "How warm is it in Oslo?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
THINKING = {"enable_thinking": True}


class ScriptedServing(conftest.ScriptedServing):
    """One that is asked by chat."""

    def ask(self, **fields: Any) -> dict[str, Any]:
        """The choice of a whole answer, which must say what a stream says."""
        body = {"messages": MESSAGES, **fields}
        answer = self.http.post(PATH, json=body)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        for _ in range(3):
            streamed = join_stream(self.events(PATH, **body))
            assert without_ids(streamed) == without_ids(choice)
        return choice


@pytest.fixture
def make_scripted(markup_tokenizer: Tokenizer) -> Callable[..., ScriptedServing]:
    """Makes servings with settings of their own; they do not listen yet."""

    def make(**settings: Any) -> ScriptedServing:
        engine = ScriptedEngine(markup_tokenizer.vocab_size, markup_tokenizer.encode(demo_tokenizer.END_OF_TURN)[0])
        return ScriptedServing(engine, markup_tokenizer, **settings)

    return make


@pytest.fixture
def scripted(make_scripted: Callable[..., ScriptedServing]) -> Iterator[ScriptedServing]:
    """One that listens."""
    serving = make_scripted()
    with serving.listening():
        yield serving


def join_stream(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The choice that the chunks of a stream add up to, as a client joins them."""
    message: dict[str, Any] = {"role": None, "content": None, "reasoning": None, "reasoning_content": None}
    calls: list[dict[str, Any]] = []
    entries: list[Any] = []
    finishes = []
    for chunk in (event["choices"][0] for event in events):
        delta = chunk["delta"]
        message["role"] = delta.get("role", message["role"])
        for name in ("content", "reasoning", "reasoning_content"):
            if delta.get(name):
                message[name] = (message[name] or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                assert set(call) == {"index", "id", "type", "function"}
                calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                assert call["index"] == len(calls) - 1 and set(call) == {"index", "function"}
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        entries += (chunk["logprobs"] or {}).get("content", [])
        finishes.append(chunk["finish_reason"])
    assert finishes[:-1] == [None] * (len(finishes) - 1)
    message.update({"tool_calls": calls} if calls else {})
    return {"message": message, "finish_reason": finishes[-1], "entries": entries}


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    """What a stream and a whole answer have in common; ids differ."""
    message = {name: value for name, value in choice["message"].items() if name not in ("refusal", "annotations")}
    calls = [{**call, "id": call["id"][:5]} for call in message.get("tool_calls", [])]
    content = message["content"] or None  # a stream cannot tell an empty content from none
    entries = choice["entries"] if "entries" in choice else (choice["logprobs"] or {"content": []})["content"]
    message = {**message, "tool_calls": calls, "content": content}
    return {"message": message, "finish_reason": choice["finish_reason"], "entries": entries}


def calls_of(choice: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and arguments of a choice's calls."""
    return [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]


def test_a_plain_answer_has_null_for_what_it_lacks(scripted: ScriptedServing) -> None:
    scripted.say("Hi 中文😀\n")
    choice = scripted.ask()
    assert choice["message"] == {
        "role": "assistant",
        "content": "Hi 中文😀\n",
        "refusal": None,
        "annotations": [],
        "reasoning": None,
        "reasoning_content": None,
    }
    assert choice["finish_reason"] == "stop"


def test_reasoning_stands_apart_under_both_names(scripted: ScriptedServing) -> None:
    scripted.say("It is cold.\n</think>\n\nZero degrees.")
    message = scripted.ask(**THINKING)["message"]
    assert message["reasoning"] == message["reasoning_content"] == "It is cold.\n"
    assert message["content"] == "Zero degrees."


def test_reasoning_that_was_cut_off_is_all_there_is(scripted: ScriptedServing) -> None:
    scripted.say("the quick brown fox the quick brown fox", ends=False)
    choice = scripted.ask(max_tokens=5, **THINKING)
    assert choice["message"]["content"] is None
    assert "the quick brown fox".startswith(choice["message"]["reasoning"].strip())
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("reasoning", "rest"),
    [
        ("It is cold.", "</think>Zero."),
        ("Look.\n", CALL),
        ("Look.", ""),
        ("", "</think>Zero."),
        ("a `<tool_call>` b", "</think>c"),
    ],
)
def test_reasoning_tokens_are_counted(scripted: ScriptedServing, reasoning: str, rest: str) -> None:
    scripted.say(reasoning + rest)
    expected = len(scripted.tokenizer.encode(reasoning)) + (rest == "")  # the end is a token, too
    body = {"messages": MESSAGES, "tools": [WEATHER], **THINKING}
    usages = [scripted.http.post(PATH, json=body).json()["usage"]]
    usages.append(scripted.events(PATH, stream_options={"include_usage": True}, **body)[-1]["usage"])
    for usage in usages:
        assert usage["completion_tokens_details"]["reasoning_tokens"] == expected
    without = scripted.http.post(PATH, json={"messages": MESSAGES}).json()["usage"]
    assert without["completion_tokens_details"]["reasoning_tokens"] == 0


def test_the_official_client_joins_a_stream_to_the_whole_message(scripted: ScriptedServing) -> None:
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=scripted.http)
    scripted.say(f"I look.\n\n{CALL}\n{CALL}")
    fields: Any = {"model": "", "messages": MESSAGES, "tools": [WEATHER, CLOCK]}
    whole = client.chat.completions.create(**fields).choices[0]
    with client.chat.completions.stream(**fields) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
    assert streamed.message.content == whole.message.content == "I look."
    for message in (streamed.message, whole.message):
        assert [call.function.arguments for call in message.tool_calls or []] == [ARGUMENTS] * 2
        client.chat.completions.create(**{**fields, "messages": [*MESSAGES, message.to_dict()]})


def test_reasoning_may_be_left_out_or_left_in_the_content(scripted: ScriptedServing) -> None:
    scripted.say("It is cold.</think>\n\nZero.")
    message = scripted.ask(include_reasoning=False, **THINKING)["message"]
    assert (message["reasoning"], message["reasoning_content"], message["content"]) == (None, None, "Zero.")
    message = scripted.ask(separate_reasoning=False, **THINKING)["message"]
    assert (message["reasoning"], message["content"]) == (None, "It is cold.</think>\n\nZero.")


@pytest.mark.parametrize("tool_choice", ["auto", "required"])
def test_calls_are_told_with_ids_names_and_arguments(scripted: ScriptedServing, tool_choice: str) -> None:
    scripted.say(f"I look.\n\n{CALL}\n{CALL}")
    choice = scripted.ask(tools=[WEATHER], tool_choice=tool_choice)
    assert calls_of(choice) == [("weather", ARGUMENTS)] * 2
    assert choice["message"]["content"] == "I look."
    assert choice["finish_reason"] == "tool_calls"
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert all(each.startswith("call_") for each in ids) and len(set(ids)) == 2


def test_a_call_alone_has_no_content(scripted: ScriptedServing) -> None:
    scripted.say(CALL)
    assert scripted.ask(tools=[WEATHER])["message"]["content"] is None


def test_a_call_inside_the_reasoning_ends_it(scripted: ScriptedServing) -> None:
    scripted.say(f"I look.{CALL}")
    choice = scripted.ask(tools=[WEATHER], **THINKING)
    assert choice["message"]["reasoning"] == "I look."
    assert calls_of(choice) == [("weather", ARGUMENTS)]


def test_a_named_function_ends_with_stop(scripted: ScriptedServing) -> None:
    scripted.say(CALL)
    choice = scripted.ask(tools=[WEATHER, CLOCK], tool_choice={"type": "function", "function": {"name": "weather"}})
    assert calls_of(choice) == [("weather", ARGUMENTS)]
    assert choice["finish_reason"] == "stop"


def test_a_call_that_was_cut_off_ends_with_length(scripted: ScriptedServing) -> None:
    scripted.say(CALL)
    num_tokens = len(scripted.tokenizer.encode(CALL[: CALL.index("lo\n")]))
    choice = scripted.ask(tools=[WEATHER], max_tokens=num_tokens)
    ((name, arguments),) = calls_of(choice)
    assert name == "weather"
    assert ARGUMENTS.startswith(arguments) and not arguments.endswith("}")
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("rest", ["", f"\n{CALL}", " and more", "the quick brown fox" * 9])
def test_without_parallel_calls_the_end_of_the_first_is_the_end(scripted: ScriptedServing, rest: str) -> None:
    begin = "Hm. `</tool_call>`</think>I look."
    scripted.say(begin + CALL + rest)
    body = {
        "messages": MESSAGES,
        "tools": [WEATHER],
        "parallel_tool_calls": False,
        "return_token_ids": True,
        **THINKING,
    }
    assert calls_of(scripted.ask(**body)) == [("weather", ARGUMENTS)]
    for _ in range(5):
        answer = scripted.http.post(PATH, json=body).json()
        choice = answer["choices"][0]
        assert scripted.tokenizer.decode(choice["token_ids"]) == begin + CALL
        assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])
        assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", None)
        assert scripted.client.num_in_flight == 0


def test_a_minimum_of_tokens_goes_before_the_end_of_a_call(scripted: ScriptedServing) -> None:
    scripted.say(f"{CALL} and more")
    least = len(scripted.tokenizer.encode(CALL)) + 1
    fields = {"messages": MESSAGES, "tools": [WEATHER], "parallel_tool_calls": False, "min_tokens": least}
    assert scripted.http.post(PATH, json=fields).json()["usage"]["completion_tokens"] == least


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_without_tools_a_call_is_text(scripted: ScriptedServing, fields: Any) -> None:
    scripted.say(CALL)
    choice = scripted.ask(**fields)
    assert choice["message"]["content"] == CALL
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    assert "<tools>" not in scripted.prompt()


def test_log_probabilities_cover_every_token_where_chunks_have_no_text(scripted: ScriptedServing) -> None:
    text = f"It is cold.</think>\n\nZero.\n\n{CALL}\n{CALL}"
    scripted.say(text)
    for include_reasoning in (True, False):
        choice = scripted.ask(tools=[WEATHER], logprobs=True, include_reasoning=include_reasoning, **THINKING)
        data = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
        assert data.decode() == text + demo_tokenizer.END_OF_TURN


def test_a_chunk_says_one_thing(scripted: ScriptedServing) -> None:
    scripted.say(f"a</think>b{CALL}")
    events = scripted.events(PATH, messages=MESSAGES, tools=[WEATHER], **THINKING)
    kinds = [sorted(set(event["choices"][0]["delta"]) - {"role"}) for event in events]
    assert all(kind in ([], ["content"], ["reasoning", "reasoning_content"], ["tool_calls"]) for kind in kinds)
    assert all(len(event["choices"][0]["delta"].get("tool_calls", [0])) == 1 for event in events)


def test_usage_of_a_chunk_never_falls_and_the_role_comes_before_the_first_token(scripted: ScriptedServing) -> None:
    scripted.say(f"It is cold.</think>Zero.{CALL}")
    options = {"continuous_usage_stats": True, "include_usage": True}
    events = scripted.events(PATH, messages=MESSAGES, tools=[WEATHER], stream_options=options, **THINKING)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == len(scripted.engine.script)


def test_every_choice_is_a_message_of_its_own(scripted: ScriptedServing) -> None:
    scripted.say(f"Hm.</think>{CALL}")
    choices = scripted.http.post(PATH, json={"messages": MESSAGES, "tools": [WEATHER], "n": 3, **THINKING}).json()[
        "choices"
    ]
    assert [choice["message"]["reasoning"] for choice in choices] == ["Hm."] * 3
    assert len({choice["message"]["tool_calls"][0]["id"] for choice in choices}) == 3


def test_a_stop_string_inside_a_call_completes_it(scripted: ScriptedServing) -> None:
    scripted.say(CALL + " and more")
    choice = scripted.ask(tools=[WEATHER], stop=["</function>"])
    assert calls_of(choice) == [("weather", ARGUMENTS)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", "</function>")


@pytest.mark.parametrize(
    ("fields", "kind", "after"),
    [
        ({"tool_choice": "required"}, "structural_tag", None),
        ({"tool_choice": "required", **THINKING}, "structural_tag", "</think>"),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, "structural_tag", None),
        ({}, None, None),
        ({"tool_choice": "none"}, None, None),
    ],
)
def test_what_must_be_called_constrains_the_output_after_the_reasoning(
    scripted: ScriptedServing, fields: Any, kind: str | None, after: str | None
) -> None:
    scripted.say(CALL)
    scripted.ask(tools=[WEATHER, CLOCK], **fields)
    constraint = scripted.engine.requests[-1].sampling.constraint
    if kind is None:
        assert constraint is None
        return
    assert isinstance(constraint, Constraint) and constraint.kind == kind
    assert constraint.after_token_id == (None if after is None else scripted.tokenizer.token_id(after))
    assert ("weather" in constraint.text) is (fields["tool_choice"] == "required")


@pytest.mark.parametrize(
    ("fields", "is_thinking"),
    [
        ({}, False),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"enable_thinking": True}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False}, True),
    ],
)
def test_thinking_is_the_requests_choice(scripted: ScriptedServing, fields: Any, is_thinking: bool) -> None:
    scripted.say("x")
    message = scripted.ask(**fields)["message"]
    assert scripted.prompt().endswith("<think>\n") is is_thinking
    assert (message["reasoning"], message["content"]) == (("x", None) if is_thinking else (None, "x"))


def test_the_server_may_think_by_default(make_scripted: Callable[..., ScriptedServing]) -> None:
    serving = make_scripted(config=ServerConfig(default_chat_template_kwargs={"enable_thinking": True}))
    with serving.listening():
        serving.say("x")
        assert serving.ask()["message"]["reasoning"] == "x"
        assert serving.ask(reasoning_effort="none")["message"]["content"] == "x"
        assert serving.ask(chat_template_kwargs={"enable_thinking": False})["message"]["content"] == "x"


def test_a_last_message_is_continued_and_echoed(scripted: ScriptedServing) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "It is "}]
    scripted.say("cold.")
    choice = scripted.ask(messages=messages, continue_final_message=True)
    assert scripted.prompt().endswith("It is ")
    assert choice["message"]["content"] == "cold."
    choice = scripted.ask(messages=messages, continue_final_message=True, add_generation_prompt=False, echo=True)
    assert choice["message"]["content"] == "It is cold."


@pytest.mark.parametrize("echo", [False, True])
def test_an_open_thought_is_continued(scripted: ScriptedServing, echo: bool) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "<think>I look"}]
    scripted.say(" it up.</think>Zero.")
    message = scripted.ask(messages=messages, continue_final_message=True, echo=echo)["message"]
    assert message["reasoning"] == ("I look it up." if echo else " it up.")
    assert message["content"] == "Zero."


def test_a_template_of_the_request_needs_the_servers_consent(
    scripted: ScriptedServing, make_scripted: Callable[..., ScriptedServing]
) -> None:
    body = {"messages": MESSAGES, "chat_template": "{{ messages[0].content }}!"}
    check_error(scripted.http.post(PATH, json=body), 400, "chat_template", "--trust-request-chat-template")
    serving = make_scripted(config=ServerConfig(trust_request_chat_template=True))
    with serving.listening():
        serving.say("x")
        serving.ask(**body)
        assert serving.prompt() == "How warm is it in Oslo?!"
        broken = {**body, "chat_template": "{% if %}"}
        check_error(serving.http.post(PATH, json=broken), 400, "chat_template", "broken at line 1")


def test_a_conversation_with_tools_goes_on(scripted: ScriptedServing) -> None:
    """The answer is sent back as it came, with the tool's result, and the model reads its own words again."""
    scripted.say(f"Hm.\n</think>\n\n{CALL}")
    answer = scripted.ask(tools=[WEATHER], **THINKING)["message"]
    result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "0 degrees"}
    first = scripted.prompt()
    scripted.say("Zero.")
    scripted.ask(messages=[*MESSAGES, answer, result], tools=[WEATHER], **THINKING)
    again = scripted.prompt()
    assert again.startswith(first + "Hm.\n")
    assert again.count(f"{CALL}<|im_end|>") == 1
    assert "<tool_response>\n0 degrees\n</tool_response>" in again


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [WEATHER], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"include_reasoning": 1}, "include_reasoning"),
        ({"echo": 1}, "echo"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"documents": [5]}, "documents"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_mistake_is_a_plain_error_that_names_the_field(
    scripted: ScriptedServing, fields: Any, param: str, stream: bool
) -> None:
    body = {"messages": MESSAGES, "stream": stream, **fields}
    check_error(scripted.http.post(PATH, json=body), 400, param, param)
    assert scripted.engine.requests == []


def test_arguments_that_are_neither_text_nor_an_object_are_named_with_their_message(scripted: ScriptedServing) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": [5]}}
    body = {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [call]}]}
    where = "messages[1].tool_calls[0].function.arguments"
    check_error(scripted.http.post(PATH, json=body), 400, where, where, "must be the JSON of an object")


def test_null_is_the_default_of_every_field(scripted: ScriptedServing) -> None:
    names = (
        *("tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "enable_thinking", "include_reasoning"),
        *("separate_reasoning", "chat_template", "chat_template_kwargs", "documents", "echo", "functions"),
        *("continue_final_message", "add_generation_prompt", "add_special_tokens", "function_call"),
    )
    scripted.say("x")
    assert scripted.ask(**dict.fromkeys(names))["message"]["content"] == "x"
