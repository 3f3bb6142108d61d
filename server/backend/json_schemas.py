"""A client's JSON schema as the grammar compiler should read it. Knows no tokens."""

import json
import math
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from server.errors import InvalidRequest

# Formats that are enforced. JSON Schema lets a validator pass over the others.
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
_SCHEMAS = ("items", "additionalProperties")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
# Keywords by which other properties may be meant than those an object lists.
_OPEN = ("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")
# A value must match what each of these says of it, and what those that come next say, of which each says it of another
# part of the value.
_WHOLES = ("patternProperties", "allOf", "anyOf", "oneOf", "$ref")
_PARTS = ("properties", "additionalProperties", "prefixItems", "items")
_DEFINITIONS = ("$defs", "definitions")
# The compiler makes as many states of the multiples of a number, and of several numbers' common ones. A million take it
# some seconds, in which it cannot be interrupted.
_MAX_MULTIPLE = 100_000
# OpenAI's limit. The compiler's time grows with the square: five thousand take a second.
_MAX_PROPERTIES = 5_000
# The compiler takes no more.
_MAX_DEPTH = 127


def parse_schema(text: str) -> dict[str, Any]:
    """The schema in `text`. Raises InvalidRequest for anything but a JSON object or true."""
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"it is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("it is nested too deeply") from error
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise InvalidRequest(f"it is {text[:60]}, a JSON schema is an object")
    if _is_deep(schema):
        raise InvalidRequest(f"it is nested too deeply, the limit is {_MAX_DEPTH}")
    if _common_multiple(schema) > _MAX_MULTIPLE:
        raise InvalidRequest(
            f"the least common multiple of its multipleOf, without decimal points, is over the limit of "
            f"{_MAX_MULTIPLE}; take smaller ones"
        )
    num_properties = _count_properties(schema)
    if num_properties > _MAX_PROPERTIES:
        raise InvalidRequest(f"it has {num_properties} properties, the limit is {_MAX_PROPERTIES}; name fewer")
    return schema


def _is_deep(schema: dict[str, Any]) -> bool:
    """More objects and lists than the limit lie in each other."""
    level: list[Any] = [schema]
    for _ in range(_MAX_DEPTH):
        level = [child for found in level for child in _children(found) if isinstance(child, dict | list)]
    return bool(level)


def _children(found: Any) -> Iterable[Any]:
    return found.values() if isinstance(found, dict) else found


def _count_properties(schema: dict[str, Any]) -> int:
    """All that stand in `properties`, wherever they are."""
    count = 0
    rest: list[Any] = [schema]
    while rest:
        found = rest.pop()
        if isinstance(found, dict):
            count += len(found["properties"]) if isinstance(found.get("properties"), dict) else 0
            rest += found.values()
        elif isinstance(found, list):
            rest += found
    return count


def _common_multiple(schema: dict[str, Any]) -> int:
    """The least number that every `multipleOf` divides, wherever it stands; more than the limit where that is enough
    to know."""
    common = 1
    rest: list[Any] = [schema]
    while rest and common <= _MAX_MULTIPLE:
        found = rest.pop()
        if isinstance(found, dict):
            common = math.lcm(common, _digits(found.get("multipleOf")))
            rest += found.values()
        elif isinstance(found, list):
            rest += found
    return common


def _digits(number: Any) -> int:
    """A number above 0 as an integer, without its decimal point; 1 for anything else."""
    if not isinstance(number, int | float) or not 0 < number < math.inf:
        return 1
    value = Decimal(number) if isinstance(number, int) else Decimal(str(number))
    exponent = value.as_tuple().exponent
    return int(value.scaleb(-min(0, exponent if isinstance(exponent, int) else 0)))


def close_objects(schema: Any) -> Any:
    """The same with no other properties than those that an object lists, where the schema does not speak of others.

    JSON Schema allows them, and a model may add some for ever. What matches matches the original, too. Where several
    schemas speak of one object they stay open, or each would forbid what another lists; all do if one of those is a
    reference, whose definition others may share.
    """
    return _rewrite(schema, closes=not _combines_reference(schema))


def _rewrite(schema: Any, closes: bool) -> Any:
    if not isinstance(schema, dict):
        return schema
    rewritten, closes_parts = _drop_format(schema), closes and not _is_combined(schema)
    for keyword in _SCHEMAS:
        if keyword in rewritten:
            rewritten[keyword] = _rewrite(rewritten[keyword], closes_parts)
    for keyword in _SCHEMA_LISTS:
        if isinstance(rewritten.get(keyword), list):
            rewritten[keyword] = [_rewrite(option, closes_parts) for option in rewritten[keyword]]
    for keyword in _SCHEMA_MAPS:
        if isinstance(rewritten.get(keyword), dict):
            may_close = closes if keyword in _DEFINITIONS else closes_parts
            rewritten[keyword] = {name: _rewrite(child, may_close) for name, child in rewritten[keyword].items()}
    if closes and "properties" in rewritten and not any(keyword in rewritten for keyword in _OPEN):
        rewritten["additionalProperties"] = False
    return rewritten


def _is_combined(schema: dict[str, Any]) -> bool:
    """Several schemas speak of the same value."""
    branches = schema.get("allOf")
    num_wholes = sum(keyword in schema for keyword in _WHOLES)
    has_parts = any(keyword in schema for keyword in _PARTS)
    return num_wholes + has_parts > 1 or (isinstance(branches, list) and len(branches) > 1)


def _combines_reference(schema: Any) -> bool:
    """A reference is one of several schemas that speak of a value, or lies in one of these."""
    rest = [(schema, False)]
    while rest:
        found, is_combined = rest.pop()
        if isinstance(found, dict):
            is_combined = is_combined or _is_combined(found)
            if is_combined and "$ref" in found:
                return True
            rest += [(child, is_combined and keyword not in _DEFINITIONS) for keyword, child in found.items()]
        elif isinstance(found, list):
            rest += [(child, is_combined) for child in found]
    return False


def _drop_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "format" or value in _FORMATS}
