"""A server that does not start is one line with what it said."""

import pytest

from benchmarks.openai_server import RunFailed
from benchmarks.serving.launch import launched_servers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--no-such-flag", r"--launch '--no-such-flag' ended with status \d: .*--no-such-flag"),
        ("--model /no/such/checkpoint", "ended with status 1: .*/no/such/checkpoint is not a directory"),
        ("'unclosed", "is no list of arguments: No closing quotation"),
    ],
)
def test_a_server_that_does_not_start_says_why(arguments: str, message: str) -> None:
    with pytest.raises(RunFailed, match=message), launched_servers([arguments], 60.0):
        raise AssertionError("it has started")


def test_a_server_that_is_never_ready_is_given_up_and_ended() -> None:
    with (
        pytest.raises(RunFailed, match=r"is not ready after 0.001 s \(--start-timeout\)"),
        launched_servers([""], 0.001),
    ):
        raise AssertionError("it has started")
