"""Safetensors in base64 are read, and nothing else is."""

import base64
import json
import pickle
import struct
from typing import Any

import msgspec
import pytest

from server.api.fields import Fields, known_fields
from server.api.rl.inline_tensors import read_inline_source
from server.control import TensorSpec, WeightSource
from server.errors import InvalidRequest

FIELD = "serialized_named_tensors"


def encode(tensors: dict[str, list[float]], **header: Any) -> tuple[bytes, str]:
    """A safetensors file of float32 vectors, and its base64."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}, **header}
    values = b""
    for name, numbers in tensors.items():
        data = struct.pack(f"<{len(numbers)}f", *numbers)
        places = [len(values), len(values) + len(data)]
        entries[name] = {"dtype": "F32", "shape": [len(numbers)], "data_offsets": places}
        values += data
    head = json.dumps(entries).encode()
    data = struct.pack("<Q", len(head)) + head + values
    return data, base64.b64encode(data).decode()


def read(value: Any) -> WeightSource:
    """What is read of the field."""
    return read_inline_source(Fields(known_fields(FIELD), msgspec.json.encode({FIELD: value})))


def test_a_file_of_many_pieces_comes_through_as_it_is() -> None:
    data, text = encode({"a": [0.5] * 200_000, "mtp.b": [1.0]})
    source = read([text])
    assert source.data == (data,)
    assert source.tensors == (TensorSpec("a", "float32", (200_000,)), TensorSpec("mtp.b", "float32", (1,)))


def test_slashes_may_be_escaped() -> None:
    data, text = encode({"a": [-3.4e38] * 3})
    assert "/" in text
    body = json.dumps({FIELD: [text]}).replace("/", "\\/").encode()
    assert read_inline_source(Fields(known_fields(FIELD), body)).data == (data,)


def test_a_header_whose_length_looks_like_a_pickle_is_none() -> None:
    data, _ = encode({"a": [1.0]})
    padding = 0x0480 - int.from_bytes(data[:8], "little")
    data = struct.pack("<Q", 0x0480) + data[8:-4] + b" " * padding + data[-4:]
    assert data[:2] == pickle.dumps(1)[:2]
    assert read([base64.b64encode(data).decode()]).data == (data,)


def test_other_types_are_left_for_the_engine_to_refuse() -> None:
    _, text = encode({}, w={"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]})
    assert read([text]).tensors == (TensorSpec("w", "f8_e4m3", (2,)),)


PICKLE = base64.b64encode(pickle.dumps([("a", 1)])).decode()
TRUNCATED = base64.b64encode(encode({"a": [1.0]})[0][:30]).decode()
NO_HEADER = base64.b64encode(struct.pack("<Q", 4) + b"abcd").decode()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "must be a list of texts"),
        ("x", "must be a list of texts"),
        ([], "has 0 entries, it must have one"),
        (["", ""], "has 2 entries, it must have one: this server has one tensor-parallel rank"),
        ([5], "is no text; send base64 of safetensors.torch.save"),
        (["no base64!"], "is no base64"),
        ([""], "has 0 bytes, which are no whole safetensors file"),
        ([PICKLE], "is a pickle, which could run code here, and is not read; send base64 of safetensors.torch.save"),
        ([TRUNCATED], "has 30 bytes, which are no whole safetensors file"),
        ([NO_HEADER], "has a header that is not a safetensors file's"),
        ([encode({}, w=[1])[1]], "has a header that is not a safetensors file's"),
    ],
)
def test_everything_else_is_refused_with_the_mend(value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(value)
    assert message in caught.value.message
    assert caught.value.param is not None and caught.value.param.startswith(FIELD)
