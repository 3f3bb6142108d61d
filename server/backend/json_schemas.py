"""A client's JSON schema as the grammar compiler should read it. Knows no tokens."""

import json
from typing import Any

from server.errors import InvalidRequest

# Formats that are enforced. JSON Schema lets a validator pass over the others.
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
_SCHEMAS = ("items", "additionalProperties")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
# Keywords by which other properties may be meant than those an object lists.
_OPEN = ("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")


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
    return schema


def close_objects(schema: Any) -> Any:
    """The same with no other properties than those that an object lists, where the schema does not speak of others.

    JSON Schema allows them, and a model may add some for ever. What matches matches the original, too.
    """
    if not isinstance(schema, dict):
        return schema
    closed = _drop_format(schema)
    for keyword in _SCHEMAS:
        if keyword in closed:
            closed[keyword] = close_objects(closed[keyword])
    for keyword in _SCHEMA_LISTS:
        if isinstance(closed.get(keyword), list):
            closed[keyword] = [close_objects(option) for option in closed[keyword]]
    for keyword in _SCHEMA_MAPS:
        if isinstance(closed.get(keyword), dict):
            closed[keyword] = {name: close_objects(child) for name, child in closed[keyword].items()}
    if "properties" in closed and not any(keyword in closed for keyword in _OPEN):
        closed["additionalProperties"] = False
    return closed


def _drop_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "format" or value in _FORMATS}
