"""A tool's JSON schema as the compiler of grammars can enforce it: what several schemas say of one value made one.

The compiler looks at the first of `$ref`, `const`, `enum`, `anyOf`, `oneOf`, `allOf` and `type` that a schema has, and
passes over what stands beside it; of several schemas in `allOf` it enforces none. It takes `oneOf` for `anyOf`. Knows
neither requests nor grammars.
"""

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import msgspec

Schema = dict[str, Any]

_DEFINITIONS = ("$defs", "definitions")
_SCHEMAS = ("items", "additionalProperties", "propertyNames")
_ALTERNATIVES = ("anyOf", "oneOf")
_LISTS = (*_ALTERNATIVES, "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", *_DEFINITIONS)
_COMBINERS = ("$ref", "allOf", *_ALTERNATIVES)
_LEAST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_MOST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
# Of values of one type alone.
_OF_TYPE = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "unevaluatedItems", "uniqueItems", "contains"),
    "object": (
        *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
        *("minProperties", "maxProperties", "unevaluatedProperties"),
    ),
}
_OF_PROPERTIES = ("properties", "additionalProperties", "patternProperties")
# What no grammar enforces.
_OUT_OF_REACH = (
    *("not", "if", "contains", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef"),
    "$recursiveRef",
)
_RULES = {
    "type",
    "enum",
    "const",
    "uniqueItems",
    *_OUT_OF_REACH,
    *(name for names in _OF_TYPE.values() for name in names),
}
_STRICT = "where strict is true, since it cannot be enforced"
_TOGETHER = "where strict is true, since both together cannot be enforced"
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}
# What stands beside each other only where the compiler passes over one of both.
_APART = (
    (("maxLength", "minLength"), ("format", "pattern")),
    (("pattern",), ("format",)),
    (("propertyNames", "patternProperties"), ("properties",)),
    (("propertyNames",), ("patternProperties",)),
)
# A place where the parameters themselves are, whose markup may name one twice.
_IS_TOP = re.compile(r"(\.(anyOf|oneOf)\[\d+\])*")
# The compiler's own: over them it passes over multiples.
_MAX_MULTIPLE, _MAX_RANGE = 1024, 10_000
# What joining may come to: schemas in each other, schemas of one value, and what is told again.
_MAX_DEPTH, _MAX_PARTS, _MAX_JOINED_BYTES = 128, 64, 256 * 1024


class NotEnforced(Exception):
    """The schema at `place` is `value`, and no grammar can hold a model to it: by the `rule` it must be another."""

    def __init__(self, place: str, value: Any, rule: str):
        super().__init__(place)
        self.place, self.value, self.rule = place, value, rule


class _Contradiction(Exception):
    """Nothing matches the schema."""


def enforceable(schema: Schema, is_strict: bool) -> Schema:
    """The same with one rule for every value, as far as it can be had. Raises NotEnforced if it `is_strict` and cannot;
    otherwise what no grammar enforces stays as it came. The schema is one that `tools.check_schema` has passed."""
    if is_strict:
        _refuse("", schema)
    return _Joiner(schema, is_strict).read("", schema)


def resolve(reference: str, root: Schema) -> Any:
    """The schema that `#/$defs/Name` points to, None for one that is kept elsewhere."""
    for keyword in _DEFINITIONS:
        start = f"#/{keyword}/"
        if reference.startswith(start):
            name = reference.removeprefix(start).replace("~1", "/").replace("~0", "~")
            return root.get(keyword, {}).get(name)
    return None


def _refuse(place: str, schema: Any) -> None:
    """Raise NotEnforced for what no joining can help."""
    if not isinstance(schema, dict):
        return
    for keyword in _OUT_OF_REACH:
        if keyword in schema:
            raise NotEnforced(f"{place}.{keyword}", schema[keyword], f"left out {_STRICT}")
    if schema.get("uniqueItems", False) is not False:
        raise NotEnforced(f"{place}.uniqueItems", schema["uniqueItems"], f"false or left out {_STRICT}")
    if not schema.get("$ref", "#").startswith("#"):
        raise NotEnforced(f"{place}.$ref", schema["$ref"], "a reference into the same schema, which begins with #")
    for keyword, key, child in _parts(schema):
        _refuse(f"{place}.{keyword}{_step(key)}", child)


