"""Prompts: a conversation or raw text or ids -> token ids that fit the context.

Runs in the thread pool, since rendering and tokenising a long prompt takes longer than a decode step. Every mistake is
an InvalidRequest. Knows neither sampling nor HTTP.
"""

import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from server.api.chat_messages import read_messages, read_text
from server.api.fields import Fields, decode_json, shown_json, split_list
from server.api.thinking import read_thinking
from server.api.truncation import TRUNCATION_FIELDS, Truncation, read_truncation
from server.errors import InvalidRequest
from server.tokenizer import Tokenizer

PROMPT_FIELDS = (
    *("prompt", "add_special_tokens", *TRUNCATION_FIELDS),
    *("messages", "add_generation_prompt", "continue_final_message"),
    *("chat_template", "chat_template_kwargs", "documents"),
)
MAX_PROMPTS = 1024
MAX_DOCUMENTS = 1024
# Unicode normalisation makes one character of at most four (U+1F82 and its like).
_MOST_COMPOSED = 4
_THINK, _END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as the model reads it. `is_thinking`: it ends inside the reasoning, so the output begins there.
    `last_content` is that of an assistant's message which the output goes on with."""

    token_ids: list[int]
    is_thinking: bool
    last_content: str


class PromptReader:
    """Reads the prompts of requests for one tokenizer and one context limit (tokens). `template_defaults` are variables
    for the chat template that a request may set otherwise; it may bring a template only if `trusts_templates`: one can
    take all of a processor's time."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_model_len: int,
        vocab_size: int,
        template_defaults: Mapping[str, Any] = MappingProxyType({}),
        trusts_templates: bool = False,
    ):
        self._tokenizer = tokenizer
        self._template_defaults = template_defaults
        self._trusts_templates = trusts_templates
        self._max_model_len = self._most_tokens = max_model_len
        self._num_output = self._least_output = 1
        # In range by the decoder already, which would take its time over integers of thousands of digits.
        self._ids_type: type[list[int]] = list[Annotated[int, msgspec.Meta(ge=0, le=vocab_size - 1)]]
        self._ids_rule = f"a list of token ids in 0..{vocab_size - 1}"

    def without_limit(self) -> "PromptReader":
        """One that reads prompts of any length, to count them."""
        reader = copy(self)
        reader._most_tokens = sys.maxsize
        return reader

    def for_output(self, max_tokens: int | None) -> "PromptReader":
        """One for requests that want so many tokens, None: the rest of the context. Prompts of those that want none may
        fill it."""
        reader = copy(self)
        reader._num_output = 1 if max_tokens is None else max_tokens
        reader._least_output = min(1, reader._num_output)
        return reader

    def read_chat(self, fields: Fields, tools: Sequence[Mapping[str, Any]] | None = None) -> ChatPrompt:
        """The prompt of a chat request, which offers `tools` to the model."""
        messages, variables, template = read_messages(fields), self._read_variables(fields), self._read_template(fields)
        add_special_tokens = fields.boolean("add_special_tokens", False)
        truncation = read_truncation(fields, self._max_model_len, self._num_output)
        continues = fields.boolean("continue_final_message", False)
        opens_turn = fields.boolean("add_generation_prompt", not continues)
        if continues and opens_turn:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt are both true; the last message goes on or a new one "
                "begins",
                "continue_final_message",
            )
        last = "" if opens_turn or messages[-1]["role"] != "assistant" else messages[-1]["content"]
        text, is_thinking = self._render(messages, variables, tools, continues, opens_turn, template)
        return ChatPrompt(self._encode([text], "messages", add_special_tokens, truncation)[0], is_thinking, last)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] | None = None,
        name: str = "messages",
        continues: bool = False,
    ) -> ChatPrompt:
        """The prompt of a conversation that is no chat request's, in the form that `read_messages` gives. It came as
        the field `name`. Its last message goes on if it `continues`."""
        variables = {**self._template_defaults, **variables}
        try:
            text, is_thinking = self._render(messages, variables, tools, continues)
        except InvalidRequest as error:
            error.param = name if error.param == "messages" else error.param
            raise
        return ChatPrompt(self._encode([text], name, False, None)[0], is_thinking, "")

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None,
        continues: bool,
        opens_turn: bool = True,
        template: str | None = None,
    ) -> tuple[str, bool]:
        """(the prompt, whether it ends inside the reasoning)."""
        if continues:
            text, last = self._tokenizer.continue_final_message(messages, variables, tools, template), messages[-1]
            is_open = last["content"].lstrip().startswith(_THINK) and _END_THINK not in last["content"]
            return text, is_open and last["role"] == "assistant"
        text = self._tokenizer.apply_chat_template(messages, opens_turn, variables, tools, template)
        return text, text.rstrip().endswith(_THINK)

    def read_prompts(self, fields: Fields, name: str = "prompt") -> list[list[int]]:
        """Token ids of every prompt of the field `name`: a text, ids, or a list of either."""
        raw, truncation = fields.raw(name), read_truncation(fields, self._max_model_len, self._num_output)
        add_special_tokens = fields.boolean("add_special_tokens", True)
        if raw[:1] == b'"':
            return self._encode([read_text(name, raw)], name, add_special_tokens, truncation)
        first = raw[1:].lstrip()[:1] if raw[:1] == b"[" else b""
        if first == b"-" or first.isdigit():
            return [self._read_ids(name, raw, truncation)]
        if first == b'"':
            entries = split_list(name, raw, MAX_PROMPTS)
            texts = [read_text(f"{name}[{i}]", entry) for i, entry in enumerate(entries)]
            return self._encode(texts, name, add_special_tokens, truncation)
        if first == b"[":
            entries = split_list(name, raw, MAX_PROMPTS)
            return [self._read_ids(f"{name}[{i}]", entry, truncation) for i, entry in enumerate(entries)]
        raise InvalidRequest(f"{name} is {shown_json(raw)}, it must be a text, token ids or a list of them", name)

    def _read_variables(self, fields: Fields) -> dict[str, Any]:
        """What the request sets for the chat template: `chat_template_kwargs`, and fields that stand for some of it."""
        thinking = read_thinking(fields)
        by_fields = {} if thinking is None else {"enable_thinking": thinking}
        variables = {**self._template_defaults, **by_fields, **fields.mapping("chat_template_kwargs")}
        if fields.has("documents"):
            documents = fields.items("documents", MAX_DOCUMENTS)
            if not all(isinstance(document, dict) for document in documents):
                raise InvalidRequest("documents has an entry that is not an object", "documents")
            variables["documents"] = documents
        return variables

    def _read_template(self, fields: Fields) -> str | None:
        if not fields.has("chat_template"):
            return None
        if not self._trusts_templates:
            raise InvalidRequest(
                "chat_template is not taken from requests by this server (--trust-request-chat-template); leave it out",
                "chat_template",
            )
        return fields.text("chat_template", "")

    def _encode(
        self, texts: Sequence[str], name: str, add_special_tokens: bool, truncation: Truncation | None
    ) -> list[list[int]]:
        for text in texts if truncation is None else ():
            self._check_size(name, text)
        prompts = self._tokenizer.encode_batch(texts, add_special_tokens)
        if truncation is not None:
            prompts = [truncation.cut(token_ids) for token_ids in prompts]
        for token_ids in prompts:
            self._check_length(name, token_ids)
        return prompts

    def _check_size(self, name: str, text: str) -> None:
        """Refuse text that is too long for any tokenisation, without the seconds that tokenising it would take."""
        num_composed = 1 if text.isascii() else _MOST_COMPOSED
        min_tokens = len(text) // (num_composed * self._tokenizer.longest_token_len)
        if min_tokens + self._least_output > self._most_tokens:
            raise self._overflow(name, f"{len(text)} characters, which are at least {min_tokens} tokens")

    def read_ids(self, name: str, raw: bytes) -> list[int]:
        """Token ids of the field `name`, as many as there are."""
        return decode_json(name, raw or b"null", self._ids_type, self._ids_rule)

    def _read_ids(self, name: str, raw: bytes, truncation: Truncation | None) -> list[int]:
        num_ids, field = raw.count(b",") + 1, name.partition("[")[0]
        if num_ids + self._least_output > self._most_tokens and truncation is None:
            raise self._overflow(field, f"{num_ids} tokens")
        ids = self.read_ids(name, raw)
        ids = ids if truncation is None else truncation.cut(ids)
        self._check_length(field, ids)
        return ids

    def _check_length(self, name: str, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise InvalidRequest(f"{name} is empty, it must have at least one token", name)
        if len(token_ids) + self._least_output > self._most_tokens:
            raise self._overflow(name, f"{len(token_ids)} tokens")

    def _overflow(self, name: str, seen: str) -> InvalidRequest:
        # Clients recognise the error by its first words, others by "prompt is too long".
        rest = ", and at least one is needed for the output" if self._least_output else ""
        return InvalidRequest(
            f"This model's maximum context length is {self._max_model_len} tokens. However, your {name} has {seen}"
            f"{rest}: the prompt is too long (--max-model-len)",
            name,
        )
