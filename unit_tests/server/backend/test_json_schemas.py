"""Closed schemas: what is closed, what stays open, and that what matches still matches the original."""

import json
from typing import Any

import pytest

from server.backend.json_schemas import close_objects, parse_schema
from server.errors import InvalidRequest

INTEGER = {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"properties": {"a": INTEGER}}, {"properties": {"a": INTEGER}, "additionalProperties": False}),
        ({"type": "object"}, {"type": "object"}),
        (
            {"properties": {"a": INTEGER}, "additionalProperties": {"properties": {}}},
            {
                "properties": {"a": INTEGER},
                "additionalProperties": {"properties": {}, "additionalProperties": False},
            },
        ),
        (
            {"properties": {"a": INTEGER}, "allOf": [{"required": ["b"]}]},
            {"properties": {"a": INTEGER}, "allOf": [{"required": ["b"]}]},
        ),
        # A property with the name of a keyword, and values that only look like schemas.
        (
            {"properties": {"properties": {"enum": [{"properties": {}}]}}},
            {"properties": {"properties": {"enum": [{"properties": {}}]}}, "additionalProperties": False},
        ),
        (
            {"$defs": {"x": {"properties": {}}}, "items": {"anyOf": [{"properties": {}}, True]}},
            {
                "$defs": {"x": {"properties": {}, "additionalProperties": False}},
                "items": {"anyOf": [{"properties": {}, "additionalProperties": False}, True]},
            },
        ),
        ({"type": "string", "format": "shoe-size"}, {"type": "string"}),
        ({"type": "string", "format": "date"}, {"type": "string", "format": "date"}),
        ({"properties": {"format": INTEGER}}, {"properties": {"format": INTEGER}, "additionalProperties": False}),
        (True, True),
    ],
)
def test_objects_take_no_other_properties_where_the_schema_speaks_of_none(schema: Any, expected: Any) -> None:
    assert close_objects(schema) == expected


@pytest.mark.parametrize(("text", "expected"), [("true", {}), ('{"type": "null"}', {"type": "null"})])
def test_schemas_are_parsed(text: str, expected: Any) -> None:
    assert parse_schema(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"type":', "not valid JSON"),
        ("5", "is 5, a JSON schema is an object"),
        ("false", "is false"),
        ('{"items":' * 100_000 + "1", "too deeply"),
        (json.dumps({"items": {"properties": {f"p{i}": {} for i in range(5001)}}}), "has 5001 properties"),
    ],
)
def test_what_is_no_schema_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_schema(text)


@pytest.mark.parametrize(
    "multiple", ["7", "100000", "0.25", "1e-10", "12.5", "0", "-3", "true", "null", "1e400", "NaN"]
)
def test_multiples_of_what_the_compiler_can_take_are_passed_on(multiple: str) -> None:
    parse_schema(f'{{"items": [{{"multipleOf": {multiple}}}], "properties": {{"multipleOf": {{}}}}}}')


@pytest.mark.parametrize(
    "schema",
    [
        '{"multipleOf": 9999991}',
        '{"$defs": {"x": {"anyOf": [{}, {"multipleOf": 1000.003}]}}, "$ref": "#/$defs/x"}',
        '{"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}',
        '{"multipleOf": 1e300}',
        f'{{"multipleOf": {"9" * 4000}}}',
    ],
)
def test_multiples_that_would_keep_the_compiler_busy_are_refused(schema: str) -> None:
    with pytest.raises(InvalidRequest, match="over the limit of 100000"):
        parse_schema(schema)
