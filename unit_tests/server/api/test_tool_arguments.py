"""Arguments of tool calls: casting by schema, and JSON text that grows with the value."""

import json
import time
from typing import Any

import pytest

from server.api.tool_arguments import ArgumentWriter, cast, parameter_types

ANY = frozenset({"null", "integer", "number", "boolean", "object", "array", "string"})


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("42", {"integer"}, 42),
        ("-7", {"integer"}, -7),
        ("+7", {"integer"}, 7),
        ("007", {"integer"}, 7),
        ("000", {"integer"}, 0),
        ("5.0", {"integer"}, 5),
        (" 42\n", {"integer"}, 42),
        ("9" * 300, {"integer"}, int("9" * 300)),
        ("3.5", {"integer"}, "3.5"),
        ("five", {"integer"}, "five"),
        ("1_000", {"integer"}, "1_000"),
        ("٣", {"integer"}, "٣"),
        ("", {"integer"}, ""),
        ("3.14", {"number"}, 3.14),
        ("5.0", {"number"}, 5),
        ("5.", {"number"}, 5),
        (".5", {"number"}, 0.5),
        ("-1e3", {"number"}, -1000),
        ("1e300", {"number"}, 1e300),
        ("12345678901234567890", {"number"}, 12345678901234567890),
        ("1e999", {"number"}, "1e999"),
        ("nan", {"number"}, "nan"),
        ("Infinity", {"number"}, "Infinity"),
        ("true", {"boolean"}, True),
        ("True", {"boolean"}, True),
        ("1", {"boolean"}, True),
        ("FALSE", {"boolean"}, False),
        ("0", {"boolean"}, False),
        ("yes", {"boolean"}, "yes"),
        ("null", {"null", "integer"}, None),
        ("None", {"null", "integer"}, "None"),
        ("null", {"integer"}, "null"),
        ("null", {"string"}, "null"),
        ("12345", {"string"}, "12345"),
        ("true", {"string"}, "true"),
        ("null", {"string", "null"}, None),
        ("nulls", {"string", "null"}, "nulls"),
        ("8080", {"string", "null"}, "8080"),
        ("[1, {}]", {"array"}, [1, {}]),
        ('{"a": [1]}', {"object"}, {"a": [1]}),
        ("[1]", {"object"}, "[1]"),
        ("{'a': 1}", {"object"}, "{'a': 1}"),
        ('{"a": NaN}', {"object"}, '{"a": NaN}'),
        ("[" * 100_000, {"array"}, "[" * 100_000),
        ('"quoted"', {"string"}, '"quoted"'),
        ("42", ANY, 42),
        ("[]", ANY, []),
        ("text", ANY, "text"),
        (' two\n"lines" \\ é😀\u2028', {"integer"}, ' two\n"lines" \\ é😀\u2028'),
    ],
)
def test_a_value_is_cast_to_a_type_of_its_schema_or_stays_a_string(text: str, types: set[str], value: Any) -> None:
    cast_value = json.loads(cast(text, frozenset(types)))
    assert cast_value == value
    assert type(cast_value) is type(value)


SCHEMA: dict[str, Any] = {
    "$defs": {
        "Color": {"enum": ["red", "blue"]},
        "Deep": {"anyOf": [{"$ref": "#/$defs/Deep"}, {"$ref": "#/$defs/Color"}, {"type": "object"}]},
        "a/b~c": {"type": "boolean"},
    },
    "definitions": {"Old": {"type": "integer"}},
    "properties": {
        "plain": {"type": "integer"},
        "list": {"type": ["integer", "null"]},
        "any": {"anyOf": [{"type": "array"}, {"type": "null"}]},
        "one": {"oneOf": [{"type": "number"}]},
        "all": {"allOf": [{"$ref": "#/definitions/Old"}]},
        "enum": {"enum": ["a", 1, 1.5, None, True, [], {}]},
        "const": {"const": 5},
        "typed_enum": {"type": "string", "enum": ["1", "2"]},
        "color": {"$ref": "#/$defs/Color"},
        "deep": {"$ref": "#/$defs/Deep"},
        "escaped": {"$ref": "#/$defs/a~1b~0c"},
        "nowhere": {"$ref": "#/$defs/Nowhere"},
        "elsewhere": {"$ref": "https://example.com/x"},
        "nothing": {},
        "true": True,
    },
}


@pytest.mark.parametrize(
    ("key", "types"),
    [
        ("plain", {"integer"}),
        ("list", {"integer", "null"}),
        ("any", {"array", "null"}),
        ("one", {"number"}),
        ("all", {"integer"}),
        ("enum", {"string", "integer", "number", "null", "boolean", "array", "object"}),
        ("const", {"integer"}),
        ("typed_enum", {"string"}),
        ("color", {"string"}),
        ("deep", {"string", "object"}),
        ("escaped", {"boolean"}),
        ("nowhere", {"string"}),
        ("elsewhere", {"string"}),
        ("nothing", {"string"}),
        ("true", {"string"}),
        ("unknown", {"string"}),
    ],
)
def test_the_types_of_a_parameter_are_found_wherever_its_schema_has_them(key: str, types: set[str]) -> None:
    assert parameter_types(SCHEMA, key) == types


def test_a_schema_without_properties_knows_no_types() -> None:
    assert parameter_types({}, "x") == {"string"}


def test_a_hostile_schema_costs_little_for_each_parameter() -> None:
    wide = {"anyOf": [{"$ref": "#/$defs/A"}] * 100_000}
    schema = {"$defs": {"A": wide}, "properties": {"x": wide, "y": {"enum": [1] * 100_000}}}
    started = time.process_time()
    for _ in range(200):
        parameter_types(schema, "x")
        parameter_types(schema, "y")
    assert time.process_time() - started < 1