def _parts(schema: Schema) -> Iterator[tuple[str, str | int | None, Any]]:
    """(keyword, key or index in it, schema) of the schemas inside a schema."""
    for keyword in (*_SCHEMAS, *_LISTS, *_MAPS):
        found = schema.get(keyword)
        if keyword in _SCHEMAS and keyword in schema:
            yield keyword, None, found
        elif keyword in _LISTS and isinstance(found, list):
            yield from ((keyword, i, child) for i, child in enumerate(found))
        elif keyword in _MAPS and isinstance(found, dict):
            yield from ((keyword, key, child) for key, child in found.items())


def _step(key: str | int | None) -> str:
    return "" if key is None else f"[{key}]" if isinstance(key, int) else f".{key}"


class _Joiner:
    """Reads one tool's schema, into whose definitions its references point."""

    def __init__(self, root: Schema, is_strict: bool):
        self._root, self._is_strict = root, is_strict
        self._num_left = _MAX_JOINED_BYTES

    def read(self, place: str, schema: Any, trail: frozenset[str] = frozenset(), depth: int = 0) -> Any:
        """A schema and what lies in it. `trail` has the references that led here where it was joined from others."""
        try:
            return self._read(place, schema, trail, depth)
        except _Contradiction:
            if self._is_strict:
                raise NotEnforced(place, schema, "a schema that a value can match") from None
        return schema

    def _read(self, place: str, schema: Any, trail: frozenset[str], depth: int) -> Any:
        if not isinstance(schema, dict):
            return schema
        try:
            self._bound(place, schema, depth > _MAX_DEPTH)
            joined, below = self._join(place, schema, trail)
            if self._is_strict:
                _check(place, joined)
        except NotEnforced:
            if self._is_strict:
                raise
            joined, below = schema, trail
            if depth > _MAX_DEPTH:
                return schema
        return self._read_parts(place, joined, below, depth)

    def _bound(self, place: str, schema: Any, is_over: bool) -> None:
        if is_over or self._num_left < 0:
            raise NotEnforced(place, schema, "simpler where strict is true: what it says together is too much")

    def _read_parts(self, place: str, schema: Schema, trail: frozenset[str], depth: int) -> Schema:
        parts = {keyword: type(schema[keyword])() for keyword in (*_LISTS, *_MAPS) if keyword in schema}
        for keyword, key, child in _parts(schema):
            where = f"{place}.{keyword}{_step(key)}"
            if keyword in _ALTERNATIVES:
                parts[keyword] += self._read_alternative(where, child, trail, depth + 1)
            elif key is None:
                parts[keyword] = self.read(where, child, trail, depth + 1)
            elif isinstance(key, int):
                parts[keyword].append(self.read(where, child, trail, depth + 1))
            else:
                parts[keyword][key] = self.read(where, child, trail, depth + 1)
        if any(schema.get(keyword) and not parts[keyword] for keyword in _ALTERNATIVES):
            raise _Contradiction
        return {**schema, **parts}

    def _read_alternative(self, place: str, schema: Any, trail: frozenset[str], depth: int) -> list[Any]:
        """Nothing if nothing matches it."""
        try:
            return [] if schema is False else [self._read(place, schema, trail, depth)]
        except _Contradiction:
            return []

    def _join(self, place: str, schema: Schema, trail: frozenset[str]) -> tuple[Schema, frozenset[str]]:
        """(the same without `allOf`, and with nothing beside a reference or alternatives; the trail of its parts)."""
        whole, references, alternatives = self._collect(place, schema)
        while references and (len(references) + len(alternatives) > 1 or _rules(whole)):
            reference = references.pop()
            target = resolve(reference, self._root)
            if target is None or reference in trail:
                rule = f"left out beside other keywords {_STRICT}"
                raise NotEnforced(f"{place}.$ref", reference, rule)
            trail |= {reference}
            self._num_left -= len(_encode(target))
            self._bound(place, schema, len(trail) > _MAX_PARTS)
            more, new_references, new_alternatives = self._collect(place, target)
            whole = _both(place, whole, {name: rule for name, rule in more.items() if name not in _DEFINITIONS})
            references += [new for new in new_references if new not in references]
            alternatives += new_alternatives
        if references:
            return {**whole, "$ref": references[0]}, trail
        if len(alternatives) > 1:
            keyword, options = alternatives[1]
            raise NotEnforced(f"{place}.{keyword}", options, f"left out beside other alternatives {_STRICT}")
        if not alternatives:
            return _settle(place, whole), trail
        ((keyword, options),) = alternatives
        rules = _rules(whole)
        if rules:
            self._num_left -= len(_encode(rules)) * len(options)
            self._bound(place, schema, False)
            options, trail = [{"allOf": [rules, option]} for option in options], trail | {""}
        return {**{name: note for name, note in whole.items() if name not in rules}, keyword: options}, trail

    def _collect(self, place: str, schema: Any) -> tuple[Schema, list[str], list[tuple[str, list[Any]]]]:
        """What a schema and those in its `allOf` say: (themselves, by references, by alternatives)."""
        whole: Schema = {}
        references: list[str] = []
        alternatives = []
        waiting = [schema]
        for num_before in itertools.count():
            if not waiting:
                break
            self._bound(place, schema, num_before > _MAX_PARTS)
            part = waiting.pop()
            if part is False:
                raise _Contradiction
            if part is True:
                continue
            whole = _both(place, whole, {name: rule for name, rule in part.items() if name not in _COMBINERS})
            references += [part["$ref"]] if "$ref" in part and part["$ref"] not in references else []
            alternatives += [(keyword, part[keyword]) for keyword in _ALTERNATIVES if keyword in part]
            waiting += reversed(part.get("allOf", []))
        return whole, references, alternatives


