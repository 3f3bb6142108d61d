"""Schemas of tools as a grammar can enforce them."""

import time
from typing import Any

import pytest

from server.api.tool_schemas import NotEnforced, enforceable
from server.errors import InvalidRequest
from unit_tests.server.api.test_tools import read, tool

NUMBER = {"type": "integer"}
CLOSED = {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "joined"),
    [
        ({}, {}),
        (CLOSED, CLOSED),
        ({"const": 5, "title": "t"}, {"const": 5, "title": "t"}),
        ({"anyOf": [NUMBER, {"type": "null"}], "title": "t"}, {"anyOf": [NUMBER, {"type": "null"}], "title": "t"}),
        ({"allOf": [{"$ref": "#/$defs/n"}], "title": "t"}, {"title": "t", "$ref": "#/$defs/n"}),
        ({"allOf": [NUMBER, {"minimum": 3, "maximum": 9}, {"minimum": 5}]}, {**NUMBER, "minimum": 5, "maximum": 9}),
        ({"allOf": [{"type": "number"}, NUMBER]}, NUMBER),
        ({"allOf": [{"type": ["string", "null"]}, {"type": "string"}]}, {"type": "string"}),
        ({"allOf": [{"enum": [1, 2, True]}, {"enum": [True, 2]}]}, {"enum": [2, True]}),
        ({"enum": ["a", "abc", 1], "type": "string", "minLength": 2}, {"enum": ["abc"], "type": "string"}),
        ({"enum": [1, 2, 3], "exclusiveMinimum": 1, "maximum": 2}, {"enum": [2]}),
        ({"enum": [1, 2], "const": 2}, {"const": 2}),
        ({"minimum": 5}, {"minimum": 5, "type": "number"}),
        ({"minimum": 5, "maxLength": 1}, {"minimum": 5, "maxLength": 1, "type": ["string", "number"]}),
        ({"type": "array", "minItems": 1}, {"type": "array", "minItems": 1, "items": {}}),
        ({"required": ["a"]}, {"type": "object", "required": ["a"], "properties": {"a": True}}),
        ({"allOf": [{"multipleOf": 4, **NUMBER}, {"multipleOf": 6}]}, {"multipleOf": 12, **NUMBER}),
        (
            {"properties": {"a": NUMBER}, "allOf": [{"properties": {"a": {"minimum": 1}}, "required": ["a"]}]},
            {"type": "object", "properties": {"a": {**NUMBER, "minimum": 1}}, "required": ["a"]},
        ),
        (
            {"allOf": [CLOSED, {"properties": {"a": True, "c": True}, "additionalProperties": {"minimum": 2}}]},
            {**CLOSED, "properties": {"a": NUMBER, "b": {**NUMBER, "minimum": 2}}},
        ),
        (
            {"type": "integer", "anyOf": [{"minimum": 5}, {"const": 3}, {"const": "x"}]},
            {"anyOf": [{"type": "integer", "minimum": 5}, {"type": "integer", "const": 3}]},
        ),
    ],
)
@pytest.mark.parametrize("is_strict", [False, True])
def test_what_several_schemas_say_of_a_value_is_one(schema: Any, joined: Any, is_strict: bool) -> None:
    definitions = {"$defs": {"n": NUMBER}}
    assert enforceable({**schema, **definitions}, is_strict) == {**joined, **definitions}
    inner = {"type": "object", "properties": {"x": schema}, **definitions}
    assert enforceable(inner, is_strict) == {**inner, "properties": {"x": joined}}


def test_references_with_something_beside_them_are_told_out() -> None:
    definitions = {"$defs": {"n": {"allOf": [{"$ref": "#/$defs/m"}, {"minimum": 1}]}, "m": NUMBER}}
    found = enforceable({"properties": {"x": {"$ref": "#/$defs/n", "maximum": 9}}, **definitions}, True)
    assert found["properties"]["x"] == {"type": "integer", "minimum": 1, "maximum": 9}


