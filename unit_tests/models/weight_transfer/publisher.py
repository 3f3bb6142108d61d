"""A publisher of weights in threads, small enough to be told to do wrong."""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from torch import Tensor

from models.weight_transfer.wire import encode_delta, write_end, write_frame
from models.weight_update import bytes_of
from unit_tests.models.sessions import checksum_of, describe

FRAME_BYTES = 5000
Send = Callable[[socket.socket, bytes, int, int], None]


def offer_of(new: Mapping[str, Tensor], old: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Any], bytes]:
    """The offer of these tensors, or of what has changed since the old ones, and its payload."""
    payload, entries = b"", []
    for spec in describe(new):
        changed = {}
        data = bytes(bytes_of(new[spec.name]))
        if old is not None:
            indices, values = encode_delta(old[spec.name], new[spec.name])
            data, changed = bytes(bytes_of(indices)) + bytes(bytes_of(values)), {"num_changed": len(values)}
        entries.append(
            {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "sha256": spec.sha256}
            | {"offset": len(payload), "num_bytes": len(data)}
            | changed
        )
        payload += data
    mode = "full" if old is None else "delta"
    offer = {"transfer_id": "17-1", "mode": mode, "version": "17", "base_version": None if old is None else "16"}
    return offer | {"num_bytes": len(payload), "result_sha256": checksum_of(new), "tensors": entries}, payload


def send_share(connection: socket.socket, payload: bytes, stream: int, num_streams: int) -> None:
    """Every num_streams-th frame, so that streams meet in most tensors."""
    for offset in range(stream * FRAME_BYTES, len(payload), num_streams * FRAME_BYTES):
        write_frame(connection, offset, payload[offset : offset + FRAME_BYTES])
    write_end(connection)


class TinyPublisher:
    """Answers every order with one offer; `answers` are what receivers said at the end of a stream."""

    def __init__(self, offer: dict[str, Any], payload: bytes, send: Send, status: int):
        self.offer, self.payload, self.send, self.status = offer, payload, send, status
        self.orders: list[dict[str, Any]] = []
        self.handshakes: list[bytes] = []
        self.answers: list[bytes] = []
        self.data = socket.create_server(("127.0.0.1", 0))
        self.control = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.control.publisher = self  # type: ignore[attr-defined]
        self.threads = [threading.Thread(target=self.control.serve_forever, kwargs={"poll_interval": 0.01})]
        self.threads.append(threading.Thread(target=self._accept))
        self.url = f"http://127.0.0.1:{self.control.server_port}"

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        self.orders.append(order)
        if self.status != 200:
            return {"error": "version 3 is gone: take full"}
        return {"port": self.data.getsockname()[1], "num_streams": order["num_streams"]} | self.offer

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.data.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,))
            self.threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as reader:
            line = reader.readline()
            if not line:
                return
            self.handshakes.append(line)
            try:
                self.send(connection, self.payload, int(line.split()[2]), self.orders[-1]["num_streams"])
                connection.shutdown(socket.SHUT_WR)
                self.answers.append(reader.read(1))
            except OSError:
                return

    def close(self) -> None:
        """Stop, and wait for all threads."""
        self.control.shutdown()
        self.control.server_close()
        self.data.shutdown(socket.SHUT_RDWR)
        self.data.close()
        for thread in self.threads:
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        """POST /transfer."""
        order = json.loads(self.rfile.read(int(self.headers["content-length"])))
        content = json.dumps(self.server.publisher.answer(order | {"path": self.path})).encode()
        self.send_response(self.server.publisher.status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@contextmanager
def publish(
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor] | None = None,
    send: Send = send_share,
    change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]] = lambda offer, payload: (offer, payload),
    status: int = 200,
) -> Iterator[TinyPublisher]:
    """A publisher of these tensors; `change` spoils what it says and has, `send` how it sends."""
    publisher = TinyPublisher(*change(*offer_of(new, old)), send, status)
    for thread in publisher.threads[:2]:
        thread.start()
    try:
        yield publisher
    finally:
        publisher.close()
