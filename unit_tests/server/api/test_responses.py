"""POST /v1/responses and what becomes of responses: through the official client, and what it would never send."""

import threading
from typing import Any

import openai
import pytest

from server.api import responses
from server.messages import Constraint
from unit_tests.server.api.conftest import ARGUMENTS, CALL, ScriptedServing, Serving
from unit_tests.server.api.test_requests import check_error
from unit_tests.server.fake_engine import MAX_MODEL_LEN

PATH = "/v1/responses"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
WEATHER: dict[str, Any] = {"type": "function", "name": "weather", "parameters": PARAMETERS}
CLOCK: dict[str, Any] = {"type": "function", "name": "clock", "parameters": {}}
ANSWER = f"It is cold.\n</think>\n\nI look.\n\n{CALL}\n{CALL}"
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}


def make_client(serving: Serving) -> openai.OpenAI:
    """The official client of a serving."""
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=serving.http, max_retries=0)


def ask(serving: Serving, **fields: Any) -> dict[str, Any]:
    """A response that must succeed."""
    answer = serving.http.post(PATH, json={"input": "hi", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_conversation_with_calls_through_the_official_client(scripted: ScriptedServing) -> None:
    client = make_client(scripted)
    scripted.say(ANSWER)
    fields: Any = {"model": "tiny", "tools": [WEATHER], "reasoning": {"effort": "low"}, "instructions": "Be brief."}
    first = client.responses.create(input="How warm is it?", **fields)
    assert (first.status, first.output_text) == ("completed", "I look.")
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call", "function_call"]
    assert first.usage is not None and first.usage.output_tokens_details.reasoning_tokens > 0
    call: Any = first.output[2]
    assert (call.name, call.arguments) == ("weather", ARGUMENTS)
    assert "system\n# Tools" in scripted.prompt() and "Be brief." in scripted.prompt()
    scripted.say("Zero.")
    ids = [item.call_id for item in first.output if item.type == "function_call"]
    results: Any = [{"type": "function_call_output", "call_id": call_id, "output": "0"} for call_id in ids]
    chained = client.responses.create(model="tiny", input=results, previous_response_id=first.id, tools=[WEATHER])
    prompt = scripted.prompt()
    assert chained.output_text == "Zero."
    assert "It is cold." in prompt and "I look.\n<tool_call>" in prompt and "Be brief" not in prompt
    assert prompt.count("<tool_response>\n0\n</tool_response>") == 2
    items: Any = [{"role": "user", "content": "How warm is it?"}, *(item.to_dict() for item in first.output), *results]
    client.responses.create(model="tiny", input=items, tools=[WEATHER])
    assert scripted.prompt() == prompt


def test_a_stream_through_the_official_client_ends_with_the_whole(scripted: ScriptedServing) -> None:
    client = make_client(scripted)
    scripted.say(ANSWER)
    fields: Any = {"model": "tiny", "input": "hi", "tools": [WEATHER], "reasoning": {"effort": "high"}}
    with client.responses.stream(**fields) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "I look."
    assert events[-1].type == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == ARGUMENTS * 2
    assert [item.id for item in client.responses.retrieve(final.id).output] == [item.id for item in final.output]


@pytest.mark.parametrize(
    ("fields", "prompt_has"),
    [
        ({"reasoning": {"effort": "none"}}, "<think>\n\n</think>"),
        ({"reasoning": {"effort": "minimal"}}, "assistant\n<think>\n"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "assistant\n<think>\n"),
    ],
)
def test_effort_says_whether_it_thinks(scripted: ScriptedServing, fields: Any, prompt_has: str) -> None:
    ask(scripted, **fields)
    assert scripted.prompt().rstrip("\n").endswith(prompt_has.rstrip("\n"))


def test_settings_are_those_of_chat_and_are_repeated(scripted: ScriptedServing) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 7, "max_output_tokens": 9, "min_p": 0.1}
    response = ask(scripted, metadata={"a": "b"}, tools=[CLOCK], tool_choice="none", **fields)
    sampling = scripted.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 5, 7)
    assert (sampling.max_tokens, sampling.min_p) == (9, 0.1)
    for name, value in {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 9, "metadata": {"a": "b"}}.items():
        assert response[name] == value
    assert (response["tools"], response["tool_choice"]) == ([CLOCK], "none")
    assert "# Tools" not in scripted.prompt()


