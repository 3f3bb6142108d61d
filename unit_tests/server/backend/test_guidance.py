"""Every text that llguidance lets through is what was asked for, and what it cannot do is refused."""

import json
import re
from itertools import permutations
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from server.backend.guidance import Guidance, describe
from server.errors import InvalidRequest
from server.tokenizer import Tokenizer
from unit_tests.checkpoints import IM_END
from unit_tests.server.backend.walks import STOP_IDS, VOCAB_SIZE, allowed_ids, draw_text, matches, tokenizer_in

INTEGER, STRING = {"type": "integer"}, {"type": "string", "maxLength": 9}
SCHEMAS: dict[str, Any] = {
    "object": {"type": "object", "properties": {"a": INTEGER, "b": STRING}, "required": ["b"]},
    "nested": {"properties": {"a": {"type": "array", "items": {"properties": {"x": INTEGER}}, "maxItems": 3}}},
    "length": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": '^["\\\\a-c]{2,5}$'},
    "pattern with length": {"type": "string", "pattern": "^[a-z]*$", "minLength": 3, "maxLength": 4},
    "format": {"type": "string", "format": "date"},
    "range": {"type": "integer", "minimum": -5, "exclusiveMaximum": 17},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 99},
    "enum": {"enum": [1, "a", None, {"x": [1.5]}, 'q"\\\n']},
    "enum with a type": {"type": "string", "enum": ["a", 1]},
    "all of": {"allOf": [{"properties": {"a": INTEGER}, "required": ["a"]}, {"properties": {"b": STRING}}]},
    "any of beside properties": {"properties": {"a": INTEGER}, "required": ["a"], "anyOf": [{"required": ["a"]}]},
    "required but not listed": {"type": "object", "properties": {"a": INTEGER}, "required": ["b", "a"]},
    "reference with a sibling": {"$defs": {"x": INTEGER}, "$ref": "#/$defs/x", "minimum": 5, "maximum": 9},
    "recursive": {
        "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}, "maxItems": 2}},
        "$ref": "#/$defs/x",
    },
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    "tuple": {"type": "array", "prefixItems": [INTEGER, STRING], "items": False, "minItems": 2},
    "key with quotes": {"type": "object", "properties": {'a"\\\n': INTEGER}, "required": ['a"\\\n']},
}


@pytest.fixture(scope="module")
def guidance(tmp_path_factory: pytest.TempPathFactory) -> Guidance:
    return Guidance(Tokenizer(tokenizer_in(tmp_path_factory.mktemp("guidance"))), VOCAB_SIZE, STOP_IDS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_output_validates(guidance: Guidance, name: str) -> None:
    validator = jsonschema_rs.Draft202012Validator(SCHEMAS[name])
    start = guidance.compile("json_schema", json.dumps(SCHEMAS[name]))
    texts = [text for seed in range(25) if (text := draw_text(start.copy(), seed)) is not None]
    assert len(texts) >= 10
    for text in texts:
        assert validator.is_valid(json.loads(text.decode(errors="replace"))), text


def test_objects_are_closed_and_written_as_python_writes_them(guidance: Guidance) -> None:
    start = guidance.compile("json_schema", json.dumps(SCHEMAS["object"]))
    assert matches(start, json.dumps({"a": 1, "b": "x"})) and matches(start, '{"b": ""}')
    for text in ('{"a":1, "b": "x"}', '{"b": "x", "c": 1}', '{"b": "x" }', '{"a": 1}', '{"b": "x", "a": 1}', ""):
        assert not matches(start, text), text


BASE = {"$defs": {"Base": {"type": "object", "properties": {"id": INTEGER}}}}
NAMED = {"properties": {"name": STRING}}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (
            {"type": "object", "allOf": [{"properties": {"a": INTEGER}}, {"properties": {"b": INTEGER}}]},
            '{"a": 1, "b": 2}',
        ),
        ({**BASE, "allOf": [{"$ref": "#/$defs/Base"}, NAMED]}, '{"id": 1, "name": "x"}'),
        ({**BASE, **NAMED, "$ref": "#/$defs/Base"}, '{"id": 1, "name": "x"}'),
        (
            {"type": "object", **NAMED, "anyOf": [{"properties": {"x": INTEGER}, "required": ["x"]}]},
            '{"name": "k", "x": 1}',
        ),
    ],
)
def test_what_several_schemas_list_of_one_object_may_all_come(
    guidance: Guidance, schema: dict[str, Any], text: str
) -> None:
    keys = set(json.loads(text))
    start = guidance.compile("json_schema", json.dumps(schema))
    assert any(
        matches(start, json.dumps({key: json.loads(text)[key] for key in order})) for order in permutations(keys)
    )


