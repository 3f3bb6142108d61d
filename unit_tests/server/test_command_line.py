"""Flags become settings, and mistakes become one line."""

import pytest

from server.command_line import read_command_line
from server.config import DEMO_MODEL
from server.errors import ConfigError


def test_without_flags_the_demo_is_served() -> None:
    engine, server = read_command_line([])
    assert engine.model == DEMO_MODEL
    assert server.port == 8000


@pytest.mark.parametrize("flag", ["--mtp-step", "--mtp_step"])
def test_underscores_and_hyphens_are_alike(flag: str) -> None:
    assert read_command_line([flag, "3"])[0].mtp_step == 3
    assert read_command_line([f"{flag}=4", "--served-model-name=a_b"])[0].mtp_step == 4


def test_underscores_in_values_stay() -> None:
    assert read_command_line(["--served_model_name=a_b"])[1].served_model_name == "a_b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mtp-step", "9"], "0..8"),
        (["--mtp-stepp", "1"], "did you mean --mtp-step?"),
        (["--mtp", "1"], "no flag --mtp"),
        (["--port", "http"], "invalid int value"),
        (["--port", "70000"], "0..65535"),
        (["--dtype", "int3"], "invalid choice"),
        (["--page-size", "0"], "at least 1"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_flag_is_an_error_that_says_what_is_right(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        read_command_line(arguments)
