"""The command line: flags and a settings file to settings, and one clear line for what is wrong with them. No torch."""

import argparse
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml

from server.config import EngineConfig, ServerConfig, flag_name
from server.errors import ConfigError
from server.flag_aliases import ALIASES, Alias
from server.flags import add_flags, flag_options, read_settings
from server.versions import read_version

API_KEY_VARIABLE, ADMIN_API_KEY_VARIABLE = "TANDEM_API_KEY", "TANDEM_ADMIN_API_KEY"
_CONFIGS = (EngineConfig, ServerConfig)
# Flags that say what to do, which is not for a settings file to decide.
_COMMANDS = ("config", "check", "version", "help")
# Before the name of a setting: a value for it that counts only where there is no other.
_WEAK = "weak "


@dataclass(frozen=True)
class CommandLine:
    """What `python -m server` was asked: to serve with these settings, or to check them."""

    engine: EngineConfig
    server: ServerConfig
    is_check: bool = False


def read_command_line(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> CommandLine:
    """The settings of `python -m server`. Flags go before those of the file `--config`; underscores in flags count as
    hyphens. Raises ConfigError."""
    parser = build_parser()
    given = _parse(parser, [_hyphenate(argument) for argument in arguments])
    _take_positional(given)
    if "config" in given:
        given = {**_read_file(parser, Path(given["config"])), **given}
    for name in [name for name in given if name.startswith(_WEAK)]:
        given.setdefault(name.removeprefix(_WEAK), given.pop(name))
    if "api_key" not in given and environment.get(API_KEY_VARIABLE):
        given["api_key"] = (environment[API_KEY_VARIABLE],)
    if given.get("enable_rl") and "admin_api_key" not in given and environment.get(ADMIN_API_KEY_VARIABLE):
        given["admin_api_key"] = environment[ADMIN_API_KEY_VARIABLE]
    engine, server = read_settings(given, EngineConfig), read_settings(given, ServerConfig)
    return CommandLine(engine, server, is_check="check" in given)


def build_parser() -> argparse.ArgumentParser:
    """All flags, by their own names and by those of other servers."""
    without_effect = [flag_name(name) for alias in ALIASES if alias.setting is None for name in alias.names]
    parser = _Parser(
        prog="python -m server",
        usage="python -m server [MODEL] [flags]",
        description="Serve a Qwen3.5 checkpoint over HTTP.",
        epilog=f"Accepted for other servers' sake, without effect: {', '.join(without_effect)}.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("positional", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings by flag name; flags go before it")
    parser.add_argument(
        "--check", action="store_true", help="check settings, checkpoint and memory, print the memory plan, and exit"
    )
    parser.add_argument("--version", action="version", version=read_version())
    also: dict[str, list[str]] = {}
    for alias in ALIASES:
        also.setdefault(alias.setting or "", []).extend(map(flag_name, alias.names))
    add_flags(parser, _CONFIGS, also)
    _add_aliases(parser)
    return parser


def _add_aliases(parser: argparse.ArgumentParser) -> None:
    settings = {
        setting.name: flag_options(setting, get_type_hints(config)[setting.name])
        for config in _CONFIGS
        for setting in fields(config)
    }
    for alias in ALIASES:
        for name in alias.names:
            parser.add_argument(flag_name(name), help=argparse.SUPPRESS, **_alias_options(alias, settings))


def _alias_options(alias: Alias, settings: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    dest = f"{_WEAK * alias.is_weak}{alias.setting or 'ignored'}"
    if not alias.takes_text:
        return {"action": "store_const", "const": alias.value, "dest": dest}
    if alias.setting is None or alias.is_weak:
        return {"type": alias.read, "dest": dest}
    own = settings[alias.setting]
    return own if alias.read is None else {**own, "type": alias.read}


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ConfigError(_describe_unknown(parser, unknown[0].partition("=")[0]))
    return vars(known)


def _take_positional(given: dict[str, Any]) -> None:
    model = given.pop("positional", None)
    if model is not None and given.setdefault("model", model) != model:
        raise ConfigError(f"the model is given twice, as {model} and as --model {given['model']}")


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


def _describe_unknown(parser: argparse.ArgumentParser, name: str) -> str:
    close = difflib.get_close_matches(name, _actions(parser), n=1)
    return f"there is no flag {name}; " + (f"did you mean {close[0]}?" if close else "--help lists the flags")


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings}


def _read_file(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """The settings in a YAML file, keyed by flag names without the hyphens in front."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"--config {path} holds a {type(content).__name__}, it must map flag names to values")
    actions = _actions(parser)
    try:
        arguments = [word for name, value in (content or {}).items() for word in _to_arguments(actions, name, value)]
        return _parse(parser, arguments)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error.message}") from error


def _to_arguments(actions: Mapping[str, argparse.Action], name: Any, value: Any) -> list[str]:
    """What the command line would say for one entry of a settings file."""
    flag, negated = _hyphenate(f"--{name}"), _hyphenate(f"--no-{name}")
    if name in _COMMANDS:
        raise ConfigError(f"{name} is not a setting; give it on the command line")
    has_no_text = flag in actions and actions[flag].nargs == 0
    if value is None or (has_no_text and value is False and negated not in actions):
        return []
    if has_no_text and isinstance(value, bool):
        return [flag if value else negated]
    if isinstance(value, list):
        return [f"{flag}={entry}" for entry in value]
    if isinstance(value, dict):
        return [f"{flag}={json.dumps(value)}"]
    # YAML reads on and off as true and false.
    return [f"{flag}={('off', 'on')[value] if isinstance(value, bool) else value}"]
