"""The arguments of one tool call: parameters as Qwen3.5 writes them -> the JSON text of one object, piece by piece.

A string goes out as it comes in; a value of another type once it is complete, cast by the tool's JSON schema. What does
not cast stays a string. So does what may be one of the values that the schema lists, and goes out as that. Knows
nothing of markup but that one newline on either side of a value belongs to it, and of a value that must have a certain
form one space of any kind: a grammar for it allows one, besides.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from server.api.tool_schemas import resolve

_STRING, _NULL = "string", "null"
_WHOLE = re.compile(r"(?P<sign>[+-]?)(?P<digits>[0-9]+)(?:\.0+)?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_BOOLEANS = {"true": "true", "1": "true", "false": "false", "0": "false"}
_CONTAINERS = {"object": dict, "array": list}
_JSON_TYPES = {
    type(None): _NULL,
    bool: "boolean",
    int: "integer",
    float: "number",
    str: _STRING,
    list: "array",
    dict: "object",
}
# Whole numbers beyond it are not exact as floats.
_MAX_EXACT = 2.0**53
# What is looked at of a parameter's schema: `$ref`s may go in circles.
_MAX_SCHEMAS = 64
# A text that may be a string or null is a string if it is longer, so it need not be held back for long.
_MAX_NULL_CHARS = 16
_FORMS = {"pattern", "minLength", "maxLength"}
# Formats that a grammar enforces. A text of another may be any.
_FORMATS = (
    *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "uri-reference"),
    *("uri-template", "json-pointer", "relative-json-pointer"),
)
_NEWLINE, _SPACE = "\n", " \t\r\n"
_SPACES = (*_SPACE,)


class ArgumentWriter:
    """Writes the arguments of a call of the tool whose `parameters` schema this is; {} knows no types.

    The texts that the methods return add up to the JSON text. The schema is one that `tools.check_schema` has passed.
    """

    def __init__(self, schema: dict[str, Any]):
        self._schema = schema
        self._num_written = 0
        self._key = ""
        self._types: frozenset[str] = frozenset()
        self._values: frozenset[str] = frozenset()  # one of which it may still be
        self._num_chars = 0  # of the longest, and of spaces around it
        self._held: list[str] = []
        self._streams = False
        self._is_first = True
        self._edge, self._owed = _NEWLINE, ""

    def open(self, key: str) -> str:
        """A parameter begins."""
        self._key, self._types, self._held = key, parameter_types(self._schema, key), []
        self._values = parameter_values(self._schema, key) if _STRING in self._types else frozenset()
        self._num_chars = max(map(len, self._values), default=0) + 2
        self._is_first, self._streams = True, False
        self._edge, self._owed = _SPACE if has_form(self._schema, key) else _NEWLINE, ""
        return self._stream() if self._types == {_STRING} and not self._values else ""

    def push(self, text: str) -> str:
        """More of the parameter's value."""
        if self._values:
            self._held.append(text)
            self._num_chars -= len(text)
            return "" if self._num_chars >= 0 else self._leave_values()
        text = self._trim(text)
        if self._streams:
            return _escape(text)
        self._held.append(text)
        return self._stream() if self._is_text() else ""

    def close(self) -> str:
        """The parameter's value is complete."""
        if self._streams:
            self._streams = False
            return '"'
        if self._values:
            value = _match("".join(self._held), self._values)
            if value is not None:
                return self._begin() + _quote(value)
            return self._leave_values() + self.close()
        return self._begin() + cast("".join(self._held), self._types)

    def finish(self) -> str:
        """The call is complete; no parameter is open."""
        return "}" if self._num_written else "{}"

    def _begin(self) -> str:
        self._num_written += 1
        return ("{" if self._num_written == 1 else ", ") + _quote(self._key) + ": "

    def _stream(self) -> str:
        self._streams = True
        return self._begin() + '"' + _escape("".join(self._held))

    def _leave_values(self) -> str:
        """It is none of the values that its schema lists."""
        text, self._held, self._values = "".join(self._held), [], frozenset()
        return (self._stream() if self._types == {_STRING} else "") + self.push(text)

    def _is_text(self) -> bool:
        """Whether the parameter can be nothing but a string."""
        if self._types != {_STRING, _NULL}:
            return False
        held = "".join(self._held)
        return len(held) > _MAX_NULL_CHARS or not _NULL.startswith(held.strip().lower())

    def _trim(self, text: str) -> str:
        """`text` without the markup at the value's start, and what may be that of its end held back until more
        comes."""
        if not text:
            return ""
        if self._is_first:
            self._is_first = False
            text = text[1:] if text[0] in self._edge else text
        if text:
            text, self._owed = self._owed + text, ""
        if text and text[-1] in self._edge:
            text, self._owed = text[:-1], text[-1]
        return text


