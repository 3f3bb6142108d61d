"""How soon, how long, with whose prefixes. Wrong values over HTTP are in test_requests."""

import pytest

from server.api.fields import Fields, known_fields
from server.api.terms import TERM_FIELDS, Terms, read_terms
from server.errors import InvalidRequest


def _read(body: bytes) -> Terms:
    return read_terms(Fields(known_fields(*TERM_FIELDS), body))


@pytest.mark.parametrize("body", [b"{}", b'{"priority": null, "timeout": null, "cache_salt": null}'])
def test_what_is_not_said_is_left_to_the_engine(body: bytes) -> None:
    assert _read(body) == Terms(priority=0, timeout=None, cache_salt="")


@pytest.mark.parametrize("priority", [-(2**31), -1, 0, 2**31 - 1])
def test_a_priority_is_any_integer_of_32_bits(priority: int) -> None:
    assert _read(b'{"priority": %d}' % priority).priority == priority


@pytest.mark.parametrize(("text", "seconds"), [(b"5", 5.0), (b"0.25", 0.25), (b"1e-9", 1e-9), (b"86400", 86400.0)])
def test_a_timeout_is_any_number_of_seconds_above_0(text: bytes, seconds: float) -> None:
    assert _read(b'{"timeout": %b}' % text).timeout == seconds


@pytest.mark.parametrize("salt", ["a", " ", "x" * 256, "é" * 256])
def test_a_salt_is_a_text_of_up_to_256_characters(salt: str) -> None:
    assert _read(f'{{"cache_salt": "{salt}"}}'.encode()).cache_salt == salt


def test_an_empty_salt_is_a_mistake_and_the_message_says_how_to_mend_it() -> None:
    with pytest.raises(InvalidRequest, match="leave it out to share prefixes") as caught:
        _read(b'{"cache_salt": ""}')
    assert caught.value.param == "cache_salt"
