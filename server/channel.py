"""One typed pipe between the api and the engine: messages of `messages.py` over ZeroMQ.

`AsyncEnd` is the api's and binds; `SyncEnd` is the engine's and connects. Each message travels as (class name, fields)
in msgpack. Queues are unbounded: admission control is the api's. Knows nothing of what the messages mean. No torch.
"""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import msgspec
import zmq
import zmq.asyncio

from server.control import Control
from server.errors import ConfigError
from server.messages import Abort, Fatal, Generate, Ready, Reply, Request, StepReport

_MESSAGES = {message.__name__: message for message in (Generate, Abort, *get_args(Control), Ready, StepReport, Fatal)}
_ENVELOPE = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_DECODERS = {name: msgspec.msgpack.Decoder(message) for name, message in _MESSAGES.items()}
_ENCODER = msgspec.msgpack.Encoder()
# sun_path of a Unix socket holds 107 characters on Linux.
_MAX_ENDPOINT_LEN = 107
_LAST_WORDS_MS = 2000


def encode(message: Request | Reply) -> bytes:
    """One message as bytes."""
    return _ENCODER.encode((type(message).__name__, message))


def decode(data: bytes | memoryview) -> Any:
    """The message in `data`; raises msgspec.MsgspecError on anything that `encode` did not make."""
    name, fields = _ENVELOPE.decode(data)
    return _DECODERS[name].decode(fields)


class AsyncEnd:
    """The api's end, used from one event loop. Owns a private directory with the socket; `close` removes it."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="tandem-")
        path = str(Path(self._directory) / "engine")
        if len(path) > _MAX_ENDPOINT_LEN:
            shutil.rmtree(self._directory)
            raise ConfigError(
                f"the socket path {path} has {len(path)} characters, the limit is {_MAX_ENDPOINT_LEN}; "
                "set TMPDIR to a shorter directory"
            )
        self.endpoint = f"ipc://{path}"
        self._context = zmq.asyncio.Context()
        self._socket = _open_pair(self._context)
        self._socket.bind(self.endpoint)

    def send(self, message: Request) -> None:
        """Queue a message; never blocks. One for an engine that has gone is dropped when the end is closed."""
        self._socket.send(encode(message))

    async def receive(self) -> Reply:
        """The next message of the engine."""
        reply: Reply = decode(await self._socket.recv())
        return reply

    def close(self) -> None:
        """Drop what was not sent, and remove the socket's directory."""
        self._socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)


class SyncEnd:
    """The engine's end, used from one thread."""

    def __init__(self, endpoint: str):
        self._context = zmq.Context()
        self._socket = _open_pair(self._context)
        self._socket.connect(endpoint)

    def send(self, message: Reply) -> None:
        """Queue a message; never blocks."""
        self._socket.send(encode(message))

    def receive(self, timeout_seconds: float) -> list[Request]:
        """All messages that have arrived, in order; waits up to `timeout_seconds` for a first one."""
        if timeout_seconds > 0:
            self._socket.poll(int(timeout_seconds * 1000))
        return [decode(data) for data in self._drain()]

    def close(self) -> None:
        """Give what was sent two seconds to leave, then let go."""
        self._socket.close(linger=_LAST_WORDS_MS)
        self._context.term()

    def _drain(self) -> Iterable[bytes]:
        while self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # poll would make a poller each time
            yield self._socket.recv()


def _open_pair(context: zmq.Context[Any]) -> Any:
    """A PAIR socket without a high-water mark: a full queue would block the engine or lose an abort."""
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    return socket
