"""Anthropic's Messages API, its answers: a message of blocks, whole, or with the events that lead to it."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import Response

from server.api.chat import ChatJob
from server.api.chat_format import MessageReader
from server.api.generation import Delta, Generation
from server.api.message_blocks import CALL, CLOSED, GREW, OPENED, REASONING, Block, Blocks
from server.api.services import Services
from server.messages import FINISH_ABORT, FINISH_LENGTH

Event = dict[str, Any]

_DELTAS = {
    REASONING: ("thinking_delta", "thinking"),
    CALL: ("input_json_delta", "partial_json"),
}


class MessageAnswer:
    """One message."""

    def __init__(self, services: Services, job: ChatJob, generation: Generation):
        self._job, self._generation = job, generation
        self._reader = MessageReader(services.tokenizer, job.rules)
        self._blocks = Blocks()
        self._head = {
            "id": f"msg_{generation.name}",
            "type": "message",
            "role": "assistant",
            "model": services.model_name,
        }

    async def whole(self) -> Response:
        """The message."""
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                for _ in self._take(delta):
                    pass
        content = [_write_block(block) for block in self._blocks.all]
        message = {**self._head, "content": content, **self._end(delta), "usage": self._usage()}
        return Response(msgspec.json.encode(message), media_type="application/json")

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The message as it comes."""
        has_begun = False
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                if not has_begun:
                    has_begun = True
                    yield _encode({"type": "message_start", "message": self._begin(delta)})
                    yield _encode({"type": "ping"})
                for event in self._take(delta):
                    yield _encode(event)
        yield _encode({"type": "message_delta", "delta": self._end(delta), "usage": self._usage()})
        yield _encode({"type": "message_stop"})

    def _take(self, delta: Delta) -> Iterator[Event]:
        for step, block, text in self._blocks.take(self._reader.take(delta), delta.finish_reason):
            yield from _write_events(step, block, text)

    def _begin(self, delta: Delta) -> dict[str, Any]:
        """The message before its first block."""
        usage = {**self._usage(), "output_tokens": len(delta.token_ids)}
        return {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}

    def _end(self, last: Delta) -> dict[str, Any]:
        """Why the message ended."""
        matched = last.stop_reason if isinstance(last.stop_reason, str) else None
        reason = "end_turn" if matched is None else "stop_sequence"
        if last.finish_reason == FINISH_LENGTH:
            is_full = self._generation.choices[0].num_tokens == self._job.sampling.max_tokens
            reason = "max_tokens" if is_full else "model_context_window_exceeded"
        elif last.finish_reason == FINISH_ABORT:
            reason = FINISH_ABORT
        elif any(block.kind == CALL for block in self._blocks.all):
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": matched}

    def _usage(self) -> dict[str, Any]:
        """Tokens of the prompt that were reused count apart from the others."""
        usage: dict[str, Any] = self._generation.usage()
        num_cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"thinking_tokens": self._reader.num_reasoning_tokens},
        }


def _write_block(block: Block) -> dict[str, Any]:
    if block.call is not None:
        call = {"id": block.call.call_id, "name": block.call.name}
        return {"type": "tool_use", **call, "input": _read_arguments(block.text)}
    if block.kind == REASONING:
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "text", "text": block.text}


def _write_events(step: str, block: Block, text: str) -> Iterator[Event]:
    place = {"index": block.index}
    if step == GREW:
        kind, name = _DELTAS.get(block.kind, ("text_delta", "text"))
        yield {"type": "content_block_delta", **place, "delta": {"type": kind, name: text}}
    elif step == OPENED:
        empty = _write_block(Block(block.index, block.kind, block.call))
        yield {"type": "content_block_start", **place, "content_block": empty}
    elif step == CLOSED:
        if block.kind == REASONING:
            yield {"type": "content_block_delta", **place, "delta": {"type": "signature_delta", "signature": ""}}
        yield {"type": "content_block_stop", **place}


def _read_arguments(text: str) -> msgspec.Raw:
    """The arguments as an object: an empty one if they were cut off, since half a value says something else."""
    try:
        return msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return msgspec.Raw(b"{}")


def _encode(event: Event) -> bytes:
    return b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"
