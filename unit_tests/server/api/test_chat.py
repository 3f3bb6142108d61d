"""POST /v1/chat/completions, whole and streamed."""

from typing import Any

import openai
import pytest

from server.messages import SamplingParams
from unit_tests.server.api.conftest import CALL, ScriptedServing, Serving

PATH = "/v1/chat/completions"
TEXT = "the quick 中文"
# The fake engine answers with the prompt, so the answer is the rendered template up to its first <|im_end|>.
ANSWER = "user\nthe quick 中文"


def test_a_message_is_answered(serving: Serving) -> None:
    answer = serving.chat(TEXT)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    choice = answer["choices"][0]
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", ANSWER)
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None


def test_a_stream_begins_with_the_role_and_ends_with_one_finish_reason(serving: Serving) -> None:
    events = serving.events(PATH, messages=[{"role": "user", "content": TEXT}])
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == ANSWER
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


def test_every_choice_of_a_stream_has_its_own_role_and_finish(serving: Serving) -> None:
    events = serving.events(PATH, messages=[{"role": "user", "content": TEXT}], n=3)
    for index in range(3):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert choices[0]["delta"].get("role") == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in choices) == ANSWER
        assert sum(choice["finish_reason"] is not None for choice in choices) == 1


def test_text_parts_are_the_same_as_one_text(serving: Serving) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "quick 中文"}]
    assert serving.chat(parts)["choices"] == serving.chat(TEXT)["choices"]


def test_a_developer_is_a_system(serving: Serving) -> None:
    body = {"messages": [{"role": "developer", "content": "x"}]}
    answer = serving.http.post(PATH, json=body).json()
    assert answer["choices"][0]["message"]["content"].startswith("system\n")


def test_template_variables_and_the_generation_prompt_are_the_clients(serving: Serving) -> None:
    for fields in ({}, {"chat_template_kwargs": {"enable_thinking": True}}, {"add_generation_prompt": False}):
        serving.chat("hi", max_tokens=1, **fields)
    prompts = [serving.tokenizer.decode(m.prompt_token_ids, False) for m in serving.channel.sent]
    plain = "<|im_start|>user\nhi<|im_end|>\n"
    assert prompts == [
        plain + "<|im_start|>assistant\n",
        plain + "<|im_start|>assistant\n<think>\n",
        plain,
    ]


def test_without_a_limit_the_answer_may_fill_the_context(serving: Serving) -> None:
    answer = serving.chat("x", ignore_eos=True)
    assert answer["usage"]["total_tokens"] == serving.services.limits.max_model_len


def test_max_completion_tokens_wins_over_max_tokens(serving: Serving) -> None:
    assert serving.chat("x", max_tokens=5, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


def test_a_timeout_after_the_first_token_ends_the_message_with_abort(serving: Serving) -> None:
    fields = {"timeout": 2.5, "logprobs": True}
    choice = serving.chat(TEXT, **fields)["choices"][0]
    events = serving.events(PATH, messages=[{"role": "user", "content": TEXT}], **fields)
    choices = [event["choices"][0] for event in events]
    assert choice["finish_reason"] == choices[-1]["finish_reason"] == "abort"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == choice["message"]["content"]
    assert ANSWER.startswith(choice["message"]["content"])
    assert len(choice["logprobs"]["content"]) == 4
    assert choices[-1]["delta"] == {} and choices[-1]["logprobs"] is None


def test_reused_prompt_tokens_are_counted(serving: Serving) -> None:
    usages = [serving.chat(TEXT, cache_salt="mine", n=2)["usage"] for _ in range(2)]
    num_prompt = usages[0]["prompt_tokens"]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, num_prompt - 1]


@pytest.mark.parametrize("num_top", [0, 2])
@pytest.mark.parametrize("stream", [True, False])
def test_logprobs_have_one_entry_per_token_with_exactly_the_alternatives_asked_for(
    serving: Serving, num_top: int, stream: bool
) -> None:
    fields = {"messages": [{"role": "user", "content": TEXT}], "logprobs": True, "top_logprobs": num_top}
    if stream:
        events = serving.events(PATH, **fields)
        parts = [event["choices"][0]["logprobs"] for event in events]
        entries = [entry for part in parts if part for entry in part["content"]]
    else:
        entries = serving.http.post(PATH, json=fields).json()["choices"][0]["logprobs"]["content"]
    assert len(entries) == serving.chat(TEXT)["usage"]["completion_tokens"]
    assert all(len(entry["top_logprobs"]) == num_top for entry in entries)
    data = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert data.decode() == "<|im_start|>" + ANSWER + "<|im_end|>"


def test_the_checkpoints_sampling_defaults_hold_until_the_client_says_otherwise(make_serving) -> None:
    serving = make_serving(defaults=SamplingParams(temperature=0.6, top_p=0.95, top_k=20))
    with serving.listening():
        serving.chat("x", max_tokens=1)
        serving.chat("x", max_tokens=1, temperature=0, top_k=None)
    first, second = (message.sampling for message in serving.channel.sent)
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 0.95, 20)
    assert (second.temperature, second.top_p, second.top_k) == (0.0, 0.95, 20)


FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
MESSAGES = [{"role": "user", "content": "hi"}]
ONE_CALL: dict[str, dict[str, Any]] = {
    PATH: {
        "messages": MESSAGES,
        "tools": [{"type": "function", "function": FUNCTION}],
        "parallel_tool_calls": False,
    },
    "/v1/responses": {"input": "hi", "tools": [{"type": "function", **FUNCTION}], "parallel_tool_calls": False},
    "/v1/messages": {
        "messages": MESSAGES,
        "max_tokens": 999,
        "tools": [{"name": "weather", "input_schema": FUNCTION["parameters"]}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    },
}


@pytest.mark.parametrize(("path", "body"), ONE_CALL.items(), ids=ONE_CALL)
def test_where_one_call_may_be_made_it_ends_the_answer_of_every_api(
    scripted: ScriptedServing, path: str, body: dict[str, Any]
) -> None:
    scripted.say(f"{CALL}\n{CALL} and more")
    for _ in range(5):  # steps are cut at random
        usage = scripted.http.post(path, json=body).json()["usage"]
        counted = usage.get("completion_tokens", usage.get("output_tokens"))
        assert counted == len(scripted.tokenizer.encode(CALL))


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_may_be_called_and_all_stay_in_the_prompt(scripted: ScriptedServing, mode: Any) -> None:
    scripted.say(CALL)
    tools = [{"type": "function", "function": {"name": name}} for name in ("weather", "clock")]
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=scripted.http)
    fields: Any = {"messages": [{"role": "user", "content": "hi"}], "tools": tools}
    answer = client.chat.completions.create(
        model="tiny",
        tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools[:1]}},
        **fields,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert '"clock"' in scripted.prompt()
    constraint = scripted.engine.requests[-1].sampling.constraint
    assert constraint is not None and "<function=weather>" in constraint.text and "clock" not in constraint.text
