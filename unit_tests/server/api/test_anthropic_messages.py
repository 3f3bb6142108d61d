"""POST /v1/messages and count_tokens through the official client, and errors as Anthropic writes them."""

from typing import Any

import anthropic
import pytest

from server.config import ServerConfig
from server.messages import Constraint
from unit_tests.server.api.conftest import CALL, ScriptedServing, Serving
from unit_tests.server.api.test_anthropic_answer import BODY, PATH, WEATHER

COUNT = "/v1/messages/count_tokens"


def make_client(serving: Serving) -> anthropic.Anthropic:
    """The official client of a serving."""
    return anthropic.Anthropic(base_url="http://testserver", api_key="k", http_client=serving.http, max_retries=0)


def test_a_conversation_with_calls_through_the_official_client(scripted: ScriptedServing) -> None:
    client = make_client(scripted)
    scripted.say(f"It is cold.\n</think>\n\nI look.\n\n{CALL}\n{CALL}")
    messages: list[Any] = [{"role": "user", "content": "How warm is it?"}]
    fields: Any = {
        "model": "tiny",
        "max_tokens": 500,
        "tools": [WEATHER],
        "thinking": {"type": "enabled", "budget_tokens": 400},
        "system": "Be brief.",
    }
    whole = client.messages.create(messages=messages, **fields)
    with client.messages.stream(messages=messages, **fields) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert message.stop_reason == "tool_use"
        uses = [block for block in message.content if block.type == "tool_use"]
        assert [use.input for use in uses] == [{"city": "Oslo", "days": 3}] * 2
    sampling = scripted.engine.requests[-1].sampling
    assert (sampling.thinking_budget, sampling.think_end_id) == (400, scripted.tokenizer.token_id("</think>"))
    results = [{"type": "tool_result", "tool_use_id": use.id, "content": "0"} for use in uses]
    turns: list[Any] = [{"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
    turns = messages + turns
    scripted.say("</think>Zero.")
    answer = client.messages.create(messages=turns, **fields)
    assert answer.stop_reason == "end_turn"
    prompt = scripted.prompt()
    assert "Be brief." in prompt and "It is cold." in prompt and "I look.\n<tool_call>" in prompt
    assert prompt.count("<tool_response>\n0\n</tool_response>") == 2
    assert prompt.endswith("<think>\n")
    assert client.messages.count_tokens(
        messages=turns, **{name: fields[name] for name in ("model", "tools", "thinking", "system")}
    ).input_tokens == len(scripted.engine.requests[-1].prompt_token_ids)


def test_settings_are_those_of_chat(scripted: ScriptedServing) -> None:
    body = {**BODY, "max_tokens": 9, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "seed": 3}
    ignored = {"metadata": {"user_id": "me"}, "service_tier": "auto"}
    answer = scripted.http.post(PATH, json={**body, **ignored, "stop_sequences": ["a", "b"]})
    assert answer.status_code == 200
    sampling = scripted.engine.requests[-1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (9, 0.5, 5, 0.9)
    assert (sampling.stop, sampling.seed, sampling.thinking_budget) == (("a", "b"), 3, None)


def test_a_format_constrains_the_text(scripted: ScriptedServing) -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    assert (
        scripted.http.post(PATH, json={**BODY, "output_config": {"format": form, "effort": "low"}}).status_code == 200
    )
    constraint = scripted.engine.requests[-1].sampling.constraint
    assert constraint == Constraint("json_schema", '{"type":"object"}', None, "output_config.format")


def test_an_assistants_last_text_goes_on(scripted: ScriptedServing) -> None:
    scripted.say(" fox")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the quick brown"}]
    message = scripted.http.post(PATH, json={**BODY, "messages": messages}).json()
    assert scripted.prompt().endswith("the quick brown")
    assert message["content"] == [{"type": "text", "text": " fox"}]


def test_a_prompt_of_any_length_is_counted(serving: Serving) -> None:
    body = {"messages": [{"role": "user", "content": "the fox " * 10_000}]}
    assert serving.http.post(COUNT, json=body).json()["input_tokens"] > 10_000
    answer = serving.http.post(PATH, json={**body, "max_tokens": 5})
    assert answer.status_code == 400
    assert "This model's maximum context length is" in answer.json()["error"]["message"]


def check_error(answer: Any, status: int, kind: str, message: str) -> None:
    """The answer is an error body of Anthropic's."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"type", "error"} and body["type"] == "error"
    assert body["error"]["type"] == kind
    assert message in body["error"]["message"]


@pytest.mark.parametrize("path", [PATH, COUNT])
@pytest.mark.parametrize(
    ("fields", "status", "kind", "message"),
    [
        ({"model": "claude"}, 404, "not_found_error", "The model 'claude' does not exist"),
        ({"messages": []}, 400, "invalid_request_error", "messages is []"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "'image'"),
        ({"tools": [{"name": "x"}]}, 400, "invalid_request_error", "tools[0].input_schema"),
        ({"thinking": {"type": "x"}}, 400, "invalid_request_error", "thinking.type"),
    ],
)
def test_errors_are_anthropics(serving: Serving, path: str, fields: Any, status: int, kind: str, message: str) -> None:
    for stream in (False, True):
        check_error(serving.http.post(path, json={**BODY, **fields, "stream": stream}), status, kind, message)
    assert serving.channel.sent == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"max_tokens": 0}, "max_tokens is 0, it must be in 1.."),
        ({"temperature": 3}, "temperature is 3, it must be in [0, 2]"),
        ({"stop_sequences": [""]}, "stop_sequences has a string of 0 characters"),
        ({"stop_sequences": ["a"] * 65}, "stop_sequences has 65 entries, the limit is 64"),
        ({"stream": 1}, "stream is 1, it must be true or false"),
        ({"output_config": 5}, "output_config is 5, it must be a JSON object"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type is 'xml', it must be one of text"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema is null, it must be a"),
    ],
)
def test_a_wrong_setting_is_named(serving: Serving, fields: Any, message: str) -> None:
    check_error(serving.http.post(PATH, json={**BODY, **fields}), 400, "invalid_request_error", message)


def test_every_way_to_fail_is_anthropics(make_serving) -> None:
    serving = make_serving(config=ServerConfig(api_key=("k",)), max_requests=0)
    with serving.listening():
        check_error(serving.http.post(PATH, json=BODY), 401, "authentication_error", "valid key")
        headers = {"x-api-key": "k"}
        check_error(serving.http.get(PATH, headers=headers), 405, "invalid_request_error", "Method Not Allowed")
        check_error(serving.http.post(PATH, content=b"{", headers=headers), 400, "invalid_request_error", "--max-queue")
        check_error(serving.http.post(COUNT, content=b"{", headers=headers), 400, "invalid_request_error", "valid JSON")
        assert "param" in serving.http.get("/v1/models/x", headers=headers).json()["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_gets_no_token_in_time_is_408(serving: Serving, stream: bool) -> None:
    answer = serving.http.post(PATH, json={**BODY, "timeout": 0.5, "stream": stream})
    check_error(answer, 408, "timeout_error", "time was over")
