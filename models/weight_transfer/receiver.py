"""The serving end of weight transfer: pulls what a publisher offers into an update (wire.py says how they talk)."""

import bisect
import itertools
import json
import socket
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

import torch
from torch import Tensor

from models.errors import WeightUpdateError
from models.weight_transfer.wire import (
    ACKNOWLEDGED,
    DELTA,
    FULL,
    Transfer,
    decode_delta,
    handshake,
    parse_transfer,
    read_frames,
)
from models.weight_update import DTYPES, WeightUpdate, bytes_of

_MAX_REPLY_BYTES = 64 << 20  # 100 000 tensors, as of experts one by one, take 25 MiB
_SCRATCH_BYTES = 1 << 20
_NOTHING = torch.empty(0, dtype=torch.uint8)


def fetch(
    url: str,
    base_version: str | None,
    num_streams: int = 4,
    timeout: float = 60.0,
    strategies: Sequence[str] = (FULL, DELTA),
) -> Transfer:
    """Order a transfer of the publisher's newest weights; `base_version` are those that serve.

    Raises WeightUpdateError, also after `timeout` seconds of silence.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise WeightUpdateError(f"{url} is no address of a publisher: it begins with http://")
    order = {"base_version": base_version, "strategies": list(strategies), "num_streams": num_streams}
    content = json.dumps(order).encode()
    request = Request(f"{url.rstrip('/')}/transfer", content, {"content-type": "application/json"})
    try:
        with _opener().open(request, timeout=timeout) as response:
            reply = response.read(_MAX_REPLY_BYTES + 1)
        if len(reply) > _MAX_REPLY_BYTES:
            raise WeightUpdateError(
                f"publisher {url} answers with more than {_MAX_REPLY_BYTES} bytes: offer fewer tensors"
            )
        return parse_transfer(json.loads(reply), url)
    except HTTPError as error:
        raise WeightUpdateError(f"publisher {url} refuses ({error.code}): {_reason(error)}") from None
    except (OSError, HTTPException) as error:
        raise WeightUpdateError(f"publisher {url} cannot be reached: {error}; is it running there?") from None
    except ValueError as error:
        raise WeightUpdateError(f"publisher {url} answers what is no JSON: {error}") from None


def receive(transfer: Transfer, url: str, timeout: float, update: WeightUpdate) -> None:
    """Read all streams of a transfer, and hand each tensor to the update as soon as it is there.

    Raises WeightUpdateError, also after `timeout` seconds in which a stream brought nothing.
    """
    payload = _Payload(transfer, update)
    host, port = urlsplit(url).hostname, transfer.port
    peer = f"publisher {url} (data from {host}:{port})"
    connections: list[socket.socket] = []
    with ExitStack() as opened, ThreadPoolExecutor(transfer.num_streams) as pool:
        try:
            for _ in range(transfer.num_streams):
                connections.append(opened.enter_context(socket.create_connection((host, port), timeout)))
        except OSError as error:
            raise WeightUpdateError(f"{peer} cannot be reached: {error}") from None
        streams = [
            pool.submit(_read_stream, connection, transfer, index, payload, peer)
            for index, connection in enumerate(connections)
        ]
        done, _ = wait(streams, return_when=FIRST_EXCEPTION)
        failed = [stream for stream in done if stream.exception() is not None]
        if failed:
            for connection in connections:  # wakes the threads that still read
                with suppress(OSError):  # the peer has gone
                    connection.shutdown(socket.SHUT_RDWR)
            failed[0].result()
    payload.finish(peer)


def _read_stream(connection: socket.socket, transfer: Transfer, index: int, payload: "_Payload", peer: str) -> None:
    try:
        connection.sendall(handshake(transfer.transfer_id, index))
        for offset, length in read_frames(connection, payload.allot):
            payload.filled(offset, length)
        connection.sendall(ACKNOWLEDGED)
    except EOFError:
        raise WeightUpdateError(f"{peer} ended stream {index} in the middle: send all of it") from None
    except TimeoutError:
        raise WeightUpdateError(f"{peer} sent nothing in stream {index} for {connection.gettimeout():g} s") from None
    except OSError as error:
        raise WeightUpdateError(f"{peer} broke off stream {index}: {error}") from None


class _Payload:
    """The bytes of a transfer as they come, in any order: memory of each tensor from its first byte to its last, none
    of those that are not looked at."""

    def __init__(self, transfer: Transfer, update: WeightUpdate):
        self._update, self._places = update, transfer.tensors
        self._num_bytes = transfer.num_bytes
        self._offsets = [place.offset for place in self._places]
        self._buffers: dict[int, Tensor] = {}
        self._missing = [place.num_bytes for place in self._places]
        self._spans: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._is_skipped = [update.skips(place.spec.name) for place in self._places]
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))

    def allot(self, offset: int, length: int) -> Iterable[memoryview]:
        """Where these bytes go. Raises WeightUpdateError if they are none of the payload's, or came already."""
        end = offset + length
        if end > self._num_bytes:
            raise WeightUpdateError(f"bytes {offset}..{end} came of a transfer with {self._num_bytes}: send it anew")
        with self._lock:
            at = bisect.bisect(self._spans, (offset, end))
            around = self._spans[max(0, at - 1) : at + 1]
            if any(start < end and offset < stop for start, stop in around):
                raise WeightUpdateError(f"bytes {offset}..{end} of the transfer came twice: send each once")
            self._spans.insert(at, (offset, end))
            memory = [self._memory(index, start, stop) for index, start, stop in self._parts(offset, end)]
        return itertools.chain.from_iterable(memory)

    def filled(self, offset: int, length: int) -> None:
        """These bytes have come."""
        complete = []
        with self._lock:
            for index, start, stop in self._parts(offset, offset + length):
                self._missing[index] -= stop - start
                if not self._missing[index]:
                    complete.append((index, self._buffers.pop(index, _NOTHING)))
        for index, buffer in complete:
            self._hand_over(index, buffer)

    def finish(self, peer: str) -> None:
        """All streams are over: hand over what has no bytes. Raises WeightUpdateError unless every tensor came."""
        lacking = [place.spec.name for place, missing in zip(self._places, self._missing, strict=True) if missing]
        if lacking:
            raise WeightUpdateError(
                f"{peer} sent {self._num_bytes - sum(self._missing)} of {self._num_bytes} bytes: {lacking[0]} and "
                f"{len(lacking) - 1} other tensors are not complete"
            )
        for index, place in enumerate(self._places):
            if not place.num_bytes:
                self._hand_over(index, _NOTHING)

    def _parts(self, offset: int, end: int) -> list[tuple[int, int, int]]:
        """(tensor, first and last byte in it) of a part of the payload."""
        parts, index = [], bisect.bisect(self._offsets, offset) - 1
        while index < len(self._places) and self._offsets[index] < end:
            place = self._places[index]
            start, stop = max(offset - place.offset, 0), min(end - place.offset, place.num_bytes)
            if start < stop:
                parts.append((index, start, stop))
            index += 1
        return parts

    def _memory(self, index: int, start: int, stop: int) -> Iterable[memoryview]:
        if self._is_skipped[index]:
            return (self._scratch[:length] for length in range(stop - start, 0, -_SCRATCH_BYTES))
        if index not in self._buffers:
            self._buffers[index] = torch.empty(self._places[index].num_bytes, dtype=torch.uint8)
        return [bytes_of(self._buffers[index])[start:stop]]

    def _hand_over(self, index: int, buffer: Tensor) -> None:
        place = self._places[index]
        if self._is_skipped[index]:
            self._update.add(place.spec.name, _NOTHING)
        elif place.num_changed is None:
            self._update.add(place.spec.name, buffer.view(DTYPES[place.spec.dtype]).view(place.spec.shape))
        else:
            self._update.add_delta(place.spec.name, *decode_delta(buffer, place))


class _NoRedirects(HTTPRedirectHandler):
    """Whoever may name a publisher has not named those that it points to."""

    def redirect_request(self, *arguments: Any) -> None:
        """None: the answer is an error as any other."""


def _opener() -> OpenerDirector:
    """Of direct connections: a publisher is no neighbour of the proxies in the environment."""
    return build_opener(ProxyHandler({}), _NoRedirects())


def _reason(error: HTTPError) -> Any:
    content = error.read(1 << 16)
    try:
        return json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace") or error.reason
