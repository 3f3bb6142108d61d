"""How /v1/responses writes its answers: the response object, whole, or with the events that lead to it."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Response

from server.api.chat import ChatJob
from server.api.chat_format import MessageReader
from server.api.generation import Delta, Generation
from server.api.logprobs import chat_logprobs
from server.api.message_blocks import CLOSED, CONTENT, Blocks
from server.api.message_parser import ContentPiece, Piece
from server.api.response_items import Event, write_events, write_item
from server.api.response_store import ResponseStore, Stored
from server.api.services import Services
from server.errors import TandemError
from server.messages import FINISH_LENGTH, FINISH_STOP
from server.tokenizer import Detokenizer, Tokenizer

# What a response has besides what its request says.
_CONSTANTS: dict[str, Any] = {
    "object": "response",
    "background": False,
    "completed_at": None,
    "error": None,
    "incomplete_details": None,
    "service_tier": "default",
    "truncation": "disabled",
}


@dataclass(frozen=True, kw_only=True)
class ResponseJob(ChatJob):
    """A job whose answer repeats `settings`. `items` are the conversation's, which is kept with its answer if it
    `is_stored`."""

    settings: dict[str, Any]
    items: list[bytes]
    is_stored: bool


class ResponseAnswer:
    """One response. While it is generated it is in `running`, by its `id`; then `store` may keep it."""

    def __init__(
        self,
        services: Services,
        job: ResponseJob,
        generation: Generation,
        store: ResponseStore,
        running: dict[str, "ResponseAnswer"],
    ):
        self._services, self._job, self._generation = services, job, generation
        self._store, self._running = store, running
        self._reader = MessageReader(services.tokenizer, job.rules)
        self._scores = _ContentScores(services.tokenizer, job)
        self._blocks = Blocks()
        self._scores_of: dict[str, list[Any]] = {}
        self._num_events = 0
        self._body = b""
        self.id = f"resp_{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created_at": int(time.time()), "model": services.model_name, **_CONSTANTS}

    @property
    def items(self) -> list[bytes]:
        """The items of the conversation that it answers."""
        return self._job.items

    async def whole(self) -> Response:
        """The finished response."""
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                for _ in self._take(delta):
                    pass
        return Response(self._body, media_type="application/json")

    async def events(self) -> AsyncGenerator[bytes, None]:
        """What happens to the response, with its state before and after; a failure is the last thing that does."""
        try:
            async with aclosing(self._deltas()) as deltas:
                async for delta in deltas:
                    if self._num_events == 0:
                        for kind in ("created", "in_progress"):
                            yield self._encode({"type": f"response.{kind}", "response": self.describe("in_progress")})
                    for event in self._take(delta):
                        yield self._encode(event)
        except TandemError as error:
            if self._num_events == 0:
                raise
            failed = {**self.describe("failed"), "error": {"code": "server_error", "message": error.message}}
            yield self._encode({"type": "response.failed", "response": failed})
            return
        kind = "completed" if self._status() == "completed" else "incomplete"
        yield self._encode({"type": f"response.{kind}", "response": msgspec.Raw(self._body)})

    def cancel(self) -> None:
        """End it where it is."""
        self._generation.end()

    def describe(self, status: str) -> dict[str, Any]:
        """The response as far as it has come."""
        response = {
            **self._head,
            **self._job.settings,
            "temperature": self._job.sampling.temperature,
            "top_p": self._job.sampling.top_p,
            "max_output_tokens": self._job.sampling.max_tokens,
            "top_logprobs": self._job.sampling.logprobs or 0,
            "status": status,
            "output": [write_item(block, self._scores_of.get(block.id, ())) for block in self._blocks.all],
            "usage": None if status == "in_progress" else self._usage(),
        }
        if status == "completed":
            response["completed_at"] = int(time.time())
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response

    async def _deltas(self) -> AsyncGenerator[Delta, None]:
        """Those of the generation. Behind the last one the response is written, and kept if it is to be."""
        self._running[self.id] = self
        try:
            async with aclosing(self._generation.deltas()) as deltas:
                async for delta in deltas:
                    yield delta
            self._body = await self._finish()
        finally:
            del self._running[self.id]

    def _take(self, delta: Delta) -> Iterator[Event]:
        """The events of a delta, without their numbers."""
        self._scores.take(delta)
        pieces = self._reader.take(delta)
        for step, block, text in self._blocks.take(pieces, delta.finish_reason):
            if step == CLOSED and block.kind == CONTENT:
                before = sum(other.kind == CONTENT for other in self._blocks.all[: block.index])
                self._scores_of[block.id] = self._scores.find(before)
            yield from write_events(step, block, text, self._scores_of.get(block.id, ()))

    def _status(self) -> str:
        (choice,) = self._generation.choices
        return {FINISH_STOP: "completed", FINISH_LENGTH: "incomplete"}.get(choice.finish_reason or "", "cancelled")

    async def _finish(self) -> bytes:
        response = self.describe(self._status())
        if self._job.takes_long_to_write(self._generation.choices[0].num_tokens):
            finished = await self._services.do_apart(self._write, response)
        else:
            finished = self._write(response)
        if self._job.is_stored:
            self._store.put(self.id, finished)
        return finished.body

    def _write(self, response: dict[str, Any]) -> Stored:
        own_items = {item["id"]: msgspec.json.encode(item) for item in response["output"]}
        return Stored(msgspec.json.encode(response), b"[" + b",".join(self._job.items) + b"]", own_items)

    def _usage(self) -> dict[str, Any]:
        usage: dict[str, Any] = self._generation.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            # Tokens are kept for later prompts without a request that they be, and nobody pays for it.
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reader.num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }

    def _encode(self, event: Event) -> bytes:
        payload = msgspec.json.encode({**event, "sequence_number": self._num_events})
        self._num_events += 1
        return b"event: " + event["type"].encode() + b"\ndata: " + payload + b"\n\n"


class _ContentScores:
    """Log-probabilities of the tokens of each content block. Tokens are read one by one, and wait until what follows
    tells whether they are of the content."""

    def __init__(self, tokenizer: Tokenizer, job: ResponseJob):
        self._tokenizer = tokenizer
        self._num_top = job.sampling.logprobs
        self._parser, self._detokenizer = job.rules.make_parser(), Detokenizer(tokenizer, job.sampling)
        self._is_content = False
        self._waiting: list[Any] = []
        self._groups: list[list[Any]] = []

    def take(self, delta: Delta) -> None:
        """The next tokens."""
        if self._num_top is None:
            return
        entries = chat_logprobs(self._tokenizer, delta, self._num_top)["content"]
        for token_id, entry in zip(delta.token_ids, entries, strict=True):
            self._waiting.append(entry)
            before = self._parser.is_thinking, self._parser.has_call
            self._place(self._parser.push(self._detokenizer.push([token_id])))
            if before != (self._parser.is_thinking, self._parser.has_call):
                self._waiting = []  # markup
        if delta.finish_reason is not None:
            self._place(self._parser.push(self._detokenizer.finish()))
            self._place(self._parser.finish(is_truncated=delta.finish_reason != FINISH_STOP))
            if self._is_content and delta.finish_reason == FINISH_STOP:
                self._groups[-1] += self._waiting  # the end token

    def find(self, index: int) -> list[Any]:
        """Those of a content block, which has ended."""
        return self._groups[index] if index < len(self._groups) else []

    def _place(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            is_content = isinstance(piece, ContentPiece)
            if is_content and not self._is_content:
                self._groups.append([])
            if is_content:
                self._groups[-1] += self._waiting
            self._waiting, self._is_content = [], is_content
