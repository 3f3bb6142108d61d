"""The trainer's end of weight transfer: holds the newest weights and hands them out, whole or as what has changed.

Receivers pull: they ask which version there is (`GET /version`), order a transfer (`POST /transfer`), and read its
bytes from data connections (models/weight_transfer/wire.py). The weights are copies, so that training goes on
meanwhile. Knows tensors by checkpoint name, never models.
"""

import contextlib
import json
import re
import secrets
import socketserver
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from models.training.mtp_settings import TrainingError
from models.weight_transfer.wire import (
    ACKNOWLEDGED,
    DELTA,
    FULL,
    TensorPlace,
    Transfer,
    encode_delta,
    write_end,
    write_frame,
)
from models.weight_update import TensorSpec, bytes_of, combine_checksums, hash_tensor
from models.weights import fused_name, normalise_name, save_weights

STRATEGIES = (FULL, DELTA)
SHARED_MEMORY = Path("/dev/shm")
KEPT_SECONDS = 60.0  # without a connection for it a transfer that was ordered is forgotten
_FRAME_BYTES = 4 << 20
_CONNECTION_SECONDS = 60.0
_MAX_REQUEST_BYTES = 1 << 16
_HANDSHAKE = re.compile(rb"TANDEM/1 (\S+) (\d{1,3})\n")
_LEAST_PLACE_BYTES = 4  # of a changed number's place in a delta
_MAX_HANDSHAKE_BYTES = 512
_MAX_STREAMS = 64
_MAX_WAITING = 1024  # of connections that come at once; a longer queue than the system's is cut to that


class Broadcaster(Protocol):
    """A process group of which this process is rank 0 (models/weight_transfer/groups.py)."""

    def send(self, tensor: Tensor) -> None:
        """Broadcast one tensor."""


