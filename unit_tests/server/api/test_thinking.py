"""The fields that say whether the model thinks, and what becomes of it."""

from typing import Any

import msgspec
import pytest

from server.api.fields import Fields, known_fields
from server.api.thinking import EFFORTS, THINKING_FIELDS, Reasoning, read_reasoning, read_thinking
from server.errors import InvalidRequest


def fields_of(**values: Any) -> Fields:
    """The fields of a request."""
    return Fields(known_fields(*THINKING_FIELDS), msgspec.json.encode(values))


@pytest.mark.parametrize(
    ("values", "thinking"),
    [
        ({}, None),
        ({"reasoning_effort": None}, None),
        ({"reasoning_effort": "none"}, False),
        *(({"reasoning_effort": effort}, True) for effort in EFFORTS[1:]),
        ({"enable_thinking": True}, True),
        ({"enable_thinking": False}, False),
        ({"enable_thinking": False, "reasoning_effort": "high"}, False),
        ({"enable_thinking": True, "reasoning_effort": "none"}, True),
    ],
)
def test_an_effort_is_thinking_and_none_is_not_unless_it_is_said_outright(values: Any, thinking: bool | None) -> None:
    assert read_thinking(fields_of(**values)) is thinking


def test_reasoning_is_included_and_separate_unless_it_is_said() -> None:
    assert read_reasoning(fields_of()) == Reasoning(is_included=True, is_separate=True)
    assert read_reasoning(fields_of(include_reasoning=False)) == Reasoning(is_included=False, is_separate=True)
    assert read_reasoning(fields_of(separate_reasoning=False)) == Reasoning(is_included=True, is_separate=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reasoning_effort": "much"}, "reasoning_effort is 'much', it must be one of none, minimal, low"),
        ({"reasoning_effort": ""}, "reasoning_effort is ''"),
        ({"reasoning_effort": 5}, "reasoning_effort is 5, it must be a string"),
        ({"enable_thinking": 1}, "enable_thinking is 1, it must be true or false"),
        ({"include_reasoning": "no"}, "include_reasoning is 'no'"),
        ({"separate_reasoning": 0}, "separate_reasoning is 0"),
    ],
)
def test_a_wrong_value_is_named_with_its_limit(values: Any, message: str) -> None:
    read = read_thinking if {"reasoning_effort", "enable_thinking"} & set(values) else read_reasoning
    with pytest.raises(InvalidRequest) as caught:
        read(fields_of(**values))
    assert message in caught.value.message
    assert caught.value.param == next(iter(values))