def _rules(schema: Schema) -> Schema:
    """What a value must match, without titles and other notes."""
    return {name: rule for name, rule in schema.items() if name in _RULES}


def _both(place: str, first: Schema, second: Schema) -> Schema:
    """One for what matches both; of their notes those of the first. Neither has references or alternatives."""
    joined = {**second, **first}
    if not first or not second:
        return joined
    for keyword in first.keys() & second.keys():
        one, other = first[keyword], second[keyword]
        if _encode(one) != _encode(other):
            joined[keyword] = _both_rules(f"{place}.{keyword}", keyword, one, other)
    if all(any(name in schema for name in _OF_PROPERTIES) for schema in (first, second)):
        joined |= _both_properties(place, first, second, joined)
    return joined


def _both_rules(place: str, keyword: str, one: Any, other: Any) -> Any:
    """The value of a keyword that two schemas have with different values."""
    if keyword == "type":
        return _both_types(one, other)
    if keyword in (*_LEAST, *_MOST) and _is(one, "number") and _is(other, "number"):
        return max(one, other) if keyword in _LEAST else min(one, other)
    if keyword == "required":
        return [*one, *(name for name in other if name not in one)]
    if keyword == "enum":
        others = {_encode(value) for value in other}
        return [value for value in one if _encode(value) in others]
    if keyword == "const":
        raise _Contradiction
    if keyword == "multipleOf" and isinstance(one, int) and isinstance(other, int):
        return math.lcm(one, other)
    if keyword in ("items", "propertyNames"):
        return _both_schemas(one, other)
    if keyword in _DEFINITIONS:
        return {**other, **one}
    if keyword in _RULES and keyword not in ("properties", "additionalProperties"):
        raise NotEnforced(place, other, f"the same for all that allOf and $ref say of a value {_STRICT}")
    return one


def _both_types(one: Any, other: Any) -> Any:
    kinds, others = (value if isinstance(value, list) else [value] for value in (one, other))
    common = [kind for kind in kinds if kind in others or (kind == "integer" and "number" in others)]
    common += [kind for kind in others if kind == "integer" and "number" in kinds and kind not in common]
    if not common:
        raise _Contradiction
    return common[0] if len(common) == 1 else common


def _both_properties(place: str, first: Schema, second: Schema, joined: Schema) -> Schema:
    """Those of `joined` that speak of properties: what one does not list must match what it says of others."""
    if "patternProperties" in joined:
        rule = f"left out beside properties that allOf or $ref say more of {_STRICT}"
        raise NotEnforced(f"{place}.patternProperties", joined["patternProperties"], rule)
    own, others = first.get("properties", {}), second.get("properties", {})
    rest, other_rest = first.get("additionalProperties", True), second.get("additionalProperties", True)
    named = {
        name: _both_schemas(own.get(name, rest), others.get(name, other_rest))
        for name in (*own, *(name for name in others if name not in own))
        if (name in own or rest is not False) and (name in others or other_rest is not False)
    }
    both = {"properties": named, "additionalProperties": _both_schemas(rest, other_rest)}
    return {keyword: rule for keyword, rule in both.items() if keyword in joined}


