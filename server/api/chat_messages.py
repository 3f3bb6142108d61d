"""The `messages` of a chat request -> what a chat template reads.

Content parts are joined, `developer` is `system`, system messages go where a template takes them, and the arguments of
earlier tool calls, which clients send as JSON text, become objects. `function_call` and role `function` are older forms
of a tool call and its result. Every mistake is an InvalidRequest that names the message. Knows neither templates nor
tokens.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from server.api.fields import Fields, decode_json, known_fields, shown, shown_json, split_list
from server.errors import InvalidRequest

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TOOL_CALLS = 1024
# Of one call: longer ones fit no context, and are not made into objects.
MAX_ARGUMENTS_CHARS = 2**20
# How the decoder begins what it says of JSON that ends before its end.
_CUT_OFF = "EOF"
# The only argument of a call whose arguments are no object.
_WHOLE_TEXT = "arguments"
# What a chat template may read of a message besides what is checked here.
_EXTRAS = ("name", "tool_call_id")
_REASONING = ("reasoning_content", "reasoning")
_MESSAGE = known_fields("role", "content", "refusal", "tool_calls", "function_call", *_REASONING, *_EXTRAS)
_ROLES = {"developer": "system", "function": "tool"}
_PART = known_fields("type", "text", "refusal")
_TOOL_CALL = known_fields("id", "type", "function")
_FUNCTION = known_fields("name", "arguments")
# Parts of several APIs that hold text, and the field they hold it in.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}

Message = dict[str, Any]


def read_messages(fields: Fields) -> list[Message]:
    """The messages of a request, at least one."""
    entries = split_list("messages", fields.raw("messages"), MAX_MESSAGES)
    if not entries:
        raise InvalidRequest("messages is [], it must be a list of at least one entry", "messages")
    return place_system_messages([read_message(entry, f"messages[{i}]") for i, entry in enumerate(entries)])


def read_text(name: str, raw: bytes, rule: str = "a string") -> str:
    """A string of any length."""
    if raw[:1] != b'"':
        raise InvalidRequest(f"{name} is {shown_json(raw)}, it must be {rule}", name)
    return decode_json(name, raw, str, rule)


def read_message(entry: bytes, where: str) -> Message:
    """One message, the JSON `entry`."""
    fields = Fields(_MESSAGE, entry, where)
    role = read_text(fields.name("role"), fields.raw("role"))
    message = {extra: fields.value(extra) for extra in _EXTRAS if fields.has(extra)}
    reasoning = next((name for name in _REASONING if fields.has(name)), None)
    if reasoning is not None:
        message["reasoning_content"] = read_text(fields.name(reasoning), fields.raw(reasoning))
    calls = _read_calls(fields)
    # No calls are no field, for templates that only ask whether it is there.
    message.update({"tool_calls": calls} if calls else {})
    content = "content" if fields.has("content") or role != "assistant" else "refusal"
    if role != "assistant" and not fields.has("content"):
        raise InvalidRequest(f"{fields.name('content')} is null, only an assistant's may be", fields.name("content"))
    message["content"] = read_content(fields.name(content), fields.raw(content))
    return {**message, "role": _ROLES.get(role, role)}


def read_content(name: str, raw: bytes) -> str:
    """A text as it is, text parts joined, nothing (an assistant's turn of tool calls) as an empty text."""
    if raw[:1] == b"[":
        parts = split_list(name, raw, MAX_PARTS)
        return "".join(_read_part(Fields(_PART, part, f"{name}[{i}]")) for i, part in enumerate(parts))
    return read_text(name, raw, "a string or a list of text parts") if raw else ""


def _read_part(fields: Fields) -> str:
    kind = fields.value("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise InvalidRequest(
            f"{fields.name('type')} is {shown(kind)}, the supported type is 'text'", fields.name("type")
        )
    field = _TEXT_PARTS[kind]
    return read_text(fields.name(field), fields.raw(field))


def _read_calls(message: Fields) -> list[dict[str, Any]]:
    raws = split_list(message.name("tool_calls"), message.raw("tool_calls") or b"[]", MAX_TOOL_CALLS)
    calls = [Fields(_TOOL_CALL, raw, message.name(f"tool_calls[{i}]")) for i, raw in enumerate(raws)]
    read = [
        {**({"id": call.text("id", "")} if call.has("id") else {}), **_read_function(call, "function")}
        for call in calls
    ]
    return [*read, _read_function(message, "function_call")] if message.has("function_call") else read


def _read_function(fields: Fields, field: str) -> dict[str, Any]:
    function = Fields(_FUNCTION, fields.raw(field) or b"null", fields.name(field))
    name = read_text(function.name("name"), function.raw("name"))
    return {"type": "function", "function": {"name": name, "arguments": read_arguments(function, "arguments")}}


def read_arguments(call: Fields, field: str) -> dict[str, Any]:
    """A call's arguments as an object; clients send its JSON, or the object itself, or nothing for none.

    Models write other texts too, and calls that were cut off come back as they were answered: of a JSON object that was
    cut off this gives the members, the text that was being written included; any other text is the only argument, named
    `arguments`.
    """
    name, raw = call.name(field), call.raw(field)
    is_text = raw[:1] == b'"'
    text = read_text(name, raw) if is_text else raw.decode()
    if len(text) > MAX_ARGUMENTS_CHARS:
        raise InvalidRequest(f"{name} has {len(text)} characters, the limit is {MAX_ARGUMENTS_CHARS}", name)
    if not text.strip():
        return {}
    try:
        return decode_json(name, text.encode(), dict, "the JSON of an object")
    except InvalidRequest as error:
        if not is_text or isinstance(error.__cause__, RecursionError):
            raise
        return _read_members(text)


def _read_members(text: str) -> dict[str, Any]:
    """What can be told of arguments that are not the JSON of an object."""
    found: Any = None
    try:
        found = from_json(text)
    except ValueError as error:
        if text.lstrip()[0] == "{" and str(error).startswith(_CUT_OFF):
            found = from_json(text, allow_partial="trailing-strings")
    return found if isinstance(found, dict) else {_WHOLE_TEXT: text}


def merge_messages(parts: Sequence[Message], separator: str = "") -> Message:
    """The parts of one message as one: their contents and reasoning joined, their calls together."""
    message = {**parts[0], "content": separator.join(part["content"] for part in parts if part["content"])}
    calls = [call for part in parts for call in part.get("tool_calls", ())]
    thoughts = [part["reasoning_content"] for part in parts if "reasoning_content" in part]
    message |= {"tool_calls": calls} if calls else {}
    return message | ({"reasoning_content": "".join(thoughts)} if thoughts else {})


def place_system_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages with a system message at the beginning at most: Qwen's template refuses any other.

    Those that come first are one, with a blank line between them. A later one is a user's turn in its place or, behind
    calls and their results, one more result: a user's turn there would take the reasoning from the turns before. So
    nothing is lost, and what comes before reads as it would if the user spoke next, whom the prefix cache serves.
    """
    leading = list(itertools.takewhile(_is_system, messages))
    placed = [merge_messages(leading, "\n\n")] if leading else []
    for message in messages[len(leading) :]:
        if _is_system(message):
            is_amid_calls = placed[-1]["role"] == "tool" or "tool_calls" in placed[-1]
            message = {**message, "role": "tool" if is_amid_calls else "user"}
        placed.append(message)
    return placed


def _is_system(message: Message) -> bool:
    return bool(message["role"] == "system")
