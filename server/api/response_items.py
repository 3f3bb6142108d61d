"""The items of /v1/responses: those of a request -> messages as a chat template reads them, and an answer's blocks ->
items and events.

An assistant's turn is several items here, and one message there. Every mistake is an InvalidRequest that names the
item.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from server.api.chat_messages import (
    MAX_PARTS,
    Message,
    merge_messages,
    place_system_messages,
    read_arguments,
    read_content,
    read_message,
    read_text,
)
from server.api.fields import Fields, known_fields, shown, split_list
from server.api.message_blocks import CALL, CONTENT, GREW, OPENED, REASONING, Block
from server.errors import InvalidRequest

MESSAGE, THOUGHT, FUNCTION_CALL, FUNCTION_OUTPUT = "message", "reasoning", "function_call", "function_call_output"
# Stands for an item of a response that was stored; who reads it looks it up first.
REFERENCE = "item_reference"
_KINDS = (MESSAGE, THOUGHT, FUNCTION_CALL, FUNCTION_OUTPUT)
_ITEM = known_fields("type", "call_id", "name", "arguments", "output", "content", "summary")
_PART = known_fields("text")
_PREFIXES = {CALL: "fc_", REASONING: "rs_", CONTENT: "msg_"}
_EVENTS = {
    CALL: "response.function_call_arguments",
    REASONING: "response.reasoning_text",
    CONTENT: "response.output_text",
}

Event = dict[str, Any]


def read_items(items: Sequence[tuple[bytes, str]]) -> list[Message]:
    """The messages of items, each with its place; system messages are where a template takes them."""
    groups: list[list[Message]] = []
    for raw, where in items:
        fields = Fields(_ITEM, raw, where)
        kind = fields.value("type") if fields.has("type") else MESSAGE
        if kind not in _KINDS:
            name = fields.name("type")
            raise InvalidRequest(f"{name} is {shown(kind)}, it must be one of {', '.join([*_KINDS, REFERENCE])}", name)
        message = read_message(raw, where) if kind == MESSAGE else _read_item(fields, kind)
        if groups and _joins(groups[-1][-1], message):
            groups[-1].append(message)
        else:
            groups.append([message])
    return place_system_messages([merge_messages(group) for group in groups])


def _read_item(fields: Fields, kind: str) -> Message:
    """One item that is no message, as a message."""
    if kind == THOUGHT:
        return {"role": "assistant", "content": "", "reasoning_content": _read_thought(fields)}
    call_id = read_text(fields.name("call_id"), fields.raw("call_id"))
    if kind == FUNCTION_OUTPUT:
        output = read_content(fields.name("output"), fields.raw("output"))
        return {"role": "tool", "tool_call_id": call_id, "content": output}
    name = read_text(fields.name("name"), fields.raw("name"))
    call = {"name": name, "arguments": read_arguments(fields, "arguments")}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": call_id, "type": "function", "function": call}]}


def _read_thought(fields: Fields) -> str:
    """The reasoning itself, or what there is in its place."""
    name = "content" if fields.has("content") else "summary"
    parts = split_list(fields.name(name), fields.raw(name), MAX_PARTS)
    texts = [Fields(_PART, part, fields.name(f"{name}[{i}]")) for i, part in enumerate(parts)]
    return "".join(read_text(text.name("text"), text.raw("text")) for text in texts)


def _joins(last: Message, message: Message) -> bool:
    """Whether a message is the next part of an assistant's turn: reasoning, content and calls, in this order."""
    if last["role"] != "assistant" or message["role"] != "assistant":
        return False
    follows = "tool_calls" in message or not (last["content"] or "tool_calls" in last)
    return follows and "reasoning_content" not in message


def write_item(block: Block, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
    """The item of a block, as far as it has come. `logprobs` are those of a message's tokens."""
    item: dict[str, Any] = {
        "id": _PREFIXES[block.kind] + block.id,
        "status": "in_progress" if block.is_open else "completed" if block.is_whole else "incomplete",
    }
    if block.call is not None:
        call = {"call_id": block.call.call_id, "name": block.call.name, "arguments": block.text}
        return {**item, "type": FUNCTION_CALL, **call}
    item["content"] = [_write_part(block, logprobs)] if block.parts else []
    if block.kind == REASONING:
        return {**item, "type": THOUGHT, "summary": [], "encrypted_content": None}
    return {**item, "type": MESSAGE, "role": "assistant"}


def write_events(step: str, block: Block, text: str, logprobs: Sequence[Any]) -> Iterator[Event]:
    """The events of a step, without their numbers."""
    place = {"output_index": block.index}
    at = {"item_id": _PREFIXES[block.kind] + block.id, **place, **({} if block.kind == CALL else {"content_index": 0})}
    scores = {"logprobs": list(logprobs)} if block.kind == CONTENT else {}
    if step == GREW:
        yield {"type": f"{_EVENTS[block.kind]}.delta", **at, "delta": text, **scores}
        return
    item = write_item(block, logprobs)
    if step == OPENED:
        yield {"type": "response.output_item.added", **place, "item": item}
        if block.kind != CALL:
            yield {"type": "response.content_part.added", **at, "part": _write_part(block, logprobs)}
        return
    done = {"text": block.text, **scores}
    if block.call is not None:
        done = {"name": block.call.name, "arguments": block.text}
    yield {"type": f"{_EVENTS[block.kind]}.done", **at, **done}
    if block.kind != CALL:
        yield {"type": "response.content_part.done", **at, "part": _write_part(block, logprobs)}
    yield {"type": "response.output_item.done", **place, "item": item}


def _write_part(block: Block, logprobs: Sequence[Any]) -> dict[str, Any]:
    if block.kind == REASONING:
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": list(logprobs)}
