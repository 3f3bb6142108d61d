"""Command-line flags made from the dataclasses of `config.py`: names, types, groups and help. No torch."""

import argparse
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from server.config import flag_name

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)")
_METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "TEXT", Mapping: "JSON"}

C = TypeVar("C")


def add_flags(
    parser: argparse.ArgumentParser, configs: Iterable[type], also: Mapping[str, Sequence[str]] | None = None
) -> None:
    """One flag per field of the dataclasses, in groups. `also` has other names of a setting, for its help.

    A flag that is not given leaves nothing in the namespace.
    """
    groups: dict[str, Any] = {}
    for config in configs:
        hints = get_type_hints(config)
        for setting in fields(config):
            title = setting.metadata["group"]
            group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
            help = _help(setting, (also or {}).get(setting.name, ()))
            group.add_argument(flag_name(setting.name), help=help, **flag_options(setting, hints[setting.name]))


def flag_options(setting: "Field[Any]", hint: Any) -> dict[str, Any]:
    """How argparse reads the values of a setting of the type `hint`."""
    options = {"dest": setting.name, "default": argparse.SUPPRESS}
    if hint is bool:
        return {**options, "action": argparse.BooleanOptionalAction}
    kind, is_optional = _kind(hint)
    if kind is tuple:
        return {**options, "nargs": "+", "action": _Words, "metavar": _METAVARS[kind]}
    choices = setting.metadata["choices"] or None
    read: Callable[[str], Any] = {int: read_count, float: _read_number, Mapping: read_object}.get(kind, str)
    if kind is int and is_optional:
        read = _read_optional_count
    return {**options, "type": read, "choices": choices, "metavar": None if choices else _METAVARS[kind]}


def read_settings(given: Mapping[str, Any], config: type[C]) -> C:
    """The dataclass `config` with the values that were given for its fields. Raises ConfigError."""
    return config(**{setting.name: given[setting.name] for setting in fields(config) if setting.name in given})  # type: ignore[arg-type]


def read_count(text: str) -> int:
    """A whole number; 32k is 32000 and 32K is 32768, and so on for m, g and t."""
    found = _COUNT.fullmatch(text)
    if found is None:
        try:
            return int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (32k is 32000, 32K is 32768)") from None
    whole, is_whole = divmod(float(found[1]) * _UNITS[found[2]], 1) if "." in found[1] else (int(found[1]), 0)
    if is_whole:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(whole) if "." in found[1] else int(found[1]) * _UNITS[found[2]]


def read_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a JSON object")
    return value


class _Words(argparse.Action):
    """Collects words over all places where the flag stands; a JSON list of texts counts as its entries."""

    def __call__(
        self, _parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _flag: str | None = None
    ) -> None:
        words = tuple(word for value in values for word in _split_words(value))
        setattr(namespace, self.dest, getattr(namespace, self.dest, ()) + words)


def _split_words(text: str) -> Sequence[str]:
    try:
        value = json.loads(text) if text.startswith("[") else text
    except (ValueError, RecursionError):
        return [text]
    return value if isinstance(value, list) and all(isinstance(word, str) for word in value) else [text]


def _read_optional_count(text: str) -> int | None:
    return None if text == "auto" else read_count(text)


def _read_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _kind(hint: Any) -> tuple[Any, bool]:
    """The plain type of a hint, and whether None is a value of it."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kind = next(option for option in options if option is not type(None))
    return get_origin(kind) or kind, len(options) > 1


def _help(setting: "Field[Any]", also: Sequence[str]) -> str:
    assert setting.default is not MISSING
    text = setting.metadata["help"]
    if setting.default is not None and setting.default is not False and setting.default not in ((), ""):
        text += f" (default: {setting.default})"
    if also:
        text += f" (also {', '.join(also)})"
    return text.replace("%", "%%")
