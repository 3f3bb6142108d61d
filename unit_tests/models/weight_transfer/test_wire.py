"""The words of weight transfer: deltas there and back, frames over a socket, and offers that cannot be true."""

import copy
import socket
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import WeightUpdateError
from models.weight_transfer.wire import (
    TensorPlace,
    decode_delta,
    encode_delta,
    handshake,
    parse_transfer,
    read_frames,
    write_end,
    write_frame,
)
from models.weight_update import TensorSpec, bytes_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@given(st.data(), st.sampled_from(DTYPES))
@settings(max_examples=80, deadline=None)
def test_a_delta_comes_back_and_gives_the_new_tensor(data, dtype):
    old = torch.randn(data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))).to(dtype)
    new = old.clone()
    places = data.draw(st.sets(st.integers(0, old.numel() - 1)))
    for place in places:
        new.view(-1)[place] = data.draw(st.sampled_from([0.5, -0.0, 0.0, float("nan"), float("inf")]))
    indices, values = encode_delta(old, new)
    payload = (
        torch.frombuffer(bytearray(bytes(bytes_of(indices)) + bytes(bytes_of(values))), dtype=torch.uint8)
        if len(values)
        else torch.empty(0, dtype=torch.uint8)
    )
    spec = TensorSpec("w", str(dtype).removeprefix("torch."), tuple(old.shape))
    decoded, decoded_values = decode_delta(payload, TensorPlace(spec, 0, len(payload), len(values)))
    assert decoded.tolist() == indices.tolist() and set(indices.tolist()) <= places
    result = old.clone()
    result.view(-1)[decoded.long()] = decoded_values
    assert bytes(bytes_of(result)) == bytes(bytes_of(new))


def test_equal_bits_alone_are_no_change():
    zeros, signed = torch.zeros(3), torch.tensor([0.0, -0.0, 0.0])
    assert encode_delta(zeros, signed)[0].tolist() == [1]
    nan = torch.full((3,), torch.nan)
    indices, values = encode_delta(nan, nan.clone())
    assert len(indices) == len(values) == 0 and indices.dtype == torch.uint32


def test_places_in_huge_tensors_take_8_bytes():
    spec = TensorSpec("w", "bfloat16", (2**17, 2**16))
    payload = torch.tensor([2**33 - 1], dtype=torch.uint64).view(torch.uint8)
    payload = torch.cat([payload, torch.tensor([1.5]).bfloat16().view(torch.uint8)])
    indices, values = decode_delta(payload, TensorPlace(spec, 0, 10, 1))
    assert indices.tolist() == [2**33 - 1] and values.tolist() == [1.5]
    reply = offer([entry("w", (2**17, 2**16), 0, 10, num_changed=1)], mode="delta")
    assert parse_transfer(reply, "peer").tensors[0].num_bytes == 10


def exchange(*parts: bytes, allot=None) -> tuple[bytearray, list[tuple[int, int]]]:
    """What a reader makes of these frames, the last of which is followed by an end."""
    memory = bytearray(100)
    left, right = socket.socketpair()
    with left, right:
        for offset, data in parts:
            write_frame(left, offset, data)
        write_end(left)
        return memory, list(read_frames(right, lambda at, size: [memoryview(memory)[at : at + size]]))


def test_frames_land_at_their_offsets():
    memory, frames = exchange((50, b"world"), (3, b"hello, "), (60, memoryview(b"!")))
    assert frames == [(50, 5), (3, 7), (60, 1)]
    assert bytes(memory[3:10]) == b"hello, " and bytes(memory[50:55]) == b"world" and memory[60:61] == b"!"


def test_a_frame_may_fill_several_parts():
    first, second = bytearray(2), bytearray(4)
    left, right = socket.socketpair()
    with left, right:
        write_frame(left, 0, b"abcdef")
        write_end(left)
        assert list(read_frames(right, lambda at, size: [memoryview(first), memoryview(second)])) == [(0, 6)]
    assert bytes(first + second) == b"abcdef"


