"""Strict reading of a JSON object from a client: one field at a time, with errors that name field, value and limit.

Absent and null mean the default, unknown fields are never looked at, true is not 1 and "5" is not 5. Every mistake is
an InvalidRequest. Knows JSON, not what the fields mean.

A decoder holds the interpreter lock, and with it every stream, until its last object is made. So nothing here makes
an object per entry of something the client may make as long as it likes: unknown fields and entries over a limit are
skipped by the parser, large settings are refused undecoded.
"""

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from server.errors import InvalidRequest

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
# A setting (everything but prompt and messages) is small; a large one is not decoded, so it cannot stall other streams.
MAX_SETTING_BYTES = 256 * 1024
_SHOWN_CHARS = 60
_BODY = "the body"
_NULL = b"null"
_ABSENT = msgspec.Raw(b"")

T = TypeVar("T")


def known_fields(*names: str) -> type[msgspec.Struct]:
    """A type of object for `Fields`: the fields that may be asked for. The others are skipped undecoded."""
    return msgspec.defstruct("KnownFields", [(name, msgspec.Raw, _ABSENT) for name in names])


class Fields:
    """The fields `known` of one JSON object, decoded when they are asked for. Raises InvalidRequest if it is not one.

    `where` names the object in errors: "messages[3]", or "" for the request itself.
    """

    def __init__(self, known: type[msgspec.Struct], body: bytes, where: str = ""):
        try:
            body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
        self._where = where
        self._fields = decode_json(where or _BODY, body, known, "a JSON object")

    def name(self, name: str) -> str:
        """The field's full name, for errors."""
        return f"{self._where}.{name}" if self._where else name

    def raw(self, name: str) -> bytes:
        """The field's JSON as it came, without spaces around it; empty when absent or null."""
        raw = bytes(getattr(self._fields, name))
        return b"" if raw == _NULL else raw

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.raw(name) != b""

    def value(self, name: str) -> Any:
        """Any JSON value of at most MAX_SETTING_BYTES; None when absent."""
        raw = self.raw(name)
        if len(raw) > MAX_SETTING_BYTES:
            raise InvalidRequest(
                f"{self.name(name)} has {len(raw)} bytes of JSON, the limit is {MAX_SETTING_BYTES}", self.name(name)
            )
        return decode_json(self.name(name), raw, object, "JSON") if raw else None

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.value(name)
        return default if value is None else require_boolean(self.name(name), value)

    def integer(
        self, name: str, default: int | None, low: int = INT64_MIN, high: int = INT64_MAX, flag: str = ""
    ) -> int | None:
        """A whole number in low..high, which the command-line flag `flag` may have set."""
        value = self.value(name)
        return default if value is None else require_integer(self.name(name), value, low, high, flag)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A finite number in low..high."""
        value = self.value(name)
        return default if value is None else require_number(self.name(name), value, low, high)

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise _mistake(self.name(name), value, "a string")
        return value

    def items(self, name: str, max_items: int) -> list[Any]:
        """A list of at most `max_items` values of any kind; empty when absent."""
        value = self.value(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise _mistake(self.name(name), value, "a list")
        if len(value) > max_items:
            raise InvalidRequest(
                f"{self.name(name)} has {len(value)} entries, the limit is {max_items}", self.name(name)
            )
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object; empty when absent."""
        value = self.value(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise _mistake(self.name(name), value, "an object")
        return value


def decode_json(name: str, raw: bytes, kind: type[T], rule: str) -> T:
    """`raw` as a value of the type `kind`, which `rule` describes in errors. Raises InvalidRequest."""
    param = None if name == _BODY else name
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{name} is {shown_json(raw)}, it must be {rule}: {error}", param) from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{name} is not valid JSON: {error}", param) from error
    except RecursionError as error:
        raise InvalidRequest(f"{name} is nested too deeply; a request has a few levels", param) from error


def split_list(name: str, raw: bytes, max_items: int) -> list[bytes]:
    """The undecoded entries of a JSON list. Raises InvalidRequest for a list of more than `max_items`."""
    prefix = decode_json(name, raw or _NULL, _prefix_type(max_items + 1), "a list")
    items = [bytes(item) for item in msgspec.structs.astuple(prefix) if item is not _ABSENT]
    if len(items) > max_items:
        raise InvalidRequest(f"{name} has more than {max_items} entries, which is the limit", name)
    return items


def require_boolean(name: str, value: Any) -> bool:
    """`value` if it is true or false, else InvalidRequest."""
    if not isinstance(value, bool):
        raise _mistake(name, value, "true or false")
    return value


def require_integer(name: str, value: Any, low: int, high: int, flag: str = "") -> int:
    """`value` if it is a whole number in low..high, else InvalidRequest; it names the `flag` that sets the range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise _mistake(name, value, "an integer")
    if not low <= value <= high:
        raise _mistake(name, value, f"in {low}..{high}" + (f" ({flag})" if flag else ""))
    return value


def require_number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a float if it is a number in low..high, else InvalidRequest."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _mistake(name, value, "a number")
    if not low <= value <= high:
        raise _mistake(name, value, f"in [{low:g}, {high:g}]")
    return float(value)


def shown(value: Any) -> str:
    """A value as an error message shows it: short, whatever the client sent."""
    if isinstance(value, list | Mapping):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} entries"
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN_CHARS else f"{value[:_SHOWN_CHARS]!r}... ({len(value)} characters)"
    return msgspec.json.encode(value).decode()[:_SHOWN_CHARS]


def shown_json(raw: bytes) -> str:
    """Undecoded JSON as an error message shows it; nothing is null."""
    text = raw[:_SHOWN_CHARS].decode("utf-8", errors="replace") or "null"
    return text if len(raw) <= _SHOWN_CHARS else f"{text}... ({len(raw)} bytes)"


def _mistake(name: str, value: Any, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {shown(value)}, it must be {rule}", name)


@functools.cache
def _prefix_type(length: int) -> type[msgspec.Struct]:
    return msgspec.defstruct("Prefix", [(f"item{i}", msgspec.Raw, _ABSENT) for i in range(length)], array_like=True)
