"""Every spelling of a constraint comes to the same one, and every mistake names its field."""

import json
from typing import Any

import pytest

from server.api.constraints import MASK_FIELDS, read_constraint, read_masks
from server.api.fields import Fields, known_fields
from server.errors import InvalidRequest
from server.messages import MAX_CONSTRAINT_CHARS, Constraint
from server.tokenizer import Tokenizer

KNOWN = known_fields(*MASK_FIELDS)
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}}
TEXT = json.dumps(SCHEMA)
TAG = {"type": "structural_tag", "format": {"type": "const_string", "value": "x"}}
TAGGED = {"type": "json_schema", "json_schema": SCHEMA}


def fields_of(**values: Any) -> Fields:
    return Fields(KNOWN, json.dumps(values).encode())


def read(**values: Any) -> Constraint | None:
    return read_constraint(fields_of(**values), after_token_id=9)


@pytest.mark.parametrize(
    ("name", "value", "kind", "text"),
    [
        ("response_format", {"type": "json_object"}, "json_object", ""),
        ("response_format", {"type": "json_object", "schema": SCHEMA}, "json_schema", TEXT),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            "json_schema",
            TEXT,
        ),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": TEXT, "strict": None}},
            "json_schema",
            TEXT,
        ),
        ("response_format", TAG, "structural_tag", json.dumps(TAG)),
        ("structured_outputs", {"json": SCHEMA}, "json_schema", TEXT),
        ("structured_outputs", {"json": TEXT, "regex": None}, "json_schema", TEXT),
        ("structured_outputs", {"json_object": True, "whitespace_pattern": "x"}, "json_object", ""),
        ("structured_outputs", {"regex": "a+", "json_object": False}, "regex", "a+"),
        ("structured_outputs", {"choice": ["a", "ä"]}, "choice", '["a","ä"]'),
        ("structured_outputs", {"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ("structured_outputs", {"structural_tag": json.dumps(TAG)}, "structural_tag", json.dumps(TAG)),
        ("guided_json", SCHEMA, "json_schema", TEXT),
        ("guided_json", True, "json_schema", "true"),
        ("guided_regex", "a+", "regex", "a+"),
        ("guided_choice", ["a"], "choice", '["a"]'),
        ("guided_grammar", "root", "grammar", "root"),
        ("regex", "a+", "regex", "a+"),
        ("ebnf", "root", "grammar", "root"),
        ("json_schema", TEXT, "json_schema", TEXT),
    ],
)
def test_every_spelling_is_read(name: str, value: Any, kind: str, text: str) -> None:
    assert read(**{name: value}) == Constraint(kind, text, 9, name)


@pytest.mark.parametrize(
    "values",
    [{}, {"response_format": None}, {"response_format": {"type": "text"}}, {"regex": "", "guided_json": None}],
)
def test_nothing_is_demanded(values: dict[str, Any]) -> None:
    assert read(**values) is None


def test_the_older_structural_tag_becomes_the_newer() -> None:
    structures = [{"begin": "<f=a>", "schema": SCHEMA, "end": "</f>"}]
    found = read(response_format={"type": "structural_tag", "structures": structures, "triggers": ["<f="]})
    assert found is not None and found.kind == "structural_tag"
    tag = {"type": "tag", "begin": "<f=a>", "content": TAGGED, "end": "</f>"}
    expected = {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<f="], "tags": [tag]}}
    assert json.loads(found.text) == expected


@pytest.mark.parametrize(
    ("values", "param", "message"),
    [
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {}}, "response_format", "type is null, it must be one of text, json_object"),
        ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, None, "schema is null"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, None, "schema is 5"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}}, None, "strict is 1"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "name": 1}}}, None, "name is 1"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "format is missing"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "'regex, choice'"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "a string"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one string"),
        ({"guided_choice": ["a", 1]}, "guided_choice", "at least one string"),
        ({"guided_json": [1]}, "guided_json", "an object, or a string"),
        ({"regex": 5}, "regex", "a string"),
        ({"json_schema": "x" * (MAX_CONSTRAINT_CHARS + 1)}, "json_schema", str(MAX_CONSTRAINT_CHARS)),
        ({"regex": "a", "ebnf": "b"}, "ebnf", "regex and ebnf are both given"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "both given"),
    ],
)
def test_every_mistake_names_its_field(values: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        read(**values)
    assert caught.value.param is not None
    assert param is None or caught.value.param == param
    assert len(caught.value.message) < 300


def masks(tokenizer: Tokenizer, is_thinking: bool | None = None, **values: Any) -> dict[str, Any]:
    return read_masks(fields_of(**values), tokenizer, 400, is_thinking)


def test_a_constraint_holds_behind_the_reasoning_and_at_once_without_it(tokenizer: Tokenizer) -> None:
    end_id = tokenizer.token_id("</think>")
    for is_thinking, after in ((True, end_id), (False, None), (None, None)):
        assert masks(tokenizer, is_thinking, regex="a")["constraint"].after_token_id == after


def test_the_budget_of_thinking_holds_where_there_may_be_thinking(tokenizer: Tokenizer) -> None:
    end_id = tokenizer.token_id("</think>")
    for is_thinking, expected in ((True, (0, end_id)), (None, (0, end_id)), (False, (None, None))):
        found = masks(tokenizer, is_thinking, thinking_token_budget=0)
        assert (found["thinking_budget"], found["think_end_id"]) == expected
    for absent in (-1, None):
        assert masks(tokenizer, True, thinking_token_budget=absent)["thinking_budget"] is None


def test_bad_words_are_banned_as_they_begin_and_as_they_follow_a_space(tokenizer: Tokenizer) -> None:
    found = masks(tokenizer, bad_words=[" fox", "fox", "quick brown"])["bad_words"]
    assert [tokenizer.decode(word) for word in found] == ["fox", " fox", "quick brown", " quick brown"]
    assert masks(tokenizer)["bad_words"] == () == masks(tokenizer, bad_words=[])["bad_words"]


def test_allowed_ids_are_read(tokenizer: Tokenizer) -> None:
    assert masks(tokenizer, allowed_token_ids=[3, 399])["allowed_token_ids"] == (3, 399)
    assert masks(tokenizer)["allowed_token_ids"] == ()


@pytest.mark.parametrize(
    ("values", "param", "message"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids", "no token could come"),
        ({"allowed_token_ids": [400]}, "allowed_token_ids", r"in 0\.\.399"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids", "an integer"),
        ({"allowed_token_ids": "1"}, "allowed_token_ids", "a list"),
        ({"allowed_token_ids": [1] * 401}, "allowed_token_ids", "the limit is 400"),
        ({"bad_words": [""]}, "bad_words", r"bad_words\[0\] is ''"),
        ({"bad_words": ["a", 5]}, "bad_words", r"bad_words\[1\] is 5"),
        ({"bad_words": "a"}, "bad_words", "a list"),
        ({"bad_words": ["a"] * 513}, "bad_words", "the limit is 512"),
        ({"bad_words": ["z" * 99]}, "bad_words", "the limit is 64"),
        ({"thinking_token_budget": -2}, "thinking_token_budget", r"in -1\.\."),
        ({"thinking_token_budget": 1.5}, "thinking_token_budget", "an integer"),
    ],
)
def test_masks_that_make_no_sense_are_refused(
    tokenizer: Tokenizer, values: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        masks(tokenizer, **values)
    assert (caught.value.param or "").startswith(param)


def test_a_budget_needs_a_token_that_ends_thinking(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "token_id", lambda text: None)
    with pytest.raises(InvalidRequest, match="no token </think>"):
        masks(tokenizer, thinking_token_budget=5)