@pytest.mark.parametrize("length", [0, 5, 16, 20])
def test_a_stream_that_stops_in_between_is_no_whole_one(length):
    left, right = socket.socketpair()
    with left, right:
        write_frame(left, 0, b"12345")
        data = right.recv(100)
        right.setblocking(True)
        left.sendall(data[:length])
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            list(read_frames(right, lambda at, size: [memoryview(bytearray(size))]))


def test_a_handshake_is_one_line():
    assert handshake("7-3", 2) == b"TANDEM/1 7-3 2\n"


def entry(name: str, shape: tuple[int, ...], offset: int, num_bytes: int, **more: Any) -> dict[str, Any]:
    sizes = {"shape": list(shape), "sha256": "", "offset": offset, "num_bytes": num_bytes}
    return {"name": name, "dtype": "bfloat16"} | sizes | more


def offer(tensors: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "transfer_id": "1",
        "mode": "full",
        "version": "5",
        "base_version": None,
        "port": 99,
        "num_streams": 2,
        "num_bytes": sum(tensor["num_bytes"] for tensor in tensors),
        "result_sha256": "",
        "tensors": tensors,
    } | more


def test_an_offer_is_read():
    reply = offer([entry("a", (2, 3), 0, 12), entry("b", (4,), 12, 8, dtype="float16")], result_sha256="ab")
    transfer = parse_transfer(reply, "peer")
    assert (transfer.version, transfer.base_version, transfer.num_bytes) == ("5", None, 20)
    assert transfer.tensors[1] == TensorPlace(TensorSpec("b", "float16", (4,), ""), 12, 8)
    reply = offer([entry("a", (2, 3), 0, 18, num_changed=3)], mode="delta", base_version="4")
    assert parse_transfer(reply, "peer").tensors[0].num_changed == 3


BAD = {
    "no object": ([], "no transfer"),
    "no tensors": ({}, r"no transfer \(KeyError: 'tensors'\)"),
    "a mode": (offer([], mode="xor"), "mode 'xor'"),
    "no id": (offer([], transfer_id=""), "with id ''"),
    "a blank in the id": (offer([], transfer_id="7 3"), "with id '7 3'"),
    "a second line in the id": (offer([], transfer_id="7\n"), "with id .*: ids are 1 to 256 of"),
    "another alphabet": (offer([], transfer_id="\u0661"), "with id '\u0661'"),
    "a long id": (offer([], transfer_id=257 * "x"), "with id 'x{80}': ids are 1 to 256 of"),
    "no stream": (offer([], num_streams=0), "over 0 streams"),
    "too many streams": (offer([], num_streams=65), "over 65 streams"),
    "a port": (offer([], port=70000), "port 70000"),
    "a gap": (
        offer([entry("a", (2,), 0, 4), entry("b", (2,), 6, 4)]),
        r"tensor b \[2\] at bytes 6\.\.10: .* ends at 4",
    ),
    "an overlap": (offer([entry("a", (2,), 0, 4), entry("b", (2,), 2, 4)]), r"tensor b \[2\] at bytes 2\.\.6"),
    "too short": (offer([entry("a", (2, 3), 0, 10)]), r"tensor a \[2, 3\] at bytes 0\.\.10: it has 12"),
    "a total": (offer([entry("a", (2,), 0, 4)], num_bytes=5), "offers 5 bytes, the tensors in it have 4"),
    "a dtype": (offer([entry("a", (2,), 0, 2, dtype="int8")]), "tensor a as int8: only float64"),
    "a negative size": (offer([entry("a", (-2, -3), 0, 12)]), r"tensor a \[-2, -3\]"),
    "a count in a full one": (offer([entry("a", (2,), 0, 4, num_changed=2)]), "tensor a"),
    "no count in a delta": (offer([entry("a", (2,), 0, 4)], mode="delta"), "tensor a"),
    "too large a count": (offer([entry("a", (2,), 0, 18, num_changed=3)], mode="delta"), "tensor a"),
    "text for a number": (offer([entry("a", (2,), 0, 4)], port="x"), "no transfer"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_offer_that_cannot_be_true_is_refused(case):
    reply, message = BAD[case]
    with pytest.raises(WeightUpdateError, match=f"^http://peer .*{message}"):
        parse_transfer(copy.deepcopy(reply), "http://peer")
