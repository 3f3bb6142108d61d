"""Prompts: chat messages or raw text or ids -> token ids that fit the context.

Runs in the thread pool, since rendering and tokenising a long prompt takes longer than a decode step. Every mistake is
an InvalidRequest. Knows neither sampling nor HTTP.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from server.api.fields import Fields, decode_json, known_fields, shown, shown_json, split_list
from server.errors import InvalidRequest
from server.tokenizer import Tokenizer

PROMPT_FIELDS = ("messages", "add_generation_prompt", "chat_template_kwargs", "prompt")
MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_PARTS = 1024
# Unicode normalisation makes one character of at most four (U+1F82 and its like).
_MOST_COMPOSED = 4
# What a chat template may read of a message besides its role and content.
_EXTRAS = ("name", "tool_calls", "tool_call_id")
_MESSAGE = known_fields("role", "content", "reasoning_content", *_EXTRAS)
_PART = known_fields("type", "text")


class PromptReader:
    """Reads the prompts of requests for one tokenizer and one context limit (tokens)."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int, vocab_size: int):
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        # In range by the decoder already, which would take its time over integers of thousands of digits.
        self._ids_type: type[list[int]] = list[Annotated[int, msgspec.Meta(ge=0, le=vocab_size - 1)]]
        self._ids_rule = f"a list of token ids in 0..{vocab_size - 1}"

    def read_messages(self, fields: Fields) -> list[int]:
        """Token ids of a chat request's `messages`, with `chat_template_kwargs` and `add_generation_prompt`."""
        entries = split_list("messages", fields.raw("messages"), MAX_MESSAGES)
        if not entries:
            raise InvalidRequest("messages is [], it must be a list of at least one entry", "messages")
        messages = [_read_message(f"messages[{i}]", entry) for i, entry in enumerate(entries)]
        add_generation_prompt = fields.boolean("add_generation_prompt", True)
        variables = fields.mapping("chat_template_kwargs")
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt, variables)
        return self._encode([text], "messages", add_special_tokens=False)[0]

    def read_prompts(self, fields: Fields) -> list[list[int]]:
        """Token ids of every prompt of a completions request: a text, ids, or a list of either."""
        raw = fields.raw("prompt")
        if raw[:1] == b'"':
            return self._encode([_read_text("prompt", raw)], "prompt", add_special_tokens=True)
        first = raw[1:].lstrip()[:1] if raw[:1] == b"[" else b""
        if first == b"-" or first.isdigit():
            return [self._read_ids("prompt", raw)]
        if first == b'"':
            entries = split_list("prompt", raw, MAX_PROMPTS)
            texts = [_read_text(f"prompt[{i}]", entry) for i, entry in enumerate(entries)]
            return self._encode(texts, "prompt", add_special_tokens=True)
        if first == b"[":
            entries = split_list("prompt", raw, MAX_PROMPTS)
            return [self._read_ids(f"prompt[{i}]", entry) for i, entry in enumerate(entries)]
        raise InvalidRequest(f"prompt is {shown_json(raw)}, it must be a text, token ids or a list of them", "prompt")

    def _encode(self, texts: Sequence[str], name: str, add_special_tokens: bool) -> list[list[int]]:
        for text in texts:
            self._check_size(name, text)
        prompts = self._tokenizer.encode_batch(texts, add_special_tokens)
        for token_ids in prompts:
            self._check_length(name, token_ids)
        return prompts

    def _check_size(self, name: str, text: str) -> None:
        """Refuse text that is too long for any tokenisation, without the seconds that tokenising it would take."""
        num_composed = 1 if text.isascii() else _MOST_COMPOSED
        min_tokens = len(text) // (num_composed * self._tokenizer.longest_token_len)
        if min_tokens >= self._max_model_len:
            raise self._overflow(name, f"{len(text)} characters, which are at least {min_tokens} tokens")

    def _read_ids(self, name: str, raw: bytes) -> list[int]:
        num_ids = raw.count(b",") + 1
        if num_ids >= self._max_model_len:
            raise self._overflow("prompt", f"{num_ids} tokens")
        ids = decode_json(name, raw, self._ids_type, self._ids_rule)
        self._check_length("prompt", ids)
        return ids

    def _check_length(self, name: str, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise InvalidRequest(f"{name} is empty, it must have at least one token", name)
        if len(token_ids) >= self._max_model_len:
            raise self._overflow(name, f"{len(token_ids)} tokens")

    def _overflow(self, name: str, seen: str) -> InvalidRequest:
        # Clients recognise the error by its first words.
        return InvalidRequest(
            f"This model's maximum context length is {self._max_model_len} tokens. However, your {name} has {seen}, "
            "and at least one is needed for the output (--max-model-len)",
            name,
        )


def _read_message(name: str, raw: bytes) -> dict[str, Any]:
    fields = Fields(_MESSAGE, raw, name)
    role = _read_text(f"{name}.role", fields.raw("role"))
    message = {extra: fields.value(extra) for extra in _EXTRAS if fields.has(extra)}
    if fields.has("reasoning_content"):
        message["reasoning_content"] = _read_text(f"{name}.reasoning_content", fields.raw("reasoning_content"))
    if role != "assistant" and not fields.has("content"):
        raise InvalidRequest(f"{name}.content is null, only an assistant's may be", f"{name}.content")
    content = _read_content(f"{name}.content", fields.raw("content"))
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _read_content(name: str, raw: bytes) -> str:
    """A text as it is, text parts joined, nothing (an assistant's turn of tool calls) as an empty text."""
    if raw[:1] == b"[":
        parts = split_list(name, raw, MAX_PARTS)
        return "".join(_read_part(f"{name}[{i}]", part) for i, part in enumerate(parts))
    return _read_text(name, raw, "a string or a list of text parts") if raw else ""


def _read_part(name: str, raw: bytes) -> str:
    fields = Fields(_PART, raw, name)
    kind = fields.value("type")
    if kind != "text":
        raise InvalidRequest(f"{name}.type is {shown(kind)}, the supported type is 'text'", f"{name}.type")
    return _read_text(f"{name}.text", fields.raw("text"))


def _read_text(name: str, raw: bytes, rule: str = "a string") -> str:
    """A string of any length."""
    if raw[:1] != b'"':
        raise InvalidRequest(f"{name} is {shown_json(raw)}, it must be {rule}", name)
    return decode_json(name, raw, str, rule)
