"""Anthropic's Messages API, its requests: turns of blocks -> messages as a chat template reads them, tools, thinking.

Every mistake is an InvalidRequest that names the block.
"""

import itertools

from server.api.chat_messages import (
    MAX_MESSAGES,
    MAX_PARTS,
    Message,
    merge_messages,
    place_system_messages,
    read_arguments,
    read_content,
    read_text,
)
from server.api.conversations import CONVERSATION_FIELDS, Conversation, read_flat_tools
from server.api.fields import Fields, known_fields, shown, split_list
from server.api.tools import AUTO, NAMED, NONE, REQUIRED, Choice, Tool, Tools, mistake, read_function
from server.errors import InvalidRequest

MESSAGES_FIELDS = known_fields(
    *CONVERSATION_FIELDS, "messages", "system", "stop_sequences", "thinking", "output_config"
)
_MESSAGE = known_fields("role", "content")
_BLOCK = known_fields("type", "text", "thinking", "id", "name", "input", "tool_use_id", "content")
_TOOL = known_fields("type", "name", "description", "input_schema", "strict")
_CHOICE = known_fields("type", "name", "disable_parallel_tool_use")
_THINKING = known_fields("type", "budget_tokens")
_CHOICES = {"auto": AUTO, "any": REQUIRED, "tool": NAMED, "none": NONE}
_BLOCKS = {
    "system": ("text",),
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
}
_THINKS = {"enabled": True, "adaptive": True, "disabled": False}


def read_conversation(fields: Fields) -> Conversation:
    """What the model is to answer. An assistant's text that comes last is to go on. Turns of the system's, which agents
    send with what changes on the way, are read like a chat's."""
    entries = split_list("messages", fields.raw("messages"), MAX_MESSAGES)
    if not entries:
        raise InvalidRequest("messages is [], it must be a list of at least one entry", "messages")
    messages = [message for i, entry in enumerate(entries) for message in _read_turn(entry, f"messages[{i}]")]
    if fields.has("system"):
        messages.insert(0, {"role": "system", "content": read_content("system", fields.raw("system"))})
    messages = place_system_messages(messages)
    thinks, budget = _read_thinking(fields)
    continues = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    return Conversation(messages, "messages", _read_tools(fields), thinks, continues, budget)


def _read_turn(entry: bytes, where: str) -> list[Message]:
    """One turn: results of calls are messages of their own."""
    fields = Fields(_MESSAGE, entry, where)
    role, name, raw = fields.value("role"), fields.name("content"), fields.raw("content")
    if not isinstance(role, str) or role not in _BLOCKS:
        name = fields.name("role")
        raise InvalidRequest(f"{name} is {shown(role)}, it must be user, assistant or system", name)
    if raw[:1] != b"[":
        return [{"role": role, "content": read_text(name, raw, "a string or a list of blocks")}]
    blocks = split_list(name, raw, MAX_PARTS)
    read = [_read_block(Fields(_BLOCK, block, f"{name}[{i}]"), role) for i, block in enumerate(blocks)]
    messages: list[Message] = []
    for own_role, group in itertools.groupby(read, lambda message: message["role"]):
        parts = list(group)
        messages += [merge_messages(parts)] if own_role == role else parts
    return messages or [{"role": role, "content": ""}]


def _read_block(fields: Fields, role: str) -> Message:
    """One block, as if it were all of its message."""
    kind = fields.value("type")
    if kind not in _BLOCKS[role]:
        rule = f"it must be one of {', '.join(_BLOCKS[role])}"
        raise InvalidRequest(f"{fields.name('type')} is {shown(kind)}, {rule}", fields.name("type"))
    if kind == "text":
        return {"role": role, "content": read_text(fields.name("text"), fields.raw("text"))}
    if kind == "thinking":
        thought = read_text(fields.name("thinking"), fields.raw("thinking"))
        return {"role": role, "content": "", "reasoning_content": thought}
    if kind == "tool_result":
        call_id = read_text(fields.name("tool_use_id"), fields.raw("tool_use_id"))
        return {
            "role": "tool",
            "tool_call_id": call_id,
            "content": read_content(fields.name("content"), fields.raw("content")),
        }
    if kind == "tool_use":
        name = read_text(fields.name("name"), fields.raw("name"))
        function = {"name": name, "arguments": read_arguments(fields, "input")}
        call_id = read_text(fields.name("id"), fields.raw("id"))
        return {"role": role, "content": "", "tool_calls": [{"id": call_id, "type": "function", "function": function}]}
    return {"role": role, "content": ""}


def _read_thinking(fields: Fields) -> tuple[bool, int | None]:
    """(whether it thinks, for how many tokens at most). Unless the request asks for it, it does not."""
    if not fields.has("thinking"):
        return False, None
    thinking = Fields(_THINKING, fields.raw("thinking"), "thinking")
    kind = thinking.text("type", "")
    if kind not in _THINKS:
        rule = f"it must be one of {', '.join(_THINKS)}"
        raise InvalidRequest(f"thinking.type is {shown(kind)}, {rule}", "thinking.type")
    budget = thinking.integer("budget_tokens", None, 1)
    max_tokens = fields.integer("max_tokens", None)
    if budget is not None and max_tokens is not None and budget >= max_tokens:
        raise InvalidRequest(
            f"thinking.budget_tokens is {budget}, it must be less than max_tokens, {max_tokens}",
            "thinking.budget_tokens",
        )
    return _THINKS[kind], budget


def _read_tools(fields: Fields) -> Tools | None:
    if not fields.has("tool_choice"):
        return read_flat_tools(fields, Choice(AUTO), True, _read_tool)
    choice = Fields(_CHOICE, fields.raw("tool_choice"), "tool_choice")
    kind = choice.text("type", "")
    if kind not in _CHOICES:
        rule = f"it must be one of {', '.join(_CHOICES)}"
        raise InvalidRequest(f"tool_choice.type is {shown(kind)}, {rule}", "tool_choice.type")
    names = (choice.text("name", ""),) if kind == "tool" else None
    is_parallel = not choice.boolean("disable_parallel_tool_use", False)
    return read_flat_tools(fields, Choice(_CHOICES[kind], names), is_parallel, _read_tool)


def _read_tool(entry: bytes, where: str) -> Tool:
    fields = Fields(_TOOL, entry, where)
    if fields.value("type") not in (None, "custom"):
        raise mistake(fields.name("type"), fields.value("type"), "'custom', or be left out")
    if not fields.has("input_schema"):
        raise mistake(fields.name("input_schema"), None, "a JSON schema, which is an object")
    return read_function(fields, "input_schema")
