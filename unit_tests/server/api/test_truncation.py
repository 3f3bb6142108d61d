"""What stays of a prompt that is to be cut."""

from typing import Any

import msgspec
import pytest

from server.api.fields import Fields, known_fields
from server.api.truncation import TRUNCATION_FIELDS, Truncation, read_truncation
from server.errors import InvalidRequest

KNOWN = known_fields(*TRUNCATION_FIELDS)


def _read(num_output: int = 1, **fields: Any) -> Truncation | None:
    return read_truncation(Fields(KNOWN, msgspec.json.encode(fields)), 100, num_output)


def test_the_last_tokens_stay_unless_the_first_ones_are_wanted() -> None:
    for side, expected in ((None, [3, 4]), ("left", [3, 4]), ("right", [1, 2])):
        truncation = _read(truncate_prompt_tokens=2, truncation_side=side)
        assert truncation is not None
        assert truncation.cut([1, 2, 3, 4]) == expected
        assert truncation.cut([1]) == [1]
    assert _read(truncation_side="right") is None


@pytest.mark.parametrize(("num_output", "max_len"), [(0, 100), (1, 99), (30, 70), (100, 1)])
def test_minus_one_leaves_room_for_the_output(num_output: int, max_len: int) -> None:
    assert _read(num_output, truncate_prompt_tokens=-1) == Truncation(max_len, keeps_start=False)


def test_there_is_always_room_for_one_token() -> None:
    assert _read(truncate_prompt_tokens=100) == Truncation(99, keeps_start=False)


@pytest.mark.parametrize("asked", [100, 99])
def test_without_output_no_room_is_left(asked: int) -> None:
    assert _read(0, truncate_prompt_tokens=asked) == Truncation(asked, keeps_start=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"truncate_prompt_tokens": 0}, r"truncate_prompt_tokens is 0, .* 1\.\.100"),
        ({"truncate_prompt_tokens": -2}, r"-1\.\.100"),
        ({"truncate_prompt_tokens": 101}, r"-1\.\.100"),
        ({"truncate_prompt_tokens": "5"}, "an integer"),
        ({"truncation_side": "middle"}, "left or right"),
        ({"truncation_side": 1}, "a string"),
    ],
)
def test_anything_else_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        _read(**fields)
