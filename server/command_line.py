"""The command line: flags to settings, and one clear line for what is wrong with them. No torch."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from server.config import EngineConfig, ServerConfig, add_flags, read_flags
from server.errors import ConfigError


def read_command_line(arguments: Sequence[str]) -> tuple[EngineConfig, ServerConfig]:
    """The settings of `python -m server`; underscores in flags count as hyphens. Raises ConfigError."""
    parser = _Parser(prog="python -m server", description="Serve a Qwen3.5 checkpoint over HTTP.", allow_abbrev=False)
    for config in (EngineConfig, ServerConfig):
        add_flags(parser, config)
    known, unknown = parser.parse_known_args([_hyphenate(argument) for argument in arguments])
    if unknown:
        raise ConfigError(_describe_unknown(parser, unknown[0]))
    return read_flags(known, EngineConfig), read_flags(known, ServerConfig)


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit with code 2."""

    def error(self, message: str) -> NoReturn:
        """What argparse calls for a flag it cannot read."""
        raise ConfigError(f"{message}; --help lists the flags")


def _hyphenate(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _describe_unknown(parser: argparse.ArgumentParser, argument: str) -> str:
    name = argument.partition("=")[0]
    flags = [flag for action in parser._actions for flag in action.option_strings]
    close = difflib.get_close_matches(name, flags, n=1)
    return f"there is no flag {name}; " + (f"did you mean {close[0]}?" if close else "--help lists the flags")
