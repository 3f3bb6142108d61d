"""HTTP bodies in, event streams out, and noticing at once that a client has gone.

Works on raw ASGI messages: a disconnect is an `http.disconnect` message, and only a pending `receive` sees it. Knows
nothing of what the bodies mean.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from server.api.error_bodies import error_event, error_response
from server.errors import InvalidRequest, QueueFull, RequestTimeout, TandemError

MAX_BODY_BYTES = 4 * 2**20
# Bodies that have come in, whole or in part, and have not been read yet.
MAX_HELD_BYTES = 64 * MAX_BODY_BYTES
# So much of a body over the limit is read on and thrown away, so that the client sees the answer and not a reset.
_MAX_DISCARDED_BYTES = 15 * MAX_BODY_BYTES
DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
_JSON_TYPES = ("", "application/json")

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


class BodyReader:
    """Reads request bodies of up to `max_body_bytes`, each within `timeout` seconds. The `num_held` bytes that it holds
    of all are bounded."""

    def __init__(self, timeout: float, max_body_bytes: int = MAX_BODY_BYTES, max_held_bytes: int = MAX_HELD_BYTES):
        self._timeout = timeout
        self._max_body_bytes, self._max_held_bytes = max_body_bytes, max_held_bytes
        self.num_held = 0

    @asynccontextmanager
    async def hold(self, receive: Receive, content_type: str) -> AsyncGenerator[bytes, None]:
        """The whole request body, for as long as it is needed.

        Raises InvalidRequest if it is too long or of another content type, RequestTimeout, QueueFull, ClientGone.
        """
        chunks: list[bytes] = []
        try:
            await self._fill_in_time(chunks, receive)
            _check_content_type(content_type)
            chunks[:] = [b"".join(chunks)]  # not beside them, in twice the memory
            yield chunks[0]
        finally:
            self.num_held -= sum(map(len, chunks))

    async def _fill_in_time(self, chunks: list[bytes], receive: Receive) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._fill(chunks, receive)
        except TimeoutError as error:
            message = f"the body did not arrive within {self._timeout:g} seconds (--client-timeout)"
            raise RequestTimeout(message) from error

    async def _fill(self, chunks: list[bytes], receive: Receive) -> None:
        size, more = 0, True
        while more and size <= self._max_body_bytes + _MAX_DISCARDED_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= self._max_body_bytes:
                chunks.append(chunk)
                self.num_held += len(chunk)
            if self.num_held > self._max_held_bytes:
                raise QueueFull(f"bodies of more than {self._max_held_bytes} bytes are waiting; try again later")
        if size > self._max_body_bytes:
            raise InvalidRequest(
                f"the body has {size} bytes or more, the limit is {self._max_body_bytes}; send less at a time"
            )


async def run_until_disconnect(
    receive: Receive,
    work: Coroutine[Any, Any, T],
    patience: float | None = None,
    tick: Callable[[], Awaitable[float]] | None = None,
) -> T:
    """The result of `work`, which is cancelled and ClientGone raised when the client goes first. Until then `tick` is
    called after `patience` seconds, and again after as many as it says."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_wait_disconnect(receive))
    try:
        while not (await asyncio.wait((task, watcher), timeout=patience, return_when=asyncio.FIRST_COMPLETED))[0]:
            assert tick is not None
            patience = await tick()
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
    """A server-sent event stream of `events`, closed with `closing`.

    The answer starts with the first event: an error before it is a plain HTTP error. A later one is an error event.
    When the client goes, `events` is closed at once. A comment is sent, and starts the answer, where there was nothing
    to send for `keep_alive_interval` seconds, so that no proxy believes that the stream is dead. So what the engine
    refuses late, such as a grammar that takes long to compile, is an error event with the status in its `code`; an
    answer in one piece has no comments, and always the status itself.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], keep_alive_interval: float = 15.0, closing: bytes = DONE):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._interval = keep_alive_interval
        self._closing = closing
        self._has_begun = self._is_writing = False
        self._quiet_since = asyncio.get_running_loop().time()
        self._beginning = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the client goes first."""
        with suppress(ClientGone):
            work = self._send_all(scope, receive, send)
            await run_until_disconnect(receive, work, self._interval, lambda: self._keep_alive(send))

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    await self._write(send, event)
            except TandemError as error:
                async with self._beginning:
                    if not self._has_begun:
                        self._has_begun = True
                        await error_response(error, scope)(scope, receive, send)
                        return
                await self._write(send, error_event(error, scope))
        await self._write(send, self._closing, more=False)

    async def _keep_alive(self, send: Send) -> float:
        """A comment, if it is time for one; the seconds until it may be again."""
        seconds = self._quiet_since + self._interval - asyncio.get_running_loop().time()
        if seconds > 0:
            return seconds
        if not self._is_writing:  # else the client does not read what there is
            await self._write(send, _KEEP_ALIVE)
        return self._interval

    async def _write(self, send: Send, data: bytes, more: bool = True) -> None:
        if not self._has_begun:
            await self._begin(send)
        self._is_writing = True
        await send({"type": "http.response.body", "body": data, "more_body": more})
        self._is_writing, self._quiet_since = False, asyncio.get_running_loop().time()

    async def _begin(self, send: Send) -> None:
        """Once, even if an event and a comment come together."""
        async with self._beginning:
            if not self._has_begun:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                self._has_begun = True


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_content_type(content_type: str) -> None:
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in _JSON_TYPES and not kind.endswith("+json"):
        raise InvalidRequest(f"Content-Type is {kind[:60]!r}, it must be application/json")