def _both_schemas(one: Any, other: Any) -> Any:
    if one is False or other is False:
        return False
    if one is True or _encode(one) == _encode(other):
        return other
    return one if other is True else {"allOf": [one, other]}


def _settle(place: str, schema: Schema) -> Schema:
    """The same with what its keywords leave to be understood, and of its `enum` or `const` what its rules allow."""
    if "enum" in schema or "const" in schema:
        return _settle_values(place, schema)
    settled = dict(schema)
    kinds = [kind for kind, names in _OF_TYPE.items() if any(name in schema for name in names)]
    if "type" not in schema and kinds:
        settled["type"] = kinds[0] if len(kinds) == 1 else kinds
    listed, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    missing = [name for name in schema.get("required", ()) if isinstance(name, str) and name not in listed]
    if missing and (rest is False or "patternProperties" in schema):
        raise NotEnforced(f"{place}.required", schema["required"], "names of properties only")
    if missing:
        settled["properties"] = {**listed, **dict.fromkeys(missing, rest)}
    if ("minItems" in schema or "maxItems" in schema) and "items" not in schema and "prefixItems" not in schema:
        settled["items"] = {}  # the compiler takes it for a list of nothing
    return settled


def _settle_values(place: str, schema: Schema) -> Schema:
    values = [schema["const"]] if "const" in schema else schema["enum"]
    if "const" in schema and "enum" in schema:
        values = _both_rules(place, "enum", values, schema["enum"])
    values = [value for value in values if _allows(place, value, schema)]
    if not values:
        raise _Contradiction
    kept = {name: rule for name, rule in schema.items() if name == "type" or name not in _RULES}
    return {**kept, "const": values[0]} if "const" in schema else {**kept, "enum": values}


def _allows(place: str, value: Any, schema: Schema) -> bool:
    """Whether the other keywords of a schema allow one of its values."""
    kinds = schema.get("type", [*_TYPES])
    if not any(_is(value, kind) for kind in (kinds if isinstance(kinds, list) else [kinds])):
        return False
    kind = next(kind for kind in _TYPES if _is(value, kind))
    size = len(value) if kind == "string" else value
    for keyword in set(_OF_TYPE.get(kind, ())) & schema.keys() - {"format"}:
        limit = schema[keyword]
        if keyword not in (*_LEAST, *_MOST) or not _is(limit, "number"):
            raise NotEnforced(f"{place}.{keyword}", limit, f"left out beside enum or const {_TOGETHER}")
        sign = 1 if keyword in _LEAST else -1
        if sign * size < sign * limit or (keyword.startswith("exclusive") and size == limit):
            return False
    return True


def _is(value: Any, kind: str) -> bool:
    """Whether a value has a type of JSON."""
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _check(place: str, schema: Schema) -> None:
    """Raise NotEnforced for what cannot be had together."""
    for names, others in _APART:
        name, other = (next((name for name in group if name in schema), "") for group in (names, others))
        if name and other:
            raise NotEnforced(f"{place}.{name}", schema[name], f"left out beside {other} {_TOGETHER}")
    if schema.get("type") == []:
        raise NotEnforced(f"{place}.type", [], "a type or a list of at least one")
    rest = schema.get("additionalProperties", False)
    if rest is not False and schema.get("properties") and _IS_TOP.fullmatch(place):
        rule = f"false or left out beside properties {_TOGETHER}"
        raise NotEnforced(f"{place}.additionalProperties", rest, rule)
    if "multipleOf" in schema:
        _check_multiple(place, schema)


def _check_multiple(place: str, schema: Schema) -> None:
    number = schema["multipleOf"]
    if schema["type"] != "integer" or not _is(number, "integer") or not 1 <= number <= _MAX_MULTIPLE:
        rule = f"a whole number up to {_MAX_MULTIPLE} beside the type integer, or be left out {_STRICT}"
        raise NotEnforced(f"{place}.multipleOf", number, rule)
    ends = [[schema[name] for name in names if _is(schema.get(name), "number")] for names in (_LEAST[:2], _MOST[:2])]
    is_open = not all(ends) or max(ends[0]) + _MAX_RANGE < min(ends[1])
    if any(ends) and is_open:
        rule = f"left out, or be beside both minimum and maximum, at most {_MAX_RANGE} apart, {_STRICT}"
        raise NotEnforced(f"{place}.multipleOf", number, rule)


def _encode(value: Any) -> bytes:
    """Equal for what JSON has equal, which Python's true and 1 are not."""
    return msgspec.json.encode(value)
