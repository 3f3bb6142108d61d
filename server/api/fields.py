"""Strict reading of a JSON object from a client: one field at a time, with errors that name field, value and limit.

Absent and null mean the default, unknown fields are never looked at, true is not 1 and "5" is not 5. Every mistake is
an InvalidRequest. Knows JSON, not what the fields mean.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from server.errors import InvalidRequest

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
# A setting (everything but prompt and messages) is small; a large one is not decoded, so it cannot stall other streams.
MAX_SETTING_BYTES = 256 * 1024
_SHOWN_CHARS = 60
_NULL = b"null"


class Fields:
    """The fields of one JSON object, decoded when they are asked for. Raises InvalidRequest if `body` is not one."""

    def __init__(self, body: bytes):
        self._raw = _decode_object(body)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.raw(name) not in (b"", _NULL)

    def raw(self, name: str) -> bytes:
        """The field's JSON as it came, without leading spaces; empty when absent."""
        return bytes(self._raw.get(name, b""))

    def value(self, name: str, limit_bytes: int = MAX_SETTING_BYTES) -> Any:
        """Any JSON value; None when absent."""
        if name not in self._raw:
            return None
        raw = self._raw[name]
        size = len(memoryview(raw))
        if size > limit_bytes:
            raise InvalidRequest(f"{name} has {size} bytes of JSON, the limit is {limit_bytes}", name)
        try:
            return msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(f"{name} is not valid JSON: {error}", name) from error

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.value(name)
        return default if value is None else require_boolean(name, value)

    def integer(self, name: str, default: int | None, low: int = INT64_MIN, high: int = INT64_MAX) -> int | None:
        """A whole number in low..high."""
        value = self.value(name)
        return default if value is None else require_integer(name, value, low, high)

    def number(self, name: str, default: float, low: float, high: float, open_low: bool = False) -> float:
        """A finite number in low..high; without `low` itself if `open_low`."""
        value = self.value(name)
        return default if value is None else require_number(name, value, low, high, open_low)

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise _mistake(name, value, "a string")
        return value

    def items(self, name: str, max_items: int) -> list[Any]:
        """A list of at most `max_items` values of any kind; empty when absent."""
        value = self.value(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise _mistake(name, value, "a list")
        if len(value) > max_items:
            raise InvalidRequest(f"{name} has {len(value)} entries, the limit is {max_items}", name)
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object; empty when absent."""
        value = self.value(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise _mistake(name, value, "an object")
        return value


def require_boolean(name: str, value: Any) -> bool:
    """`value` if it is true or false, else InvalidRequest."""
    if not isinstance(value, bool):
        raise _mistake(name, value, "true or false")
    return value


def require_integer(name: str, value: Any, low: int, high: int) -> int:
    """`value` if it is a whole number in low..high, else InvalidRequest."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise _mistake(name, value, "an integer")
    if not low <= value <= high:
        raise _mistake(name, value, f"in {low}..{high}")
    return value


def require_number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> float:
    """`value` as a float if it is a number in low..high (without `low` if `open_low`), else InvalidRequest."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _mistake(name, value, "a number")
    if not low <= value <= high or (open_low and value == low):
        raise _mistake(name, value, f"in {'(' if open_low else '['}{low:g}, {high:g}]")
    return float(value)


def shown(value: Any) -> str:
    """A value as an error message shows it: short, whatever the client sent."""
    if isinstance(value, list | Mapping):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} entries"
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN_CHARS else f"{value[:_SHOWN_CHARS]!r}... ({len(value)} characters)"
    return msgspec.json.encode(value).decode()[:_SHOWN_CHARS]


def _mistake(name: str, value: Any, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {shown(value)}, it must be {rule}", name)


def _decode_object(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the body must be a JSON object: {error}") from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply; a request has a few levels") from error
