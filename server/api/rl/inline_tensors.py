"""Tensors that come in a request: base64 of a safetensors file for each tensor-parallel rank, of which there is one.

What frameworks send between their own processes is pickled, and reading that runs the sender's code: it is refused.
Runs in the thread pool. Knows the files' headers, not their values.
"""

import binascii

import msgspec

from server.api.fields import Fields, decode_json
from server.control import TensorSpec, WeightSource
from server.errors import InvalidRequest

_FIELD = "serialized_named_tensors"
# Bytes of base64, of which four make three, that are decoded while no other thread can run.
_PIECE = 4 * 2**16
_PICKLE_START, _LENGTH_BYTES = b"\x80", 8
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MEND = "send base64 of safetensors.torch.save(tensors), with the checkpoint's names"


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]


def read_inline_source(fields: Fields) -> WeightSource:
    """The file, and the tensors that its header lists. Raises InvalidRequest."""
    ranks = decode_json(_FIELD, fields.raw(_FIELD) or b"null", list[msgspec.Raw], "a list of texts")
    if len(ranks) != 1:
        raise InvalidRequest(
            f"{_FIELD} has {len(ranks)} entries, it must have one: this server has one tensor-parallel rank", _FIELD
        )
    data = _decode(bytes(ranks[0]))
    return WeightSource("inline", data=(data,), tensors=_read_header(data))


def _decode(raw: bytes) -> bytes:
    name = f"{_FIELD}[0]"
    if raw[:1] != b'"':
        raise InvalidRequest(f"{name} is no text; {_MEND}", name)
    data = bytearray()
    # JSON may write a slash with a backslash before it.
    text = memoryview(raw.replace(b"\\/", b"/") if b"\\" in raw else raw)[1:-1]
    try:
        for start in range(0, len(text), _PIECE):
            data += binascii.a2b_base64(text[start : start + _PIECE], strict_mode=True)
    except binascii.Error as error:
        raise InvalidRequest(f"{name} is no base64: {error}; {_MEND}", name) from error
    return bytes(data)


def _read_header(data: bytes) -> tuple[TensorSpec, ...]:
    """What a safetensors file says that it holds."""
    name = f"{_FIELD}[0]"
    if data[:1] == _PICKLE_START and data[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
        raise InvalidRequest(f"{name} is a pickle, which could run code here, and is not read; {_MEND}", name)
    size = int.from_bytes(data[:_LENGTH_BYTES], "little")
    header = data[_LENGTH_BYTES : _LENGTH_BYTES + size]
    if len(data) < _LENGTH_BYTES or len(header) < size:
        raise InvalidRequest(f"{name} has {len(data)} bytes, which are no whole safetensors file; {_MEND}", name)
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        tensors = {key: msgspec.json.decode(entry, type=_Entry) for key, entry in entries.items()}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{name} has a header that is not a safetensors file's: {error}; {_MEND}", name) from error
    return tuple(
        TensorSpec(key, _DTYPES.get(tensor.dtype, tensor.dtype.lower()), tuple(tensor.shape))
        for key, tensor in tensors.items()
    )
