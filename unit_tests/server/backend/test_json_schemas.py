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
        # Several schemas that speak of one object.
        (
            {"allOf": [{"properties": {"a": INTEGER}}, {"items": {"properties": {}}, "format": "shoe-size"}]},
            {"allOf": [{"properties": {"a": INTEGER}}, {"items": {"properties": {}}}]},
        ),
        (
            {"properties": {"a": {"properties": {}}}, "anyOf": [{"properties": {"b": INTEGER}}]},
            {"properties": {"a": {"properties": {}}}, "anyOf": [{"properties": {"b": INTEGER}}]},
        ),
        (
            {"allOf": [{"$ref": "#/$defs/x"}], "title": "an only one", "$defs": {"x": {"properties": {}}}},
            {
                "allOf": [{"$ref": "#/$defs/x"}],
                "title": "an only one",
                "$defs": {"x": {"properties": {}, "additionalProperties": False}},
            },
        ),
        (
            {"$defs": {"x": {"properties": {}}}, "items": {"$ref": "#/$defs/x", "properties": {"b": INTEGER}}},
            {"$defs": {"x": {"properties": {}}}, "items": {"$ref": "#/$defs/x", "properties": {"b": INTEGER}}},
        ),
        (
            {"$defs": {"x": {"properties": {}}}, "allOf": [{"anyOf": [{"$ref": "#/$defs/x"}]}, {"properties": {}}]},
            {"$defs": {"x": {"properties": {}}}, "allOf": [{"anyOf": [{"$ref": "#/$defs/x"}]}, {"properties": {}}]},
        ),
        (
            {"allOf": [{}, {}], "$defs": {"x": {"properties": {"y": {"$ref": "#/$defs/x"}}}}},
            {
                "allOf": [{}, {}],
                "$defs": {"x": {"properties": {"y": {"$ref": "#/$defs/x"}}, "additionalProperties": False}},
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
        ('{"items":' * 127 + "{}" + "}" * 127, "too deeply, the limit is 127"),
        ('{"enum": [' + "[" * 126 + "]" * 126 + "]}", "too deeply, the limit is 127"),
        (json.dumps({"items": {"properties": {f"p{i}": {} for i in range(5001)}}}), "has 5001 properties"),
    ],
)
def test_what_is_no_schema_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_schema(text)


def test_a_schema_that_a_parser_without_a_limit_has_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions of Python read what recursion cannot follow."""
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    monkeypatch.setattr(json, "loads", lambda text: schema)
    with pytest.raises(InvalidRequest, match="too deeply"):
        parse_schema("")


def test_a_schema_as_deep_as_may_be_is_passed_on() -> None:
    parse_schema('{"items":' * 126 + "{}" + "}" * 126)


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