@pytest.mark.parametrize(
    ("form", "constraint"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Constraint("json_object", "", None, "text.format")),
        (
            {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True},
            Constraint("json_schema", '{"type":"object","properties":{"x":{"type":"integer"}}}', None, "text.format"),
        ),
    ],
)
def test_a_format_constrains_the_text(scripted: ScriptedServing, form: Any, constraint: Constraint | None) -> None:
    response = ask(scripted, text={"format": form})
    assert scripted.engine.requests[-1].sampling.constraint == constraint
    assert response["text"]["format"] == form
    ask(scripted, text={"format": form}, reasoning={"effort": "low"})
    found = scripted.engine.requests[-1].sampling.constraint
    assert (found and found.after_token_id) == (constraint and scripted.tokenizer.token_id("</think>"))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_call_that_must_be_made_goes_before_a_format(scripted: ScriptedServing, choice: Any) -> None:
    scripted.say(CALL)
    response = ask(scripted, tools=[WEATHER], tool_choice=choice, text={"format": {"type": "json_object"}})
    constraint = scripted.engine.requests[-1].sampling.constraint
    assert constraint is not None and constraint.kind == "structural_tag"
    assert [item["type"] for item in response["output"]] == ["function_call"]


def test_no_tools_are_nothing_out_of_the_ordinary(scripted: ScriptedServing) -> None:
    for fields in ({"tools": []}, {"tool_choice": "auto"}, {"tools": None, "tool_choice": "none"}):
        assert ask(scripted, **fields)["status"] == "completed"


def test_an_answer_that_reaches_the_limit_is_incomplete(scripted: ScriptedServing) -> None:
    scripted.say("the quick brown fox", ends=False)
    response = ask(scripted, max_output_tokens=3)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["usage"]["output_tokens"] == 3


def test_a_response_is_shown_until_it_is_deleted(serving: Serving) -> None:
    response = ask(serving)
    url = f"{PATH}/{response['id']}"
    assert serving.http.get(url).json() == response
    assert serving.http.post(f"{url}/cancel").json() == response
    assert serving.http.delete(url).json() == {"id": response["id"], "object": "response", "deleted": True}
    for answer in (serving.http.get(url), serving.http.delete(url), serving.http.post(f"{url}/cancel")):
        check_error(answer, 404, None, response["id"])
    body = {"input": "hi", "previous_response_id": response["id"]}
    check_error(serving.http.post(PATH, json=body), 404, "previous_response_id", response["id"])


@pytest.mark.parametrize("stream", ["true", "1", "x" * 500])
def test_a_response_is_not_streamed_later(serving: Serving, stream: str) -> None:
    url = f"{PATH}/{ask(serving)['id']}"
    check_error(serving.http.get(url, params={"stream": stream}), 400, "stream", "it must be false")
    assert serving.http.get(url, params={"stream": "false", "include": "x"}).status_code == 200


def test_later_the_official_client_is_told_why_there_is_no_stream_and_deletes(serving: Serving) -> None:
    client, response_id = make_client(serving), ask(serving)["id"]
    with pytest.raises(openai.BadRequestError, match="stream is 'true'"):
        client.responses.retrieve(response_id, stream=True)
    client.responses.delete(response_id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response_id)


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_may_be_called(scripted: ScriptedServing, mode: Any) -> None:
    scripted.say(CALL)
    choice: Any = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "weather"}]}
    tools: Any = [WEATHER, CLOCK]
    response = make_client(scripted).responses.create(model="tiny", input="hi", tools=tools, tool_choice=choice)
    assert response.tool_choice.to_dict() == choice  # type: ignore[union-attr]
    assert '"clock"' in scripted.prompt()
    constraint = scripted.engine.requests[-1].sampling.constraint
    assert constraint is not None and "<function=weather>" in constraint.text and "clock" not in constraint.text


def test_what_is_not_to_be_stored_is_not(serving: Serving) -> None:
    check_error(serving.http.get(f"{PATH}/{ask(serving, store=False)['id']}"), 404, None)