RING = {"properties": {"next": {"allOf": [{"$ref": "#/$defs/r"}, {"minProperties": 1}]}}}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"uniqueItems": True}, ".uniqueItems"),
        ({"items": {"not": {}}}, ".items.not"),
        ({"dependentRequired": {}}, ".dependentRequired"),
        ({"const": 1, "type": "string"}, ""),
        ({"anyOf": [{"const": 1}], "type": "string"}, ""),
        ({"anyOf": [NUMBER], "oneOf": [NUMBER]}, ".oneOf"),
        ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, ".pattern"),
        ({"enum": ["a"], "pattern": "a"}, ".pattern"),
        ({"pattern": "a", "format": "date"}, ".pattern"),
        ({"maxLength": 5, "pattern": "a"}, ".maxLength"),
        ({"properties": {"a": {}}, "propertyNames": {}}, ".propertyNames"),
        ({"properties": {}, "required": ["a"], "additionalProperties": False}, ".required"),
        ({**NUMBER, "multipleOf": 3, "minimum": 1}, ".multipleOf"),
        ({**NUMBER, "multipleOf": 3, "minimum": 1, "maximum": 20_000}, ".multipleOf"),
        ({"type": []}, ".type"),
        ({"$ref": "#/$defs/r"}, ".next.$ref"),
        ({"allOf": [{}] * 100}, ""),
    ],
)
def test_what_cannot_be_enforced_is_refused_if_strict_and_else_stays(schema: dict[str, Any], place: str) -> None:
    whole = {"type": "object", "properties": {"x": schema}, "$defs": {"r": RING if "$ref" in schema else {}}}
    with pytest.raises(NotEnforced) as caught:
        enforceable(whole, True)
    assert caught.value.place.endswith(place)
    assert enforceable(whole, False)["properties"].keys() == {"x"}


def test_parameters_may_not_be_named_twice() -> None:
    schema = {**CLOSED, "additionalProperties": {}}
    with pytest.raises(NotEnforced):
        enforceable(schema, True)
    assert enforceable({"properties": {"x": schema}}, True)["properties"]["x"] == schema
    assert enforceable({"additionalProperties": {}}, True) == {"additionalProperties": {}, "type": "object"}


def chain(length: int) -> dict[str, Any]:
    """A reference that leads to as many others, each with something beside it."""
    links = {f"{i}": {"allOf": [{"$ref": f"#/$defs/{i + 1}"}, {"minimum": i}]} for i in range(length)}
    return {"$ref": "#/$defs/0", "$defs": {**links, f"{length}": NUMBER}}


@pytest.mark.parametrize(
    "schema",
    [
        chain(2000),
        {"$defs": {"r": RING}, "properties": {"x": {"$ref": "#/$defs/r"}}},
        {"allOf": [{"properties": {f"{i}": {}}} for i in range(5000)]},
        {
            "$defs": {"big": {"enum": ["x" * 9] * 9000}},
            "properties": {f"{i}": {"allOf": [{"$ref": "#/$defs/big"}, {"type": "string"}]} for i in range(2000)},
        },
        {"properties": {f"{i}": {} for i in range(5000)}, "anyOf": [{"required": [f"{i}"]} for i in range(5000)]},
    ],
    ids=["chain", "ring", "allOf", "big", "anyOf"],
)
def test_a_hostile_schema_costs_little(schema: dict[str, Any]) -> None:
    started = time.process_time()
    assert enforceable(schema, False)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("rules", "place"),
    [
        ({"type": "array", "items": {}, "uniqueItems": True}, "uniqueItems is true, it must be false or left out"),
        ({"type": "array", "items": {}, "contains": {}}, "contains is an object of 0 entries, it must be left out"),
        ({"not": {"const": "x"}}, "not is an object"),
        ({"allOf": [{}, {"if": {}}]}, "allOf[1].if is an object"),
        ({"$ref": "http://x/y"}, "$ref is 'http://x/y', it must be a reference into the same schema"),
        ({"type": "number", "multipleOf": 5}, "multipleOf is 5, it must be a whole number up to 1024"),
    ],
)
def test_a_strict_tool_may_not_have_what_no_grammar_enforces(rules: dict[str, Any], place: str) -> None:
    parameters = {"properties": {"x": rules}}
    with pytest.raises(InvalidRequest) as caught:
        read(tools=[tool(parameters=parameters, strict=True)])
    assert f"tools[0].function.parameters.properties.x.{place}"[-100:] in caught.value.message
    assert "strict" in caught.value.message or "$ref" in place
    assert read(tools=[tool(parameters=parameters)], tool_choice="required") is not None
