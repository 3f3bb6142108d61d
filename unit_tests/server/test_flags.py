"""The flags, their types, groups and defaults come from the dataclasses."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from server.config import EngineConfig, ServerConfig, flag_name
from server.flags import add_flags, read_count, read_settings

CONFIGS = (EngineConfig, ServerConfig)


def parse(config: type, *arguments: str) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, [config])
    return read_settings(vars(parser.parse_args(arguments)), config)


@pytest.mark.parametrize("config", CONFIGS)
def test_without_flags_the_settings_are_the_dataclasses_own(config: type) -> None:
    assert parse(config) == config()


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_has_one_flag_with_help_that_names_the_default(config: type) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser, [config])
    flags = {action.option_strings[0]: action for action in parser._actions}
    assert sorted(flags) == sorted(flag_name(setting.name) for setting in fields(config))
    for setting in fields(config):
        help = flags[flag_name(setting.name)].help
        assert setting.metadata["help"] and help is not None and help.startswith(setting.metadata["help"])
        has_value = setting.default not in (None, (), "") and setting.default is not False
        assert (f"(default: {setting.default})" in help) == has_value


def test_every_setting_stands_in_its_group() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, CONFIGS)
    groups = {group.title: group._group_actions for group in parser._action_groups}
    for config in CONFIGS:
        for setting in fields(config):
            titles = [title for title, actions in groups.items() if setting.name in {a.dest for a in actions}]
            assert titles == [setting.metadata["group"]]


def test_values_get_the_type_of_their_field() -> None:
    flags = ("--mtp-step", "2", "--max-model-len", "64", "--num-threads=3", "--model", "5", "--request-timeout", "2")
    engine = parse(EngineConfig, *flags, "--stream-slowdown", "3", "--disable-cuda-graph")
    assert (engine.mtp_step, engine.max_model_len, engine.num_threads, engine.model) == (2, 64, 3, "5")
    assert isinstance(engine.request_timeout, float) and isinstance(engine.stream_slowdown, float)
    assert engine.disable_cuda_graph is True
    assert parse(EngineConfig, "--disable-cuda-graph", "--no-disable-cuda-graph").disable_cuda_graph is False
    server = parse(ServerConfig, "--drain-timeout", "2", "--override-generation-config", '{"top_k": 20}')
    assert server.drain_timeout == 2.0 and isinstance(server.drain_timeout, float)
    assert server.override_generation_config == {"top_k": 20}


def test_a_flag_for_several_words_takes_them_together_apart_and_as_a_json_list() -> None:
    apart = parse(ServerConfig, "--served-model-name", "a", "b", "--api-key", "k1", "--api-key", "k2")
    assert (apart.served_model_name, apart.api_key) == (("a", "b"), ("k1", "k2"))
    listed = parse(ServerConfig, "--allowed-origins", '["http://a", "http://b"]', "*")
    assert listed.allowed_origins == ("http://a", "http://b", "*")
    for odd in ("[", "[5]", "[]x"):
        assert parse(ServerConfig, "--served-model-name", odd).served_model_name == (odd,)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5", 5),
        ("-1", -1),
        ("32k", 32000),
        ("32K", 32768),
        ("1.5k", 1500),
        ("0.5M", 524288),
        ("2m", 2000000),
        ("4G", 2**32),
        ("1t", 10**12),
    ],
)
def test_counts_may_have_a_unit(text: str, count: int) -> None:
    assert read_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "1.5", "0.0001k", "5kk", "1e3", "five", "5 k"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number"):
        read_count(text)


def test_a_count_that_may_be_absent_may_be_auto() -> None:
    assert parse(EngineConfig, "--max-model-len", "auto").max_model_len is None
    with pytest.raises(argparse.ArgumentError, match="'auto' is not a whole number"):
        parse(EngineConfig, "--mtp-step", "auto")


@pytest.mark.parametrize(
    ("config", "flag", "value", "message"),
    [
        (EngineConfig, "--mtp-mode", "medusa", "invalid choice"),
        (EngineConfig, "--page-size", "4.5", "'4.5' is not a whole number"),
        (EngineConfig, "--stream-slowdown", "fast", "'fast' is not a number"),
        (ServerConfig, "--override-generation-config", "{", "is not JSON"),
        (ServerConfig, "--default-chat-template-kwargs", "[1]", "is not a JSON object"),
        (ServerConfig, "--default-chat-template-kwargs", "[" * 20000, "is not JSON"),
    ],
)
def test_a_value_outside_its_choices_or_type_is_refused(config: type, flag: str, value: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=message):
        parse(config, flag, value)


@dataclass(frozen=True)
class Shares:
    """A setting whose help has a percent sign."""

    share: float = field(default=0.5, metadata={"group": "g", "help": "100 % of it", "choices": ()})


def test_a_percent_sign_and_other_names_are_in_the_help_as_they_are() -> None:
    parser = argparse.ArgumentParser()
    also: Mapping[str, list[str]] = {"share": ["--part"]}
    add_flags(parser, [Shares], also)
    assert "100 % of it (default: 0.5) (also --part)" in " ".join(parser.format_help().split())