def test_a_call_that_was_cut_off_does_not_break_the_conversation(scripted: ScriptedServing) -> None:
    scripted.say(CALL)
    first = ask(scripted, tools=[WEATHER], max_output_tokens=len(scripted.tokenizer.encode(CALL[: CALL.index("lo\n")])))
    assert (first["output"][0]["type"], first["status"]) == ("function_call", "incomplete")
    (call,) = first["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "incomplete"}
    scripted.say("I try again.")
    ask(scripted, tools=[WEATHER], previous_response_id=first["id"], input=[result])
    prompt = scripted.prompt()
    assert "<parameter=city>\nOslo\n</parameter>" in prompt and "incomplete" in prompt
    ask(scripted, tools=[WEATHER], input=[{"role": "user", "content": "hi"}, call, result])
    assert scripted.prompt() == prompt


def test_a_reference_is_the_item_of_a_response_that_was_stored(scripted: ScriptedServing) -> None:
    client = make_client(scripted)
    scripted.say(ANSWER)
    question: Any = {"role": "user", "content": "How warm is it?"}
    first = client.responses.create(model="tiny", input=[question], tools=[WEATHER], reasoning={"effort": "low"})
    results: Any = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "0"}
        for item in first.output
        if item.type == "function_call"
    ]
    scripted.say("Zero.")
    references: Any = [{"type": "item_reference", "id": item.id} for item in first.output]
    second = client.responses.create(model="tiny", input=[question, *references, *results], tools=[WEATHER])
    prompt = scripted.prompt()
    client.responses.create(model="tiny", input=results, previous_response_id=first.id, tools=[WEATHER])
    assert scripted.prompt() == prompt and "It is cold." in prompt
    found = list(client.responses.input_items.list(second.id, order="asc"))
    assert [item.id for item in found[1:5]] == [item.id for item in first.output]
    ask(scripted, tools=[WEATHER], previous_response_id=second.id)
    assert scripted.prompt().count("<tool_response>\n0\n") == 2 and "Zero." in scripted.prompt()


def test_an_item_that_is_not_there_is_named(scripted: ScriptedServing) -> None:
    scripted.say("Zero.")
    kept, lost = ask(scripted), ask(scripted, store=False)
    scripted.http.delete(f"{PATH}/{kept['id']}")
    for response in (kept, lost):
        reference = {"type": "item_reference", "id": response["output"][0]["id"]}
        answer = scripted.http.post(PATH, json={"input": [{"role": "user", "content": "hi"}, reference]})
        check_error(answer, 404, "input[1].id", f"Item with id '{reference['id']}' not found")
    answer = scripted.http.post(PATH, json={"input": [{"type": "item_reference"}]})
    check_error(answer, 400, "input[0].id", "input[0].id is null, it must be a string")


