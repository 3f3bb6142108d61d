"""Constrained answers of real engines behind the endpoints, with and without drafts."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from server.tokenizer import Tokenizer
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.api.conftest import Serving
from unit_tests.server.engines import make_engine

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}, "b": {"type": "string", "maxLength": 4}},
    "required": ["a", "b"],
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
COMMON = {"max_tokens": 120, "seed": 3}


@pytest.fixture(scope="module")
def servings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Serving]]:
    checkpoint: Path = make_checkpoint(tmp_path_factory.mktemp("answers"), num_layers=4, close_draft=True)
    tokenizer = Tokenizer(checkpoint)
    plain, drafting = (Serving(make_engine(checkpoint, mtp_step=k, overlap="on"), tokenizer) for k in (0, 3))
    with plain.listening(), drafting.listening():
        yield [plain, drafting]


def is_valid(text: str) -> bool:
    return jsonschema_rs.Draft202012Validator(SCHEMA).is_valid(json.loads(text))


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"response_format": JSON_SCHEMA}, is_valid),
        ({"guided_json": json.dumps(SCHEMA), "ignore_eos": True, "min_tokens": 99}, is_valid),
        ({"structured_outputs": {"regex": "[ab]{3,5}!"}}, lambda text: re.fullmatch("[ab]{3,5}!", text)),
        ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"regex": r"\d{2}", "presence_penalty": 1.5, "top_k": 5}, lambda text: re.fullmatch(r"\d{2}", text)),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_are_what_was_asked_for_whole_and_streamed(
    servings: list[Serving], fields: dict[str, Any], check: Any, temperature: float
) -> None:
    fields = {**COMMON, **fields, "temperature": temperature}
    answers = [serving.complete("ab", **fields)["choices"][0] for serving in servings]
    for serving, answer in zip(servings, answers, strict=True):
        assert answer["finish_reason"] == "stop" and check(answer["text"]), answer
        events = serving.events("/v1/completions", prompt="ab", **fields)
        assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == answer["text"]
        content = serving.chat("ab", **fields)["choices"][0]["message"]["content"]
        assert check(content)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("budget", range(5))
def test_the_content_behind_the_reasoning_is_constrained(servings: list[Serving], budget: int) -> None:
    fields = {**COMMON, "chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": budget}
    messages = [serving.chat("ab", response_format=JSON_SCHEMA, **fields)["choices"][0] for serving in servings]
    assert messages[0] == messages[1] and messages[0]["finish_reason"] == "stop"
    assert is_valid(messages[0]["message"]["content"])


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_regex": "(ab"}, "guided_regex", "unclosed group"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "shoe"}}}},
            "response_format",
            "shoe",
        ),
        ({"structured_outputs": {"json": '{"type":'}}, "structured_outputs", "not valid JSON"),
        ({"structured_outputs": {"regex": "[a&&b]"}}, "structured_outputs", "nothing may follow"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_compiled_is_a_plain_400(
    servings: list[Serving], fields: dict[str, Any], param: str, message: str, path: str, stream: bool
) -> None:
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "stream": stream, **fields}
    for serving in servings:
        answer = serving.http.post(path, json=body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param and message in error["message"] and param in error["message"]


def test_tokens_and_words_are_banned(servings: list[Serving]) -> None:
    ids = [ord(letter) for letter in "xyz"]
    for serving in servings:
        text = serving.complete("ab", **COMMON, allowed_token_ids=ids, bad_words=["xy"])["choices"][0]["text"]
        assert len(text) == 120 and set(text) <= set("xyz") and "xy" not in text
