"""Prompts and messages that cannot be served, and what the error says."""

from typing import Any

import pytest

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
        ([5, VOCAB_SIZE], f"prompt[1] is {VOCAB_SIZE}"),
        ([[5], [5, -7]], "prompt[1][1] is -7"),
        ([1.5], "an integer"),
        ([5, "a"], "an integer"),
        (["a", 5], "list of token ids"),
        ([5, True], "an integer"),
        ({"a": 1}, "must be a text"),
        (5, "must be a text"),
        (["a"] * 1025, "limit is 1024"),
        ([[5]] * 1025, "prompt has 1025 entries, the limit is 1024"),
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
        ([{"role": "user", "content": ["text"]}], "must be an object"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'text'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text is null"),
        ([*MESSAGES, {"role": "system", "content": "x"}], "system comes first"),
    ],
)
def test_wrong_messages_are_explained(serving: Serving, value: Any, message: str) -> None:
    check_error(serving.http.post(CHAT, json={"messages": value}), 400, "messages", message)


@pytest.mark.parametrize("prompt", [[5] * MAX_MODEL_LEN, "the fox " * 200, "x" * 1_000_000, ["ok", "the fox " * 200]])
def test_a_prompt_over_the_context_limit_starts_with_the_words_clients_look_for(serving: Serving, prompt: Any) -> None:
    start = f"This model's maximum context length is {MAX_MODEL_LEN} tokens"
    message = check_error(serving.http.post(COMPLETIONS, json={"prompt": prompt}), 400, "prompt")
    assert message.startswith(start)
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
        assert check_error(serving.http.post(CHAT, json={"messages": messages}), 400, "messages").startswith(start)


def test_the_longest_prompt_that_leaves_room_for_a_token_is_served(serving: Serving) -> None:
    assert serving.complete([5] * (MAX_MODEL_LEN - 1))["usage"]["completion_tokens"] == 1
