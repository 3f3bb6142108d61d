"""Asks a server through OpenAI's own client, whole or streamed, and brings all answers into one form."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import openai
import pytest

CHAT, COMPLETIONS = "chat", "completions"
# The demo's own kind of question, which it is sure of, and one that it can make nothing of.
QUESTION = "Tom has 3 boxes with 4 apples each. How many apples does he have?"
STRANGE_QUESTION = "zq#! naïve 中文 café 😀 |~ why? blue-green ünder"
# Float32 through two different kernels.
_TOLERANCE = 2e-3


@dataclass
class Choice:
    """One choice. `calls` are (name, arguments); `logprobs` are lists by name, `extras` what only some requests get."""

    text: str | None = None
    reasoning: str | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[str, list[Any]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """All choices, and [prompt tokens, completion tokens, reasoning tokens, drafts accepted, drafts rejected]."""

    choices: list[Choice]
    usage: list[int]

    @property
    def first(self) -> Choice:
        """The first choice."""
        return self.choices[0]

    @property
    def num_tokens(self) -> int:
        """Completion tokens."""
        return self.usage[1]


def say(endpoint: str, text: str = QUESTION) -> dict[str, Any]:
    """The field for a prompt."""
    if endpoint == CHAT:
        return {"messages": [{"role": "user", "content": text}]}
    return {"prompt": f"Question: {text}\nAnswer:"}


def arguments(endpoint: str, **fields: Any) -> dict[str, Any]:
    """What to call the client's `create` with: what OpenAI does not know goes into the body besides."""
    fields = {"model": "", **say(endpoint), **fields}
    resource = openai.resources.chat.Completions if endpoint == CHAT else openai.resources.Completions
    known = inspect.signature(resource.create).parameters.keys() - {"timeout"}  # the client's own
    return {
        **{name: value for name, value in fields.items() if name in known},
        "extra_body": {name: value for name, value in fields.items() if name not in known},
    }


def prompt_ids(client: openai.OpenAI, endpoint: str, **fields: Any) -> list[int]:
    """The prompt as the model reads it."""
    answer = create(client, endpoint, **{"max_tokens": 1, "return_token_ids": True, **fields}).model_dump()
    return (answer if endpoint == CHAT else answer["choices"][0])["prompt_token_ids"]


def create(client: openai.OpenAI, endpoint: str, **fields: Any) -> Any:
    """The client's answer, or its stream."""
    resource = client.chat.completions if endpoint == CHAT else client.completions
    return resource.create(**arguments(endpoint, **fields))


def ask(client: openai.OpenAI, endpoint: str, stream: bool = False, **fields: Any) -> Answer:
    """The answer in the common form. Token ids are always asked for."""
    fields = {"return_token_ids": True, **fields}
    if not stream:
        return read_whole(create(client, endpoint, **fields).model_dump())
    options = {"stream_options": {"include_usage": True}, **fields}
    return read_stream([chunk.model_dump() for chunk in create(client, endpoint, stream=True, **options)])


def read_whole(answer: dict[str, Any]) -> Answer:
    """An answer in one piece."""
    return Answer([_read_choice(choice) for choice in answer["choices"]], _read_usage(answer["usage"]))


def read_stream(chunks: Iterable[dict[str, Any]]) -> Answer:
    """The chunks of a stream, put together."""
    by_index: dict[int, list[dict[str, Any]]] = {}
    usage: dict[str, Any] = {}
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            by_index.setdefault(choice["index"], []).append(choice)
    return Answer([_join(by_index[index]) for index in sorted(by_index)], _read_usage(usage))


def assert_same(found: Answer, expected: Answer) -> None:
    """Equal but for what depends on drafts, and for the rounding of log-probabilities."""
    assert len(found.choices) == len(expected.choices)
    for one, other in zip(found.choices, expected.choices, strict=True):
        assert one.token_ids == other.token_ids, f"{one}\n  is not\n{other}"
        for name in ("text", "reasoning", "calls", "finish_reason", "stop_reason"):
            assert getattr(one, name) == getattr(other, name), f"{name}: {one}\n  is not\n{other}"
        assert_close(one.logprobs, other.logprobs)
        assert_close(one.extras, other.extras)
    assert found.usage[:3] == expected.usage[:3]


def assert_close(found: Any, expected: Any) -> None:
    """Equal JSON, but for the rounding of numbers that are not whole."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=_TOLERANCE)
    else:
        assert found == expected


def _read_choice(choice: dict[str, Any]) -> Choice:
    message = choice.get("message") or {}
    return Choice(
        text=choice.get("text", message.get("content")),
        reasoning=_reasoning(message),
        calls=[(call["function"]["name"], call["function"]["arguments"]) for call in _calls(message)],
        token_ids=choice["token_ids"] or [],
        logprobs=_join_logprobs([choice["logprobs"]]),
        finish_reason=choice["finish_reason"],
        stop_reason=choice["stop_reason"],
        extras={name: choice[name] for name in ("prompt_logprobs",) if choice.get(name)},
    )


def _join(chunks: list[dict[str, Any]]) -> Choice:
    """One choice from its chunks. Says nothing of what did not come, as a whole answer does."""
    assert [bool(chunk["finish_reason"]) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    deltas = [chunk.get("delta") or {"content": chunk.get("text")} for chunk in chunks]
    calls: dict[int, tuple[str, str]] = {}
    for call in chain.from_iterable(map(_calls, deltas)):
        function = call["function"]
        name, arguments = calls.get(call["index"], ("", ""))
        calls[call["index"]] = name + (function["name"] or ""), arguments + (function["arguments"] or "")
    content = [delta["content"] for delta in deltas if delta.get("content")]
    reasoning = [part for delta in deltas if (part := _reasoning(delta))]
    return Choice(
        text="".join(content) if content or not (reasoning or calls) else None,
        reasoning="".join(reasoning) if reasoning else None,
        calls=[calls[index] for index in sorted(calls)],
        token_ids=[*chain.from_iterable(chunk.get("token_ids") or [] for chunk in chunks)],
        logprobs=_join_logprobs([chunk["logprobs"] for chunk in chunks]),
        finish_reason=chunks[-1]["finish_reason"],
        stop_reason=chunks[-1]["stop_reason"],
    )


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls in a message, or in a part of one; in the older form there is one."""
    older = message.get("function_call")
    return [{"index": 0, "function": older}] if older else message.get("tool_calls") or []


def _reasoning(message: dict[str, Any]) -> str | None:
    assert message.get("reasoning") == message.get("reasoning_content")
    return message.get("reasoning")


def _join_logprobs(parts: Iterable[dict[str, list[Any] | None] | None]) -> dict[str, list[Any]] | None:
    given = [part for part in parts if part is not None]
    names = {name for part in given for name, values in part.items() if values is not None}
    return {name: [*chain.from_iterable(part[name] or [] for part in given)] for name in names} if given else None


def _read_usage(usage: dict[str, Any]) -> list[int]:
    details = usage["completion_tokens_details"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    counts = (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"])
    return [usage["prompt_tokens"], usage["completion_tokens"], details["reasoning_tokens"], *counts]
