"""Prompts and messages that cannot be served, and what the error says."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from server.api.chat import read_chat_job
from server.api.completions import read_completion_job
from server.api.prompts import PromptReader
from server.api.requests import read_fields
from server.api.transport import MAX_BODY_BYTES
from server.errors import InvalidRequest
from server.tokenizer import Tokenizer
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import CHAT, COMPLETIONS, MESSAGES, check_error
from unit_tests.server.fake_engine import MAX_MODEL_LEN, VOCAB_SIZE


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "must be a text"),
        ("", "prompt is empty"),
        ([], "must be a text"),
        ([""], "prompt is empty"),
        ([[]], "prompt is empty"),
        ([-1], f"0..{VOCAB_SIZE - 1}"),
        ([5, VOCAB_SIZE], f"`int` <= {VOCAB_SIZE - 1} - at `$[1]`"),
        ([[5], [5, -7]], "prompt[1] is [5,-7]"),
        ([1.5], "`float`"),
        ([5, "a"], "Expected `int`, got `str` - at `$[1]`"),
        (["a", 5], "prompt[1] is 5, it must be a string"),
        ([5, True], "`bool`"),
        ([[5], {}], "prompt[1] is {}, it must be a list of token ids"),
        ([{}], "must be a text"),
        ([True], "must be a text"),
        ({"a": 1}, "must be a text"),
        (5, "must be a text"),
        (["a"] * 1025, "more than 1024 entries"),
        ([[5]] * 1025, "more than 1024 entries"),
    ],
)
def test_a_wrong_prompt_is_explained(serving: Serving, value: Any, message: str) -> None:
    check_error(serving.http.post(COMPLETIONS, json={"prompt": value}), 400, "prompt", message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "must be a list"),
        ([], "at least one"),
        ("hi", "must be a list"),
        ([5], "messages[0] is 5"),
        ([{}], "messages[0].role"),
        ([{"role": 5, "content": "a"}], "messages[0].role is 5"),
        ([{"role": "user"}], "messages[0].content is null"),
        ([{"role": "user", "content": 5}], "messages[0].content is 5"),
        ([{"role": "user", "content": ["text"]}], 'content[0] is "text", it must be a JSON object'),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'text'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text is null"),
        ([{"role": "assistant", "reasoning_content": 5}], "messages[0].reasoning_content is 5"),
        (MESSAGES * 4097, "more than 4096 entries"),
        ([{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}], "more than 1024 entries"),
    ],
)
def test_wrong_messages_are_explained(serving: Serving, value: Any, message: str) -> None:
    check_error(serving.http.post(CHAT, json={"messages": value}), 400, "messages", message)


@pytest.mark.parametrize("prompt", [[5] * MAX_MODEL_LEN, "the fox " * 200, "x" * 1_000_000, ["ok", "the fox " * 200]])
def test_a_prompt_over_the_context_limit_starts_with_the_words_clients_look_for(serving: Serving, prompt: Any) -> None:
    start = f"This model's maximum context length is {MAX_MODEL_LEN} tokens"
    message = check_error(serving.http.post(COMPLETIONS, json={"prompt": prompt}), 400, "prompt")
    assert message.startswith(start) and "prompt is too long" in message
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
        assert check_error(serving.http.post(CHAT, json={"messages": messages}), 400, "messages").startswith(start)


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tools"])
def test_template_variables_that_are_fields_of_the_request_are_refused(serving: Serving, name: str) -> None:
    body = {"messages": MESSAGES, "chat_template_kwargs": {name: []}}
    check_error(serving.http.post(CHAT, json=body), 400, "chat_template_kwargs", name)


def test_any_other_template_variable_is_the_templates(serving: Serving) -> None:
    serving.chat("hi", chat_template_kwargs={"self": 1, "message": 2, "context": {}}, max_tokens=1)


def test_what_a_template_may_read_reaches_it(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    message = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call], "x": 1}
    tool = {"type": "function", "function": {"name": "f"}, "y": 1}
    seen: list[Any] = []
    monkeypatch.setattr(serving.tokenizer, "apply_chat_template", lambda *arguments: seen.extend(arguments) or "hi")
    body = {
        "messages": [message],
        "max_tokens": 1,
        "tools": [tool],
        "documents": [{"title": "a", "text": "b"}],
        "reasoning_effort": "low",
        "chat_template_kwargs": {"z": [1]},
    }
    assert serving.http.post(CHAT, json=body).status_code == 200
    assert seen == [
        [{"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]}],
        True,
        {"enable_thinking": True, "z": [1], "documents": [{"title": "a", "text": "b"}]},
        [tool],
        None,
    ]


@pytest.mark.parametrize("add_special_tokens", [None, False, True])
def test_special_tokens_are_added_to_a_chat_only_if_asked_for(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, add_special_tokens: bool | None
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(serving.tokenizer, "encode_batch", lambda texts, added: seen.append(added) or [[5]])
    serving.chat("hi", max_tokens=1, add_special_tokens=add_special_tokens)
    assert seen == [bool(add_special_tokens)]


@pytest.mark.parametrize(
    ("template", "is_thinking"),
    [
        ("<think>\n", True),
        ("<think>", True),
        ("<think>\n\n</think>\n\n", False),
        ("<think> is a tag", False),
        ("", False),
    ],
)
def test_a_prompt_that_ends_with_an_open_thought_is_thinking(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, template: str, is_thinking: bool
) -> None:
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *_: "x" + template)
    prompt = PromptReader(tokenizer, 100, tokenizer.vocab_size).encode_chat([{"role": "user", "content": "<think>"}])
    assert prompt.is_thinking is is_thinking
    assert prompt.token_ids == tokenizer.encode("x" + template)


def test_a_conversation_of_another_api_has_the_servers_variables(tokenizer: Tokenizer) -> None:
    reader = PromptReader(tokenizer, 100, tokenizer.vocab_size, {"enable_thinking": True})
    messages = [{"role": "user", "content": "hi"}]
    assert reader.encode_chat(messages).is_thinking
    assert not reader.encode_chat(messages, {"enable_thinking": False}).is_thinking


def test_an_assistants_last_message_may_go_on(tokenizer: Tokenizer) -> None:
    reader = PromptReader(tokenizer, 100, tokenizer.vocab_size)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the fox"}]
    prompt = reader.encode_chat(messages, continues=True)
    assert tokenizer.decode(prompt.token_ids, skip_special_tokens=False).endswith("the fox")
    assert not prompt.is_thinking
    messages[-1]["content"] = "<think>the fox"
    assert reader.encode_chat(messages, continues=True).is_thinking


def test_the_field_of_a_conversation_of_another_api_is_named(tokenizer: Tokenizer) -> None:
    reader = PromptReader(tokenizer, 10, tokenizer.vocab_size)
    with pytest.raises(InvalidRequest, match="your input has") as caught:
        reader.encode_chat([{"role": "user", "content": "the fox " * 20}], name="input")
    assert caught.value.param == "input"


def test_prompts_that_are_only_counted_may_be_of_any_length(tokenizer: Tokenizer) -> None:
    reader = PromptReader(tokenizer, 10, tokenizer.vocab_size)
    messages = [{"role": "user", "content": "the fox " * 5000}]
    assert len(reader.without_limit().encode_chat(messages).token_ids) > 5000
    with pytest.raises(InvalidRequest):
        reader.encode_chat(messages)


def _repeat(entry: bytes, before: bytes, after: bytes) -> bytes:
    count = (MAX_BODY_BYTES - len(before) - len(after)) // (len(entry) + 1)
    return before + b",".join([entry] * count) + after


def _many_keys() -> bytes:
    return b'{"prompt":"a","messages":[],' + b",".join(b'"k%d":0' % i for i in range(300_000)) + b"}"


HOSTILE: dict[str, Callable[[], bytes]] = {
    "messages": lambda: _repeat(b"{}", b'{"messages":[', b"]}"),
    "keys": _many_keys,
    "keys of a message": lambda: b'{"messages":[' + _many_keys() + b"]}",
    "parts": lambda: _repeat(b'{"type":"text","text":""}', b'{"messages":[{"role":"user","content":[', b"]}]}"),
    "unknown part": lambda: _repeat(b"{}", b'{"messages":[{"role":"user","content":[{"x":[', b"]}]}]}"),
    "tool calls": lambda: _repeat(b"{}", b'{"messages":[{"role":"user","tool_calls":[', b"]}]}"),
    "tools": lambda: _repeat(b"{}", b'{"messages":[],"tools":[', b"]}"),
    "objects": lambda: _repeat(b"{}", b'{"prompt":[', b"]}"),
    "objects after a number": lambda: _repeat(b"{}", b'{"prompt":[1,', b"]}"),
    "objects after ids": lambda: _repeat(b"{}", b'{"prompt":[[1],', b"]}"),
    "texts": lambda: _repeat(b'""', b'{"prompt":[', b"]}"),
    "ids": lambda: _repeat(b"1", b'{"prompt":[', b"]}"),
    "long integers": lambda: _repeat(b"1" * 4000, b'{"prompt":[', b"]}"),
    "lists": lambda: _repeat(b"[]", b'{"prompt":[', b"]}"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_body_of_very_many_things_is_refused_without_an_object_for_each(make_serving, kind: str) -> None:
    """Whoever makes a million objects in one call holds up every stream meanwhile; a few copies of the bytes do not."""
    services, body = make_serving().services, HOSTILE[kind]()
    read = read_completion_job if b'"prompt"' in body[:20] and kind != "keys" else read_chat_job
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            read(read_fields(body, services), services)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(body)
    finally:
        tracemalloc.stop()


def test_the_longest_prompt_that_leaves_room_for_a_token_is_served(serving: Serving) -> None:
    assert serving.complete([5] * (MAX_MODEL_LEN - 1))["usage"]["completion_tokens"] == 1
