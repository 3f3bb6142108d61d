"""Values are shown short, whatever the client sent, and large settings are never decoded."""

import json
from typing import Any

import pytest

from server.api.fields import MAX_SETTING_BYTES, Fields, shown
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
    fields = Fields(json.dumps({"stop": "x" * MAX_SETTING_BYTES, "seed": 1}).encode())
    with pytest.raises(InvalidRequest, match=str(MAX_SETTING_BYTES)):
        fields.text("stop", "")
    assert fields.integer("seed", None) == 1


def test_only_fields_that_are_asked_for_are_decoded() -> None:
    fields = Fields(b'{"unknown": 1e999, "seed": 7}')
    assert fields.integer("seed", None) == 7
    with pytest.raises(InvalidRequest, match="unknown"):
        fields.value("unknown")


@pytest.mark.parametrize("body", [b'{"a": null}', b"{}", b'{"a":   null  }'])
def test_null_is_the_same_as_absent(body: bytes) -> None:
    fields = Fields(body)
    assert not fields.has("a")
    assert fields.boolean("a", True) is True
    assert fields.items("a", 1) == []
    assert fields.mapping("a") == {}
    assert fields.number("a", 0.5, 0, 1) == 0.5
