"""HTTP bodies in, event streams out, and noticing at once that a client has gone.

Works on raw ASGI messages: a disconnect is an `http.disconnect` message, and only a pending `receive` sees it. Knows
nothing of what the bodies mean.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from server.api.error_bodies import error_body, error_response
from server.errors import InvalidRequest, TandemError

MAX_BODY_BYTES = 4 * 2**20
# A body over the limit is read on and thrown away up to here, so that the client sees the answer and not a reset.
_MAX_DISCARDED_BYTES = 16 * MAX_BODY_BYTES
_DONE = b"data: [DONE]\n\n"
_JSON_TYPES = ("", "application/json")

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


async def read_body(receive: Receive, content_type: str) -> bytes:
    """The whole request body. Raises InvalidRequest over 4 MiB or for another content type, ClientGone."""
    chunks: list[bytes] = []
    size, more = 0, True
    while more and size <= _MAX_DISCARDED_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            chunks.append(chunk)
    if size > MAX_BODY_BYTES:
        raise InvalidRequest(f"the body has {size} bytes or more, the limit is {MAX_BODY_BYTES}; send fewer prompts")
    _check_content_type(content_type)
    return b"".join(chunks)


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled and ClientGone raised when the client goes first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_wait_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.wait((task, watcher))


def encode_event(payload: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


class EventStream(Response):
    """A server-sent event stream of `events`, closed with [DONE].

    The answer starts with the first event: an error before it is a plain HTTP error. A later one is an error event.
    When the client goes, `events` is closed at once.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the client goes first."""
        with suppress(ClientGone):
            await run_until_disconnect(receive, self._send_all(scope, receive, send))

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                first = await anext(events)
            except TandemError as error:
                await error_response(error)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _send_event(send, first)
            try:
                async for event in events:
                    await _send_event(send, event)
            except TandemError as error:
                await _send_event(send, encode_event(error_body(error)))
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})


async def _send_event(send: Send, event: bytes) -> None:
    await send({"type": "http.response.body", "body": event, "more_body": True})


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_content_type(content_type: str) -> None:
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in _JSON_TYPES and not kind.endswith("+json"):
        raise InvalidRequest(f"Content-Type is {kind[:60]!r}, it must be application/json")
