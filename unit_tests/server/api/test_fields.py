"""Values are shown short, whatever the client sent, and large settings are never decoded."""

import json
from typing import Any

import pytest

from server.api.fields import MAX_SETTING_BYTES, Fields, known_fields, shown, shown_json, split_list
from server.errors import InvalidRequest


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        (True, "true"),
        (None, "null"),
        (1.5, "1.5"),
        ("a'b", '"a\'b"'),
        ([1, 2], "a list of 2 entries"),
        ({"a": 1}, "an object of 1 entries"),
    ],
)
def test_a_value_is_shown_as_json_and_a_container_by_its_size(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize("value", ["x" * 10_000, 10**1000, [[]] * 10_000])
def test_a_long_value_is_cut(value: Any) -> None:
    assert len(shown(value)) < 120


def test_a_setting_over_the_byte_limit_is_refused_undecoded() -> None:
    body = json.dumps({"stop": "x" * MAX_SETTING_BYTES, "seed": 1}).encode()
    fields = Fields(known_fields("stop", "seed"), body)
    with pytest.raises(InvalidRequest, match=str(MAX_SETTING_BYTES)):
        fields.text("stop", "")
    assert fields.integer("seed", None) == 1


def test_only_fields_that_are_asked_for_are_decoded() -> None:
    fields = Fields(known_fields("top_p", "seed"), b'{"top_p": 1e999, "seed": 7, "other": 1e999}')
    assert fields.integer("seed", None) == 7
    with pytest.raises(InvalidRequest, match="top_p"):
        fields.value("top_p")


def test_a_field_of_an_inner_object_is_named_in_full() -> None:
    fields = Fields(known_fields("role"), b'{"role": 5}', "messages[3]")
    with pytest.raises(InvalidRequest, match=r"messages\[3\]\.role is 5") as caught:
        fields.text("role", "")
    assert caught.value.param == "messages[3].role"


def test_a_range_that_a_flag_sets_is_shown_with_the_flag() -> None:
    fields = Fields(known_fields("a"), b'{"a": 9}')
    assert fields.integer("a", None, 0, 9, "--most") == 9
    with pytest.raises(InvalidRequest, match=r"^a is 9, it must be in 0\.\.8 \(--most\)$"):
        fields.integer("a", None, 0, 8, "--most")


@pytest.mark.parametrize("body", [b"[]", b"null", b"{", b"\xff"])
def test_what_is_wrong_with_the_body_as_a_whole_is_no_fields_fault(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="the body") as caught:
        Fields(known_fields("a"), body)
    assert caught.value.param is None


def test_a_list_is_split_undecoded_up_to_its_limit() -> None:
    assert split_list("a", b' [1e999, {"b" : 2},null ]', 3) == [b"1e999", b'{"b" : 2}', b"null"]
    assert split_list("a", b"[]", 3) == []
    with pytest.raises(InvalidRequest, match="more than 3 entries"):
        split_list("a", b"[1, 2, 3, 4]", 3)
    with pytest.raises(InvalidRequest, match="a is null, it must be a list"):
        split_list("a", b"", 3)


def test_undecoded_json_is_shown_short() -> None:
    assert (shown_json(b""), shown_json(b"[5]")) == ("null", "[5]")
    assert shown_json(b'"' + "é".encode() * 5000 + b'"').endswith("(10002 bytes)")


@pytest.mark.parametrize("body", [b'{"a": null}', b"{}", b'{"a":   null  }'])
def test_null_is_the_same_as_absent(body: bytes) -> None:
    fields = Fields(known_fields("a"), body)
    assert not fields.has("a")
    assert fields.boolean("a", True) is True
    assert fields.items("a", 1) == []
    assert fields.mapping("a") == {}
    assert fields.number("a", 0.5, 0, 1) == 0.5
