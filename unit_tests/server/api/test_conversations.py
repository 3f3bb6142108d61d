"""Three APIs, one conversation: the same prompt, the same settings, the same limits."""

from typing import Any

import pytest

from unit_tests.server.api.conftest import ScriptedServing, Serving
from unit_tests.server.api.test_requests import check_error

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "The weather", "parameters": PARAMETERS}


def chat(thinks: bool, strict: bool, choice: Any) -> dict[str, Any]:
    """The conversation as chat has it."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    return {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How warm is it 😀?"},
            {"role": "assistant", "content": "I look.", "reasoning_content": "Cold?", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "0"},
        ],
        "tools": [{"type": "function", "function": {**FUNCTION, **({"strict": True} if strict else {})}}],
        "tool_choice": choice[0],
        "chat_template_kwargs": {"enable_thinking": thinks},
        "max_completion_tokens": 50,
    }


def responses(thinks: bool, strict: bool, choice: Any) -> dict[str, Any]:
    """The same as /v1/responses has it."""
    return {
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "How warm is it 😀?"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Cold?"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "0"},
        ],
        "tools": [{"type": "function", **FUNCTION, "strict": strict}],
        "tool_choice": choice[1],
        "reasoning": {"effort": "medium" if thinks else "none"},
        "max_output_tokens": 50,
    }


def messages(thinks: bool, strict: bool, choice: Any) -> dict[str, Any]:
    """The same as /v1/messages has it."""
    call = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}}
    turn = [{"type": "thinking", "thinking": "Cold?", "signature": ""}, {"type": "text", "text": "I look."}, call]
    tool = {"name": "weather", "description": "The weather", "input_schema": PARAMETERS, "strict": strict}
    return {
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "How warm is it 😀?"},
            {"role": "assistant", "content": turn},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "0"}]},
        ],
        "tools": [tool],
        "tool_choice": choice[2],
        "thinking": {"type": "enabled" if thinks else "disabled"},
        "max_tokens": 50,
    }


CHOICES = [
    ("auto", "auto", {"type": "auto"}),
    ("required", "required", {"type": "any"}),
    ("none", "none", {"type": "none"}),
    (
        {"type": "function", "function": {"name": "weather"}},
        {"type": "function", "name": "weather"},
        {"type": "tool", "name": "weather"},
    ),
]


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_same_conversation_is_the_same_job(
    scripted: ScriptedServing, thinks: bool, strict: bool, choice: Any
) -> None:
    common = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 3, "presence_penalty": 1.5, "priority": 2}
    common |= {"cache_salt": "me", "timeout": 9, "logit_bias": {"5": 1}, "bad_words": ["fox"], "ignore_eos": True}
    for path, make in ((CHAT, chat), (RESPONSES, responses), (MESSAGES, messages)):
        answer = scripted.http.post(path, json={**make(thinks, strict, choice), **common})
        assert answer.status_code == 200, answer.text
    first, *others = scripted.engine.requests
    strict_template = '"strict": true' in scripted.tokenizer.decode(first.prompt_token_ids)
    for other in others:
        assert other.sampling == first.sampling
        assert (other.priority, other.timeout, other.cache_salt) == (2, 9.0, "me")
        if not strict_template:  # chat hands on what the client sent, to the letter
            assert other.prompt_token_ids == first.prompt_token_ids
    assert others[0].prompt_token_ids == others[1].prompt_token_ids


@pytest.mark.parametrize(
    ("path", "body"),
    [(RESPONSES, {"input": "hi"}), (MESSAGES, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9})],
)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1, "[0, 2]"),
        ("top_p", 0, "[1e-06, 1]"),
        ("top_k", 1.5, "an integer"),
        ("seed", 2**63, "9223372036854775807"),
        ("stop_token_ids", [10**6], "0.."),
        ("priority", "x", "an integer"),
        ("timeout", 0, "above 0"),
        ("cache_salt", "", "1..256"),
        ("speculative", {"max_draft": 99}, "0..2 (--mtp-step)"),
        ("chat_template_kwargs", [], "an object"),
        ("request_id", "x" * 257, "limit is 256"),
        ("tools", {}, "a list"),
        ("guided_choice", [], "at least one string"),
    ],
)
def test_common_fields_have_common_limits(
    serving: Serving, path: str, body: Any, field: str, value: Any, message: str
) -> None:
    answer = serving.http.post(path, json={**body, field: value})
    assert answer.status_code == 400
    assert field in answer.json()["error"]["message"] and message in answer.json()["error"]["message"]
    assert serving.channel.sent == []


def test_what_the_template_refuses_is_the_field_that_it_came_in(scripted: ScriptedServing) -> None:
    body = {"input": [{"role": "user", "content": "a"}, {"role": "critic", "content": "b"}]}
    check_error(scripted.http.post(RESPONSES, json=body), 400, "input", "Unexpected message role: critic")


def say(role: str, content: str) -> dict[str, str]:
    """A turn as all three APIs have it."""
    return {"role": role, "content": content}


def prompts_of(scripted: ScriptedServing, system: str, *turns: dict[str, str]) -> set[str]:
    """The prompt of a conversation, as each API makes it."""
    bodies: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [say("system", system), *turns]},
        RESPONSES: {"instructions": system, "input": list(turns)},
        MESSAGES: {"system": system, "messages": list(turns), "max_tokens": 9},
    }
    prompts = set()
    for path, body in bodies.items():
        answer = scripted.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        prompts.add(scripted.prompt())
    return prompts


def test_system_messages_anywhere_are_read_alike(scripted: ScriptedServing) -> None:
    turns = [say("user", "Hi"), say("assistant", "Hello"), say("system", "Be kind."), say("user", "Go on")]
    (before,) = prompts_of(scripted, "Be brief.\n\nBe quick.", *turns[:1])
    (prompt,) = prompts_of(scripted, "Be brief.", say("system", "Be quick."), *turns)
    start = before.removesuffix("<think>\n\n</think>\n\n")
    assert prompt.startswith(start + "Hello")
    marks = [prompt.index(text) for text in ("system\nBe brief.\n\nBe quick.", "user\nBe kind.", "user\nGo on")]
    assert marks == sorted(marks)


def test_a_system_message_amid_calls_leaves_what_is_before_it_as_it_was(scripted: ScriptedServing) -> None:
    prompts = set()
    for path, make, field in (
        (CHAT, chat, "messages"),
        (RESPONSES, responses, "input"),
        (MESSAGES, messages, "messages"),
    ):
        body = make(True, False, CHOICES[0])
        assert scripted.http.post(path, json=body).status_code == 200
        before = scripted.prompt()
        body[field].append(say("system", "Be kind."))
        answer = scripted.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        prompts.add(scripted.prompt())
        shared = before[: before.index("</tool_response>") + len("</tool_response>")]
        assert scripted.prompt().startswith(shared + "\n<tool_response>\nBe kind.\n</tool_response>")
        assert "Cold?" in shared
    assert len(prompts) == 1


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RESPONSES, b'{"input": %s}'),
        (RESPONSES, b'{"input": [{"role": "user", "content": %s}]}'),
        (RESPONSES, b'{"input": [{"type": "function_call", "call_id": "c", "name": "n", "arguments": {"x": %s}}]}'),
        (RESPONSES, b'{"input": "hi", "metadata": {"x": %s}}'),
        (RESPONSES, b'{"input": "hi", "text": {"format": {"type": "json_schema", "schema": %s}}}'),
        (RESPONSES, b'{"input": "hi", "tools": [{"type": "function", "name": "n", "parameters": {"x": %s}}]}'),
        (MESSAGES, b'{"max_tokens": 5, "messages": %s}'),
        (MESSAGES, b'{"max_tokens": 5, "messages": [{"role": "user", "content": %s}]}'),
        (MESSAGES, b'{"max_tokens": 5, "messages": [{"role": "user", "content": "x"}], "thinking": {"type": %s}}'),
        ("/generate", b'{"text": %s}'),
        ("/generate", b'{"input_ids": %s}'),
        ("/generate", b'{"text": "a", "sampling_params": {"logit_bias": %s}}'),
        ("/inference/v1/generate", b'{"token_ids": [1, %s]}'),
        ("/tokenize", b'{"messages": %s}'),
        ("/detokenize", b'{"tokens": %s}'),
        ("/abort_requests", b'{"request_ids": %s}'),
    ],
)
def test_what_is_nested_too_deeply_is_refused(serving: Serving, path: str, body: bytes) -> None:
    answer = serving.http.post(path, content=body.replace(b"%s", DEEP))
    assert answer.status_code == 400
    assert len(answer.content) < 1000
    assert serving.channel.sent == []