def test_settings_without_an_effect_are_repeated(scripted: ScriptedServing) -> None:
    fields = {"max_tool_calls": 3, "prompt_cache_key": "k", "safety_identifier": "s", "truncation": "disabled"}
    response = ask(scripted, text={"verbosity": "low"}, **fields)
    assert response.items() >= fields.items()
    assert response["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert [ask(scripted)[name] for name in fields] == [None, None, None, "disabled"]
    assert ask(scripted, truncation="auto")["truncation"] == "disabled", "as it is"


def test_usage_tells_all_that_the_official_client_asks_for(scripted: ScriptedServing) -> None:
    assert set(ask(scripted)["usage"]["input_tokens_details"]) == {"cached_tokens", "cache_write_tokens"}
    usage = make_client(scripted).responses.create(model="tiny", input="hi").usage
    assert usage is not None and type(usage).model_validate(usage.to_dict()) == usage


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input", None, "input is null, it must be a text or a list of at least one item"),
        ("input", [], "input is [], it must be"),
        ("input", {}, "input is {}, it must be"),
        ("input", [5], "input[0] is 5, it must be a JSON object"),
        ("input", "x" * 100_000, "This model's maximum context length is"),
        ("input", [{"role": "user", "content": 5}], "input[0].content is 5"),
        ("instructions", 5, "instructions is 5, it must be a string"),
        ("max_output_tokens", 0, f"max_output_tokens is 0, it must be in 1..{MAX_MODEL_LEN}"),
        ("max_output_tokens", "5", "an integer"),
        ("temperature", 2.1, "[0, 2]"),
        ("top_logprobs", 21, "0..20"),
        ("text", 5, "text is 5, it must be a JSON object"),
        ("text", {"format": "json"}, "text.format is"),
        ("text", {"format": {"type": "xml"}}, "text.format.type is 'xml', it must be one of text, json_object"),
        ("text", {"format": {"type": "json_schema", "name": "x"}}, "text.format.schema is null, it must be a"),
        ("reasoning", {"effort": "huge"}, "reasoning.effort is 'huge', it must be one of none"),
        ("reasoning", [], "reasoning is []"),
        ("metadata", [], "metadata is a list of 0 entries, it must be an object"),
        ("store", 1, "true or false"),
        ("include", "x", "a list"),
        ("previous_response_id", 5, "a string"),
        ("background", True, "background is not served"),
        ("conversation", "conv_1", "conversation is not served"),
        ("prompt", {"id": "x"}, "prompt is not served"),
        ("tools", [{"type": "web_search"}], "tools[0].type is 'web_search', it must be 'function'"),
        ("tools", [{"type": "function", "name": "a b"}], "tools[0].name is 'a b'"),
        ("tools", [CLOCK, CLOCK], "tools[1].name is 'clock', which an earlier tool has"),
        ("tools", [{**CLOCK, "parameters": {"type": "array"}}], "tools[0].parameters.type is 'array'"),
        ("tool_choice", "maybe", 'tool_choice is "maybe", it must be one of none, auto, required'),
        ("tool_choice", 0, "tool_choice is 0, it must be one of"),
        ("tool_choice", {"type": "web_search"}, "an object that names a function"),
        ("tool_choice", "required", "tool_choice is required without tools"),
        ("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": [CLOCK]}, "tool_choice is auto without"),
        ("parallel_tool_calls", 1, "true or false"),
        ("truncation", "none", "truncation is 'none', it must be auto or disabled"),
        ("truncation", 5, "truncation is 5, it must be a string"),
        ("max_tool_calls", "x", "max_tool_calls is 'x', it must be an integer"),
        ("prompt_cache_key", 5, "prompt_cache_key is 5, it must be a string"),
        ("text", {"verbosity": "huge"}, "text.verbosity is 'huge', it must be one of low, medium, high"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_value_is_named_with_its_limit(
    serving: Serving, stream: bool, field: str, value: Any, message: str
) -> None:
    body = {"input": "hi", field: value, "stream": stream}
    check_error(serving.http.post(PATH, json=body), 400, field, message)
    assert serving.channel.sent == []


def test_a_conversation_that_was_stored_is_read_off_the_event_loop(
    scripted: ScriptedServing, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def spy_on(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def record(*arguments: Any) -> Any:
            threads.append(threading.current_thread().name)
            return function(*arguments)

        monkeypatch.setattr(owner, name, record)

    first = ask(scripted, input="x" * 1000)
    spy_on(scripted.tokenizer, "apply_chat_template")
    spy_on(responses, "list_items")
    ask(scripted, previous_response_id=first["id"])
    assert scripted.http.get(f"{PATH}/{first['id']}/input_items").json()["data"][0]["role"] == "user"
    assert len(threads) == 2 and all(name.startswith("reader") for name in threads)


def test_unknown_fields_are_ignored_and_null_is_the_default(serving: Serving) -> None:
    names = ("instructions", "metadata", "text", "reasoning", "tools", "tool_choice", "include", "background", "top_p")
    response = ask(serving, no_such_field=[1], service_tier="flex", **dict.fromkeys(names))
    assert (response["status"], response["metadata"], response["tools"]) == ("completed", {}, [])


def test_what_the_client_sent_is_repeated_as_it_came(serving: Serving) -> None:
    content = b'{"input": "hi", "metadata": {"n": ' + b"9" * 500 + b"}}"
    answer = serving.http.post(PATH, content=content)
    assert answer.status_code == 200
    assert b'"metadata":{"n": ' + b"9" * 500 + b"}" in answer.content
