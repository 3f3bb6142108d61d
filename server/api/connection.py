"""Connections of clients that keep the server waiting are closed. Knows bytes and times, not what is said.

An answer to a late body is the business of whoever reads the body; what is cut off here has had its chance.
"""

import asyncio
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.error_bodies import error_body
from server.errors import InvalidRequest

# After a body is late: time for an answer that says so.
_GRACE_SECONDS = 5.0
# So much of what a client sends ahead, before it has its answer, is taken in: only who reads sees that it leaves.
_MAX_AHEAD_BYTES = 65536
# Chunks of a body with fewer bytes than that. Nobody is served while those of one packet, up to 40,000, are parsed.
_TINY_CHUNK_BYTES, _MAX_TINY_CHUNKS = 256, 4096


class FrugalConnection(h11.Connection):
    """HTTP/1.1 without bodies in too many tiny chunks; `refusal` is what to tell the client of one. The head of a whole
    answer goes out with its body, so that the client need not wake up twice; that of a stream, at once."""

    _num_tiny = 0
    _head = b""
    refusal = ""

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # of overloads
        """What is to be written now. Raises h11.LocalProtocolError for what must not come next."""
        data = super().send(event)
        if isinstance(event, h11.Response) and any(name == b"content-length" for name, _ in event.headers):
            self._head = data or b""
            return b""
        head, self._head = self._head, b""
        return head + data if head and data is not None else data

    def next_event(self) -> Any:
        """What comes next. Raises h11.RemoteProtocolError for what is not HTTP, or costs too much."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_tiny = 0
        elif isinstance(event, h11.Data) and event.chunk_start and len(event.data) < _TINY_CHUNK_BYTES:
            self._num_tiny += 1
            if self._num_tiny > _MAX_TINY_CHUNKS:
                self.refusal = (
                    f"the body has more than {_MAX_TINY_CHUNKS} chunks of less than {_TINY_CHUNK_BYTES} bytes, the "
                    "limit; send it in larger ones"
                )
                raise h11.RemoteProtocolError(self.refusal)
        return event


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with deadlines: for a request's head, for its body, and for the client to read."""

    def __init__(self, *args: Any, client_timeout: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.conn = self._frugal = FrugalConnection(h11.SERVER)
        self._client_timeout = client_timeout
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._awaited: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The head of a request must follow in time."""
        super().connection_made(transport)
        self._expect(h11.IDLE)

    def data_received(self, data: bytes) -> None:
        """The next part of the request must follow in time; what comes behind its end must not hide that the client
        leaves."""
        super().data_received(data)
        self._expect(self.conn.their_state)
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= _MAX_AHEAD_BYTES:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Between requests uvicorn has its own deadline, until the first byte of the next one."""
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE:
            self._stop_reading()
        if self.transport.is_closing():
            self._expect_to_be_read()

    def pause_writing(self) -> None:
        """The client must read some of what waits for it in time."""
        super().pause_writing()
        self._expect_to_be_read()

    def resume_writing(self) -> None:
        """It did."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing more came, so close; but what the client has not read must not keep the connection open."""
        super().timeout_keep_alive_handler()
        self._expect_to_be_read()

    def connection_lost(self, exc: Exception | None) -> None:
        """No deadlines any more."""
        super().connection_lost(exc)
        self._stop_reading()
        self._stop_writing()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP, or has too long a head, is answered like every other mistake, if no answer has begun."""
        body = msgspec.json.encode(error_body(InvalidRequest(self._frugal.refusal or msg)))
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        is_free = self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)
        answer = (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage())
        for event in answer if is_free else ():
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """uvicorn's, which tells the log to install what this server has no use for; the request is answered as it
        is."""

    def _expect(self, state: object) -> None:
        """The client's part of the conversation must leave `state` in time, if it is one in which it is to speak."""
        if state is self._awaited:
            return
        self._stop_reading()
        if state in (h11.IDLE, h11.SEND_BODY):
            seconds = self._client_timeout + (_GRACE_SECONDS if state is h11.SEND_BODY else 0)
            self._awaited, self._reading = state, self.loop.call_later(seconds, self.transport.abort)

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._awaited = self._reading = None

    def _expect_to_be_read(self) -> None:
        self._writing = self._writing or self.loop.call_later(self._client_timeout, self.transport.abort)

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