def write(schema: dict[str, Any], *parameters: tuple[str, list[str]]) -> list[str]:
    """What the writer gives, call by call."""
    writer, texts = ArgumentWriter(schema), []
    for key, parts in parameters:
        texts += [writer.open(key), *map(writer.push, parts), writer.close()]
    return [*texts, writer.finish()]


def test_the_texts_add_up_to_json() -> None:
    texts = write(SCHEMA, ("plain", ["\n4", "2\n"]), ("text", ["\n", "a\n", "\n", "b", "\n"]), ("all", ["x"]))
    assert texts == [
        "",
        "",
        "",
        '{"plain": 42',
        ', "text": "',
        "",
        "a",
        "\\n",
        "\\nb",
        "",
        '"',
        "",
        "",
        ', "all": "x"',
        "}",
    ]
    assert json.loads("".join(texts)) == {"plain": 42, "text": "a\n\nb", "all": "x"}


def test_no_parameters_are_an_empty_object() -> None:
    assert write({}) == ["{}"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("\n\n", ""), ("\n\n\n", "\n"), ("\n", ""), ("", ""), ("\na\n\n", "a\n"), ("\n\na", "\na"), (" a ", " a ")],
)
def test_one_newline_on_either_side_is_no_part_of_a_value(text: str, value: str) -> None:
    for parts in ([text], list(text)):
        assert json.loads("".join(write({}, ("x", parts)))) == {"x": value}


@pytest.mark.parametrize(
    "rules", [{"maxLength": 9}, {"anyOf": [{"type": "null"}, {"minLength": 1}]}, {"$ref": "#/$defs/name"}]
)
@pytest.mark.parametrize(
    ("text", "value"), [(" a b ", "a b"), ("\ta\r", "a"), ("\n a\n\n", " a\n"), (" ", ""), ("  ", ""), ("a", "a")]
)
def test_one_space_on_either_side_is_no_part_of_a_value_of_a_certain_form(
    rules: dict[str, Any], text: str, value: str
) -> None:
    schema = {"properties": {"x": rules, "y": {"type": "string"}}, "$defs": {"name": {"pattern": "a"}}}
    for parts in ([text], list(text)):
        assert json.loads("".join(write(schema, ("x", parts), ("y", parts))))["x"] == value
        assert json.loads("".join(write(schema, ("y", [" a "])))) == {"y": " a "}


def test_what_may_still_become_null_is_held_back_and_no_longer() -> None:
    schema = {"properties": {"x": {"type": ["string", "null"]}}}
    assert write(schema, ("x", ["\n", "nu", "ll", "\n"])) == ["", "", "", "", "", '{"x": null', "}"]
    assert write(schema, ("x", ["nu", "ll", "s"])) == ["", "", "", '{"x": "nulls', '"', "}"]
    assert write(schema, ("x", [" " * 15, "  ", "null"])) == ["", "", '{"x": "' + " " * 17, "null", '"', "}"]
    assert write(schema, ("x", [" " * 17 + "null"])) == ["", '{"x": "' + " " * 17 + "null", '"', "}"]


def test_keys_are_escaped() -> None:
    assert json.loads("".join(write({}, ('a"b\\', ["c"])))) == {'a"b\\': "c"}


@pytest.mark.parametrize(
    "rules", [{"enum": ["Ann", " x", "y "]}, {"$ref": "#/$defs/name"}, {"anyOf": [{"const": "Ann"}]}]
)
@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, "Ann") for text in ("Ann", " Ann", "Ann\t", "\nAnn\n", "\rAnn ")),
        ("\nAnna\n", "Anna"),
        ("\n" + "Anna " * 9, "Anna " * 9),
        ("  Ann", "  Ann"),
    ],
)
def test_a_listed_value_is_told_without_spaces_around_it(rules: dict[str, Any], text: str, value: str) -> None:
    schema = {"properties": {"x": rules}, "$defs": {"name": {"enum": ["Ann"]}}}
    for parts in ([text], list(text)):
        assert json.loads("".join(write(schema, ("x", parts)))) == {"x": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [(" x", " x"), ("  x", " x"), ("\n x\n", " x"), ("x", "x"), ("\tx", "x"), ("y \n", "y "), ("\n\nz\n", "\nz")],
)
def test_a_listed_value_may_have_spaces_of_its_own(text: str, value: str) -> None:
    schema = {"properties": {"x": {"enum": [" x", "x", "y ", "\nz"]}}}
    assert json.loads("".join(write(schema, ("x", [*text])))) == {"x": value}


def test_a_text_is_held_back_while_it_may_be_a_listed_value() -> None:
    schema = {"properties": {"x": {"anyOf": [{"const": "Ann"}, {"type": "string"}]}}}
    assert write(schema, ("x", ["\nAn", "nabel", "la\n"])) == ["", "", '{"x": "Annabel', "la", '"', "}"]
    mixed = {"properties": {"x": {"enum": ["a", 1, None]}}}
    assert [write(mixed, ("x", [text]))[2] for text in (" a", "1 ", "null")] == ['{"x": "a"', '{"x": 1', '{"x": null']


def test_a_text_of_a_format_has_no_spaces_around_it() -> None:
    schema = {"properties": {"x": {"type": "string", "format": "date"}}}
    assert "".join(write(schema, ("x", [" 2026-01-01\t"]))) == '{"x": "2026-01-01"}'


def test_parameters_are_found_in_alternatives_and_among_others() -> None:
    schema = {"anyOf": [{"properties": {"x": {"type": "integer"}}}, {"additionalProperties": {"type": "boolean"}}]}
    assert parameter_types(schema, "x") == {"integer"} and parameter_types(schema, "y") == {"boolean"}
