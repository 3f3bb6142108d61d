"""What a publisher of weights and those who pull them say to each other.

The publisher answers `GET /version` with its version, `POST /transfer` with a transfer: which tensors, at which bytes
of one payload, and a TCP port of the same host. The puller opens some connections to it, each with a line of its own
(`handshake`), and gets frames: an offset into the payload, a length, the bytes; length 0 ends a stream and is
acknowledged with one byte. The streams together bring each byte once. All numbers are little-endian.

A whole tensor is its bytes, row-major. A delta of one is the places of the numbers that change, ascending, counted
over the flat tensor (4 bytes each, 8 in tensors of more than 2^32 numbers), and behind them all their new values. A
delta lists the tensors that stay as they are, too, with no bytes: their checksums belong to the result.
"""

import math
import re
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.errors import WeightUpdateError
from models.weight_update import DTYPES, TensorSpec

FULL, DELTA = "full", "delta"
ACKNOWLEDGED = b"\x06"
MAX_STREAMS = 64
_FRAME = struct.Struct("<QQ")
_TRANSFER_ID = re.compile(r"[\w.:-]{1,256}", re.ASCII)


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of a transfer and where it lies in the payload; of a delta `num_changed` numbers of it."""

    spec: TensorSpec
    offset: int
    num_bytes: int
    num_changed: int | None = None


@dataclass(frozen=True)
class Transfer:
    """A publisher's offer. `sha256` of a tensor, and `result_sha256` of all of them, are those of the new weights in
    both modes."""

    transfer_id: str
    mode: str
    version: str
    base_version: str | None
    port: int
    num_streams: int
    num_bytes: int
    result_sha256: str
    tensors: tuple[TensorPlace, ...]


def parse_transfer(reply: Any, peer: str) -> Transfer:
    """The answer to `POST /transfer`. Raises WeightUpdateError for one that cannot be what it says."""
    try:
        tensors = tuple(_parse_place(entry) for entry in reply["tensors"])
        base = reply.get("base_version")
        transfer = Transfer(
            transfer_id=str(reply["transfer_id"]),
            mode=str(reply["mode"]),
            version=str(reply["version"]),
            base_version=None if base is None else str(base),
            port=int(reply["port"]),
            num_streams=int(reply["num_streams"]),
            num_bytes=int(reply["num_bytes"]),
            result_sha256=str(reply.get("result_sha256", "")),
            tensors=tensors,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightUpdateError(f"{peer} answers what is no transfer ({type(error).__name__}: {error})") from None
    _check(transfer, peer)
    return transfer


def encode_delta(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Where the bits of two tensors of one shape and dtype differ, as it is sent, and the new values there."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[new.itemsize]
    old, new = old.contiguous().flatten(), new.contiguous().flatten()
    indices = (old.view(integers) != new.view(integers)).nonzero().flatten()
    return indices.to(_index_dtype(new.numel())), new[indices]


def decode_delta(data: Tensor, place: TensorPlace) -> tuple[Tensor, Tensor]:
    """Places and values of a delta that came as data [num_bytes] uint8."""
    dtype = _index_dtype(math.prod(place.spec.shape))
    end = (place.num_changed or 0) * dtype.itemsize
    return data[:end].view(dtype), data[end:].clone().view(DTYPES[place.spec.dtype])


def handshake(transfer_id: str, stream: int) -> bytes:
    """The line with which a connection says what it is for."""
    return f"TANDEM/1 {transfer_id} {stream}\n".encode()


def write_frame(connection: socket.socket, offset: int, data: bytes | memoryview) -> None:
    """Send a part of the payload, which is not empty."""
    connection.sendall(_FRAME.pack(offset, len(data)))
    connection.sendall(data)


def write_end(connection: socket.socket) -> None:
    """Say that the stream is over."""
    connection.sendall(_FRAME.pack(0, 0))


def read_frames(
    connection: socket.socket, allot: Callable[[int, int], Iterable[memoryview]]
) -> Iterator[tuple[int, int]]:
    """Read a stream to its end into the memory that `allot` gives for (offset, length); gives both when it is filled.

    Raises EOFError for a stream that stops in between.
    """
    header = bytearray(_FRAME.size)
    while True:
        _fill(connection, memoryview(header))
        offset, length = _FRAME.unpack(header)
        if not length:
            return
        for part in allot(offset, length):
            _fill(connection, part)
        yield offset, length


def _fill(connection: socket.socket, part: memoryview) -> None:
    while part:
        count = connection.recv_into(part)
        if not count:
            raise EOFError
        part = part[count:]


def _index_dtype(numel: int) -> torch.dtype:
    return torch.uint32 if numel <= 2**32 else torch.uint64


def _parse_place(entry: Any) -> TensorPlace:
    shape = tuple(int(size) for size in entry["shape"])
    spec = TensorSpec(str(entry["name"]), str(entry["dtype"]), shape, str(entry.get("sha256", "")))
    changed = entry.get("num_changed")
    sizes = (int(entry["offset"]), int(entry["num_bytes"]))
    return TensorPlace(spec, *sizes, None if changed is None else int(changed))


def _check(transfer: Transfer, peer: str) -> None:
    if not _TRANSFER_ID.fullmatch(transfer.transfer_id):
        raise WeightUpdateError(
            f"{peer} offers a transfer with id {transfer.transfer_id[:80]!r}: ids are 1 to 256 of A-Z a-z 0-9 _ . : -"
        )
    is_known = transfer.mode in (FULL, DELTA) and 1 <= transfer.num_streams <= MAX_STREAMS
    if not is_known or not 0 < transfer.port < 2**16:
        raise WeightUpdateError(
            f"{peer} offers a transfer of mode {transfer.mode!r} over {transfer.num_streams} streams from port "
            f"{transfer.port}: modes are {FULL} and {DELTA}, 1 to {MAX_STREAMS} streams are read"
        )
    end = 0
    for place in transfer.tensors:
        spec = place.spec
        if spec.dtype not in DTYPES:
            raise WeightUpdateError(
                f"{peer} offers tensor {spec.name} as {spec.dtype}: only {', '.join(DTYPES)} are served, unquantized"
            )
        num_bytes = _expected_bytes(place, transfer.mode)
        if min(spec.shape, default=0) < 0 or place.offset != end or place.num_bytes != num_bytes:
            raise WeightUpdateError(
                f"{peer} offers tensor {spec.name} {list(spec.shape)} at bytes {place.offset}.."
                f"{place.offset + place.num_bytes}: it has {num_bytes} and the one before ends at {end}"
            )
        end += num_bytes
    if end != transfer.num_bytes:
        raise WeightUpdateError(f"{peer} offers {transfer.num_bytes} bytes, the tensors in it have {end}")


def _expected_bytes(place: TensorPlace, mode: str) -> int | None:
    """None: there is no such tensor."""
    dtype, numel = DTYPES[place.spec.dtype], math.prod(place.spec.shape)
    if mode == FULL:
        return numel * dtype.itemsize if place.num_changed is None else None
    if place.num_changed is None or not 0 <= place.num_changed <= numel:
        return None
    return place.num_changed * (_index_dtype(numel).itemsize + dtype.itemsize)
