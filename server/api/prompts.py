"""Prompts: chat messages or raw text or ids -> token ids that fit the context.

Runs in the thread pool, since rendering and tokenising a long prompt takes longer than a decode step. Every mistake is
an InvalidRequest. Knows neither sampling nor HTTP.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from server.api.fields import Fields, require_integer, shown
from server.errors import InvalidRequest
from server.tokenizer import Tokenizer

MAX_PROMPTS = 1024
_NO_LIMIT = 2**62


class PromptReader:
    """Reads the prompts of requests for one tokenizer and one context limit (tokens)."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int, vocab_size: int):
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size

    def read_messages(self, fields: Fields) -> list[int]:
        """Token ids of a chat request's `messages`, with `chat_template_kwargs` and `add_generation_prompt`."""
        messages = [_read_message(i, value) for i, value in enumerate(self._read_list(fields, "messages"))]
        text = self._tokenizer.apply_chat_template(
            messages,
            **{
                **fields.mapping("chat_template_kwargs"),
                "add_generation_prompt": fields.boolean("add_generation_prompt", True),
            },
        )
        return self._encode([text], "messages", add_special_tokens=False)[0]

    def read_prompts(self, fields: Fields) -> list[list[int]]:
        """Token ids of every prompt of a completions request: a text, ids, or a list of either."""
        self._check_count(fields.raw("prompt"))
        value = fields.value("prompt", _NO_LIMIT)
        if isinstance(value, str):
            return self._encode([value], "prompt", add_special_tokens=True)
        if not isinstance(value, list) or not value:
            raise InvalidRequest(f"prompt is {shown(value)}, it must be a text, token ids or a list of them", "prompt")
        if _is_number(value[0]):
            return [self._check_ids("prompt", value)]
        _check_num_prompts(len(value))
        if all(isinstance(text, str) for text in value):
            return self._encode(value, "prompt", add_special_tokens=True)
        return [self._check_ids(f"prompt[{i}]", ids) for i, ids in enumerate(value)]

    def _check_count(self, raw: bytes) -> None:
        """Refuse hopelessly long lists by their commas and brackets; decoding one would hold up the streams."""
        first = raw[1:64].lstrip()[:1]
        if raw[:1] == b"[" and first == b"[":
            _check_num_prompts(raw.count(b"[") - 1)
        elif raw[:1] == b"[" and first.isdigit() and raw.count(b",") >= self._max_model_len:
            raise self._overflow("prompt", f"{raw.count(b',') + 1} tokens")

    def _read_list(self, fields: Fields, name: str) -> list[Any]:
        value = fields.value(name, _NO_LIMIT)
        if not isinstance(value, list) or not value:
            raise InvalidRequest(f"{name} is {shown(value)}, it must be a list of at least one entry", name)
        if len(value) > self._max_model_len:  # a message takes at least one token
            raise self._overflow(name, f"{len(value)} messages")
        return value

    def _encode(self, texts: Sequence[str], name: str, add_special_tokens: bool) -> list[list[int]]:
        for text in texts:
            self._check_size(name, text)
        prompts = self._tokenizer.encode_batch(texts, add_special_tokens)
        for token_ids in prompts:
            self._check_length(name, token_ids)
        return prompts

    def _check_size(self, name: str, text: str) -> None:
        """Refuse text that is too long for any tokenisation, without the seconds that tokenising it would take.

        Only normalised text counts: normalising other text can shrink it.
        """
        min_tokens = len(text) // self._tokenizer.longest_token_len
        if min_tokens >= self._max_model_len and unicodedata.is_normalized("NFC", text):
            raise self._overflow(name, f"{len(text)} characters, which are at least {min_tokens} tokens")

    def _check_ids(self, name: str, ids: Any) -> list[int]:
        if not isinstance(ids, list):
            raise InvalidRequest(f"{name} is {shown(ids)}, it must be a list of token ids", "prompt")
        self._check_length("prompt", ids)
        for i, token_id in enumerate(ids):
            require_integer(f"{name}[{i}]", token_id, 0, self._vocab_size - 1)
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


def _check_num_prompts(num_prompts: int) -> None:
    if num_prompts > MAX_PROMPTS:
        raise InvalidRequest(f"prompt has {num_prompts} entries, the limit is {MAX_PROMPTS}", "prompt")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_message(index: int, message: Any) -> Mapping[str, Any]:
    name = f"messages[{index}]"
    if not isinstance(message, dict):
        raise InvalidRequest(f"{name} is {shown(message)}, it must be an object", "messages")
    role = message.get("role")
    if not isinstance(role, str):
        raise InvalidRequest(f"{name}.role is {shown(role)}, it must be a string", "messages")
    content = message.get("content")
    if content is None and role != "assistant":
        raise InvalidRequest(f"{name}.content is null, only an assistant's may be", "messages")
    content = _read_content(f"{name}.content", content)
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _read_content(name: str, content: Any) -> str:
    """A text as it is, text parts joined, null (an assistant's turn of tool calls) as nothing."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise InvalidRequest(f"{name} is {shown(content)}, it must be a string or a list of text parts", "messages")
    return "".join(_read_part(f"{name}[{i}]", part) for i, part in enumerate(content))


def _read_part(name: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise InvalidRequest(f"{name} is {shown(part)}, it must be an object", "messages")
    if part.get("type") != "text":
        raise InvalidRequest(f"{name}.type is {shown(part.get('type'))}, the supported type is 'text'", "messages")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{name}.text is {shown(text)}, it must be a string", "messages")
    return text