@dataclass(frozen=True)
class Version:
    """Published weights. `step` counts what was published, from 0 on; `changes` is what differs from the version
    `base`, where that is known and small: by tensor the places and the values there, as they are sent."""

    name: str
    step: int
    tensors: Mapping[str, Tensor]
    checksums: Mapping[str, str]
    base: str | None = None
    changes: Mapping[str, tuple[Tensor, Tensor]] | None = None

    @property
    def result_sha256(self) -> str:
        """Of all tensors, by the names that receivers have for them; empty where some are of single experts, which
        receivers may hold in one piece: their own checksums must do."""
        checksums = {normalise_name(name): checksum for name, checksum in self.checksums.items()}
        return combine_checksums(checksums) if all(fused_name(name) == name for name in checksums) else ""

    @property
    def num_bytes(self) -> int:
        """Of a full transfer."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass
class Order:
    """A transfer that a receiver has asked for: what it was told, the payload in pieces at their offsets, an entry per
    stream that has not arrived, and when it was last asked for."""

    transfer: Transfer
    pieces: tuple[tuple[int, memoryview], ...]
    streams_left: list[int]
    used: float

    def share(self, stream: int) -> Iterator[tuple[int, memoryview]]:
        """The pieces of one of its streams, which cover an equal part of the payload each."""
        total, count = self.transfer.num_bytes, self.transfer.num_streams
        start, end = total * stream // count, total * (stream + 1) // count
        for offset, piece in self.pieces:
            first, last = max(start, offset), min(end, offset + len(piece))
            for place in range(first, last, _FRAME_BYTES):
                yield place, piece[place - offset : min(last, place + _FRAME_BYTES) - offset]


class Publisher:
    """Serves the weights that were last published, at `url`, until it is closed.

    A transfer is a delta when `strategies` of both ends have it, the receiver has the version before, it is no more
    than half of the weights' bytes, and it is not the turn of a full one: every `full_sync_interval`-th version (0:
    never).
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        strategies: Sequence[str] = STRATEGIES,
        full_sync_interval: int = 10,
    ):
        if unknown := [name for name in strategies if name not in STRATEGIES]:
            raise TrainingError(f"strategy {unknown[0]!r} is unknown: full and delta are known")
        if FULL not in strategies:
            raise TrainingError("the strategies lack full: a receiver's first transfer cannot be a delta")
        if full_sync_interval < 0:
            raise TrainingError(f"full_sync_interval is {full_sync_interval}, at least 0 is needed (0: never forced)")
        self.strategies, self.full_sync_interval = tuple(strategies), full_sync_interval
        self.modes: list[str] = []  # of the transfers that were ordered, in order
        self._version: Version | None = None
        self._orders: dict[str, Order] = {}
        self._lock = threading.Lock()
        self._shared: tempfile.TemporaryDirectory[str] | None = None
        self._control = _start(_ControlServer, (host, port), _ControlHandler, self)
        self._data = _start(_DataServer, (host, 0), _DataHandler, self)
        self.url = f"http://{host}:{self._control.server_address[1]}"

    @property
    def version(self) -> Version:
        """The newest. Raises TrainingError before the first."""
        if self._version is None:
            raise TrainingError("nothing is published yet: call publish() first")
        return self._version

    def publish(self, tensors: Mapping[str, Tensor], name: str | None = None) -> Version:
        """Copy the tensors, all of them by checkpoint name, and serve them as the next version; its step by default is
        its name. Transfers that run go on with the version they began with."""
        copies = {key: _copy(tensor) for key, tensor in tensors.items()}
        if not copies:
            raise TrainingError("there are no tensors to publish")
        with ThreadPoolExecutor() as pool:
            checksums = dict(zip(copies, pool.map(hash_tensor, copies.values()), strict=True))
        before = self._version
        step = 0 if before is None else before.step + 1
        name = str(step) if name is None else name
        if before is not None and name == before.name:
            raise TrainingError(f"version {name!r} is published already: give each its own name")
        base, changes = None, None
        if before is not None and DELTA in self.strategies:
            base, changes = before.name, _find_changes(before, copies, checksums)
        version = Version(name, step, copies, checksums, base, changes)
        with self._lock:
            self._version = version
        return version

    def describe(self) -> dict[str, Any]:
        """What `GET /version` tells."""
        version = self.version
        is_delta = version.changes is not None
        return {
            "version": version.name,
            "base_version": version.base if is_delta else None,
            "strategies": [name for name in self.strategies if name == FULL or is_delta],
        }

    def choose_mode(self, version: Version, base: str | None, strategies: Sequence[str]) -> str:
        """full or delta, for a receiver that has the version `base`."""
        is_forced = self.full_sync_interval > 0 and version.step % self.full_sync_interval == 0
        has_base = version.changes is not None and base == version.base
        return DELTA if DELTA in strategies and has_base and not is_forced else FULL

    def order(self, base: str | None, strategies: Sequence[str], num_streams: int) -> Transfer:
        """What `POST /transfer` tells: a transfer of the newest version. Raises TrainingError where the receiver takes
        no full ones and cannot have a delta."""
        version = self.version
        mode = self.choose_mode(version, base, strategies)
        if mode not in strategies:
            raise TrainingError(
                f"version {version.name} cannot be sent as {' or '.join(strategies)} to a receiver of version {base}: "
                "take full, too"
            )
        places, pieces = _lay_out(version, mode == DELTA)
        now = time.monotonic()
        with self._lock:
            transfer = Transfer(
                transfer_id=secrets.token_hex(16),
                mode=mode,
                version=version.name,
                base_version=version.base if mode == DELTA else None,
                port=self._data.server_address[1],
                num_streams=num_streams,
                num_bytes=sum(len(piece) for _, piece in pieces),
                result_sha256=version.result_sha256,
                tensors=tuple(places),
            )
            self._orders = {name: one for name, one in self._orders.items() if now - one.used < KEPT_SECONDS}
            self._orders[transfer.transfer_id] = Order(transfer, tuple(pieces), list(range(num_streams)), now)
            self.modes.append(mode)
        return transfer

    def finish_stream(self, order: Order) -> None:
        """A stream of the transfer has arrived; with the last one it is forgotten."""
        with self._lock:
            order.streams_left.pop()
            if not order.streams_left:
                self._orders.pop(order.transfer.transfer_id, None)

    def find_order(self, name: str) -> Order | None:
        """The transfer of that id, if it is not forgotten."""
        with self._lock:
            order = self._orders.get(name)
            if order is not None:
                order.used = time.monotonic()
            return order

    def save(self, directory: Path) -> Path:
        """Write the newest version as `model.safetensors` to a directory. The file appears when it is complete."""
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / "model.partial"
        save_weights(partial, dict(self.version.tensors))
        return partial.replace(directory / "model.safetensors").parent

    def share(self) -> Path:
        """Write the newest version to shared memory, in place of the last one there: the directory."""
        shared = tempfile.TemporaryDirectory(prefix="tandem-weights-", dir=SHARED_MEMORY)
        self.save(Path(shared.name))
        if self._shared is not None:
            self._shared.cleanup()
        self._shared = shared
        return Path(shared.name)

    def broadcast(self, group: Broadcaster) -> None:
        """Send every tensor of the newest version to a group, in the order of `version.tensors`."""
        for tensor in self.version.tensors.values():
            group.send(tensor)

    def close(self) -> None:
        """Stop serving; running transfers are cut off."""
        for server in (self._control, self._data):
            server.shutdown()
            server.server_close()
        if self._shared is not None:
            self._shared.cleanup()

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


class _ControlServer(ThreadingHTTPServer):
    """Accepts HTTP requests, a thread each."""

    request_queue_size = _MAX_WAITING