def test_json_object_is_any_object(guidance: Guidance) -> None:
    start = guidance.compile("json_object", "")
    assert matches(start, '{"a": [1, {"b": null}], "c": "\\nö"}') and matches(start, "{}")
    assert not matches(start, "[]") and not matches(start, '{"a": \x01}')


@pytest.mark.parametrize("pattern", ["[a-c]{2,3}", r"\d+(\.\d)?", "(?i)yes|no", "^ab?$", "a+?b", "x*", "ä|日本"])
def test_every_output_matches_the_pattern_and_nothing_behind_it(guidance: Guidance, pattern: str) -> None:
    start = guidance.compile("regex", pattern)
    for seed in range(20):
        text = draw_text(start.copy(), seed)
        assert text is not None and re.fullmatch(pattern, text.decode()), text


def test_choices_are_literal(guidance: Guidance) -> None:
    choices = ["yes", "no", "a.b|c", "yes sir", "\\d [x]\n#&~-", "<|im_end|>", "ä"]
    start = guidance.compile("choice", json.dumps(choices))
    assert {draw_text(start.copy(), seed).decode() for seed in range(80)} == set(choices)  # type: ignore[union-attr]


def test_tokens_come_back(guidance: Guidance) -> None:
    matcher = guidance.compile("regex", "ab*c")
    assert matcher.accept(ord("a")) and not matcher.accept(ord("x"))
    before = allowed_ids(matcher)
    for byte in b"bbc":
        assert matcher.accept(byte)
    assert allowed_ids(matcher) == [IM_END]
    matcher.rollback(3)
    assert allowed_ids(matcher) == before == [ord("b"), ord("c")] and not matcher.error()


def test_a_long_text_without_a_choice_is_not_tokenised_whole_at_every_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, lengths = Tokenizer(tokenizer_in(tmp_path)), list[int]()
    encode = tokenizer.encode

    def count(text: str) -> list[int]:
        lengths.append(len(text))
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", count)
    text = "the cat sat on the mat, " * 40
    start = Guidance(tokenizer, VOCAB_SIZE, STOP_IDS).compile("choice", json.dumps([text]))
    assert draw_text(start, 0, most=2000) == text.encode()
    assert 0 < max(lengths) <= 256


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "(ab", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "(" * 50_000 + ")" * 50_000, "."),
        ("regex", "a{99999999999999999999}", "."),
        ("regex", "\ud800", "surrogates"),
        ("choice", "[]", "at least one string"),
        ("choice", '["a", 1]', "at least one string"),
        ("choice", "[", "not valid JSON"),
        ("json_schema", '{"type": "shoe"}', "Invalid type: shoe"),
        ("json_schema", '{"$ref": "#/nowhere"}', "nowhere"),
        ("json_schema", '{"$ref": "http://localhost/x"}', "localhost"),
        ("json_schema", '{"not": {}}', "not"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"minimum": 2, "maximum": 1, "type": "integer"}', "greater than maximum"),
        ("json_schema", '{"enum": []}', "empty"),
        ("json_schema", '{"type": "array", "items": ' * 500 + "{}" + "}" * 500, "too deeply"),
        ("json_schema", '{"type": "array", "items": ' * 126 + "{}" + "}" * 126, "recursion"),
        ("json_schema", '{"const": "\\ud800"}', "not JSON serializable"),
    ],
)
def test_what_cannot_be_served_is_refused(guidance: Guidance, kind: str, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        guidance.compile(kind, text)
    assert len(caught.value.message) <= 200


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        ("((((a{1,100}){1,100}){1,100}){1,100}){1,100}", "too many expressions"),
        ("(.*a.{20}|.*b.{25})(x{1,999}y)*", ""),
    ],
)
def test_expensive_patterns_are_served_or_end_in_an_error(guidance: Guidance, pattern: str, error: str) -> None:
    matcher = guidance.compile("regex", pattern)
    for _ in range(40):
        allowed_ids(matcher)
        matcher.accept(ord("a"))
    assert error in matcher.error() and bool(matcher.error()) == bool(error)


def test_one_that_is_renewed_knows_nothing_of_the_limits_that_copies_have_come_to(guidance: Guidance) -> None:
    start = guidance.compile("regex", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}")
    spoilt = start.copy()
    while not spoilt.error():
        allowed_ids(spoilt)
        spoilt.accept(ord("a"))
    other, renewed = start.copy(), spoilt.renew()
    allowed_ids(other)
    assert "too many expressions" in other.error()
    assert allowed_ids(renewed) == [ord("a")] and renewed.accept(ord("a")) and not renewed.error()


def test_messages_are_short() -> None:
    assert describe("regex parse error:\n  (a\n  ^\nerror: unclosed group\n | 1") == "unclosed group"
    assert describe("too  big\n<state>\n" + "x" * 999) == "too big"