def parameter_types(schema: dict[str, Any], key: str) -> frozenset[str]:
    """The JSON types that a parameter may have by its tool's schema; string where the schema says nothing."""
    return frozenset(_types(_find(schema, key), schema)) or frozenset({_STRING})


def parameter_values(schema: dict[str, Any], key: str) -> frozenset[str]:
    """The strings that a parameter's schema lists: one of them is meant, whatever the spaces around it."""
    found = _schemas(_find(schema, key), schema)
    lists = ([one["const"]] if "const" in one else one.get("enum", []) for one in found)
    return frozenset(value for values in lists for value in values if isinstance(value, str))


def has_form(schema: dict[str, Any], key: str) -> bool:
    """Whether a text of this parameter must have a certain length, pattern or format."""
    found = [*_schemas(_find(schema, key), schema)]
    return any(_FORMS & one.keys() or one.get("format") in _FORMATS for one in found)


def cast(text: str, types: frozenset[str]) -> str:
    """The JSON of a value: as the first of null, a number, a boolean, an object and a list that `types` has and the
    text can be, else a string."""
    bare = text.strip()
    if _NULL in types and bare.lower() == _NULL:
        return _NULL
    if types & {"integer", "number"} and (whole := _WHOLE.fullmatch(bare)):
        digits = whole["digits"].lstrip("0") or "0"
        return digits if whole["sign"] != "-" else "-" + digits
    if "number" in types and _NUMBER.fullmatch(bare) and math.isfinite(value := float(bare)):
        return str(int(value)) if value.is_integer() and abs(value) < _MAX_EXACT else json.dumps(value)
    if "boolean" in types and bare.lower() in _BOOLEANS:
        return _BOOLEANS[bare.lower()]
    for name, kind in _CONTAINERS.items():
        if name in types and _is_json(bare, kind):
            return bare
    return _quote(text)


def _match(text: str, values: frozenset[str]) -> str | None:
    """The one of `values` that a text is, with at most one space of any kind on either side. A newline there is markup
    rather than part of the value, another space part of it rather than markup."""
    starts = [text[1:], text] if text[:1] == _NEWLINE else [text, text[1:]] if text[:1] in _SPACES else [text]
    for start in starts:
        end = start[-1:]
        ends = [start[:-1], start] if end == _NEWLINE else [start, start[:-1]] if end in _SPACES else [start]
        for candidate in ends:
            if candidate in values:
                return candidate
    return None


def _find(schema: dict[str, Any], key: str) -> Any:
    """What a tool's schema says of a parameter, also by alternatives; where it does not list it, of any other."""
    wholes = [*_schemas(schema, schema)]
    listed = [one["properties"][key] for one in wholes if key in one.get("properties", {})]
    others = [child for one in wholes for child in one.get("patternProperties", {}).values()]
    others += [one["additionalProperties"] for one in wholes if "additionalProperties" in one]
    found = listed or others
    return found[0] if len(found) == 1 else {"anyOf": found}


def _types(schema: Any, root: dict[str, Any]) -> Iterator[str]:
    """The types a schema names, also by its `enum`, `const`, alternatives and `$ref`s into `root`."""
    for found in _schemas(schema, root):
        named = found.get("type")
        yield from named if isinstance(named, list) else [named] if isinstance(named, str) else []
        if named is None:
            values = found.get("enum", [found["const"]] if "const" in found else [])
            yield from (_JSON_TYPES[type(value)] for value in values[:_MAX_SCHEMAS])


def _schemas(schema: Any, root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema, its alternatives and what its `$ref`s into `root` point to."""
    schemas = [schema]
    for found in itertools.islice(schemas, _MAX_SCHEMAS):  # it grows meanwhile
        if not isinstance(found, dict):
            continue
        yield found
        for name in ("anyOf", "oneOf", "allOf"):
            schemas += (found.get(name) or [])[:_MAX_SCHEMAS]
        if "$ref" in found:
            schemas.append(resolve(found["$ref"], root))


def _is_json(text: str, kind: type) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), kind)
    except (msgspec.DecodeError, RecursionError):
        return False


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escape(text: str) -> str:
    return _quote(text)[1:-1]