class _DataServer(socketserver.ThreadingTCPServer):
    """Accepts data connections, a thread each."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = _MAX_WAITING


class _ControlHandler(BaseHTTPRequestHandler):
    """One HTTP request."""

    timeout = _CONNECTION_SECONDS
    server: Any

    def do_GET(self) -> None:
        """GET /version."""
        self._answer("/version", lambda: self.server.publisher.describe())

    def do_POST(self) -> None:
        """POST /transfer."""
        self._answer("/transfer", lambda: _to_json(self.server.publisher.order(*self._read_order())))

    def log_message(self, *arguments: Any) -> None:
        """Nothing: a transfer is told by the one who ordered it."""

    def _read_order(self) -> tuple[str | None, list[str], int]:
        length = self.headers.get("content-length", "")
        if not length.isdigit() or int(length) > _MAX_REQUEST_BYTES:
            raise TrainingError(f"content-length is {length!r}, at most {_MAX_REQUEST_BYTES} is taken")
        try:
            body = json.loads(self.rfile.read(int(length)))
            base, strategies, num_streams = body.get("base_version"), body["strategies"], body["num_streams"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingError(f"the order is not readable ({error!r}): it has strategies and num_streams") from None
        if not isinstance(num_streams, int) or not 1 <= num_streams <= _MAX_STREAMS:
            raise TrainingError(f"num_streams is {num_streams!r}, 1 to {_MAX_STREAMS} are served")
        if not isinstance(strategies, list) or not strategies:
            raise TrainingError(f"strategies are {strategies!r}, a list of full and delta is needed")
        return base, strategies, num_streams

    def _answer(self, path: str, make: Any) -> None:
        status: int
        try:
            status, body = (200, make()) if self.path == path else (404, {"error": f"{self.path} is not served"})
        except TrainingError as error:
            status, body = 409, {"error": str(error)}
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class _DataHandler(socketserver.StreamRequestHandler):
    """One data connection: a line that names transfer and stream, then frames one way and one byte the other."""

    timeout = _CONNECTION_SECONDS
    server: Any

    def handle(self) -> None:
        """Send the stream; a receiver that goes away notices it itself and orders anew."""
        with contextlib.suppress(OSError):
            found = _HANDSHAKE.fullmatch(self.rfile.readline(_MAX_HANDSHAKE_BYTES))
            if found is None:
                return
            order, stream = self.server.publisher.find_order(found[1].decode()), int(found[2])
            if order is None or stream >= order.transfer.num_streams:
                return
            for offset, piece in order.share(stream):
                write_frame(self.connection, offset, piece)
            write_end(self.connection)
            if self.rfile.read(1) == ACKNOWLEDGED:
                self.server.publisher.finish_stream(order)


def _start(kind: Any, address: tuple[str, int], handler: type, publisher: Publisher) -> Any:
    """A server of its own thread. Raises TrainingError for an address that is taken or not this machine's."""
    try:
        server = kind(address, handler)
    except OSError as error:
        raise TrainingError(f"cannot listen at {address[0]}:{address[1]}: {error}; give another host or port") from None
    server.publisher = publisher
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _find_changes(
    before: Version, tensors: Mapping[str, Tensor], checksums: Mapping[str, str]
) -> dict[str, tuple[Tensor, Tensor]] | None:
    """What differs, by tensor; None where that is more than half of all bytes, or the tensors are others."""
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if layout != {name: (tensor.dtype, tensor.shape) for name, tensor in before.tensors.items()}:
        return None
    budget, changes = sum(tensor.nbytes for tensor in tensors.values()) // 2, {}
    for name, tensor in tensors.items():
        if checksums[name] == before.checksums[name]:
            continue
        # Places of many changes take long to list, and would be thrown away.
        if int((before.tensors[name] != tensor).sum()) * (_LEAST_PLACE_BYTES + tensor.itemsize) > budget:
            return None
        changes[name] = encode_delta(before.tensors[name], tensor)
        budget -= sum(part.nbytes for part in changes[name])
        if budget < 0:
            return None
    return changes


def _lay_out(version: Version, is_delta: bool) -> tuple[list[TensorPlace], list[tuple[int, memoryview]]]:
    """All tensors, or what has changed of each: where that lies in the payload, and the bytes there."""
    places: list[TensorPlace] = []
    pieces: list[tuple[int, memoryview]] = []
    offset = 0
    for name, tensor in version.tensors.items():
        parts: tuple[Tensor, ...] = (tensor,)
        num_changed = None
        if is_delta:
            assert version.changes is not None
            parts = version.changes.get(name, ())
            num_changed = len(parts[1]) if parts else 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        spec = TensorSpec(name, dtype, tuple(tensor.shape), version.checksums[name])
        places.append(TensorPlace(spec, offset, sum(part.nbytes for part in parts), num_changed))
        for part in parts:
            pieces.append((offset, bytes_of(part)))
            offset += part.nbytes
    return places, pieces


def _to_json(transfer: Transfer) -> dict[str, Any]:
    """The answer to an order."""
    tensors = [
        asdict(place.spec)
        | {"offset": place.offset, "num_bytes": place.num_bytes}
        | ({} if place.num_changed is None else {"num_changed": place.num_changed})
        for place in transfer.tensors
    ]
    return {**vars(transfer), "tensors": tensors}
