"""Settings are written once: the flags, their types and defaults come from the dataclasses, and ranges are checked."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from server.config import MAX_MTP_STEP, EngineConfig, ServerConfig, add_flags, read_flags
from server.errors import ConfigError

CONFIGS = (EngineConfig, ServerConfig)


def parse(config: type, *arguments: str) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, config)
    return read_flags(parser.parse_args(arguments), config)


@pytest.mark.parametrize("config", CONFIGS)
def test_without_flags_the_settings_are_the_dataclasses_own(config: type) -> None:
    assert parse(config) == config()


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_has_one_flag_with_help_that_names_the_default(config: type) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser, config)
    flags = {action.option_strings[0]: action for action in parser._actions}
    assert list(flags) == ["--" + setting.name.replace("_", "-") for setting in fields(config)]
    for setting in fields(config):
        action = flags["--" + setting.name.replace("_", "-")]
        assert setting.metadata["help"] and action.help is not None
        assert action.help.startswith(setting.metadata["help"]) and str(setting.default) in action.help


def test_values_get_the_type_of_their_field() -> None:
    engine = parse(EngineConfig, "--mtp-step", "2", "--max-model-len", "64", "--num-threads=3", "--model", "5")
    assert (engine.mtp_step, engine.max_model_len, engine.num_threads, engine.model) == (2, 64, 3, "5")
    server = parse(ServerConfig, "--drain-timeout", "2", "--served-model-name", "7")
    assert (server.drain_timeout, server.served_model_name) == (2.0, "7")
    assert isinstance(server.drain_timeout, float)


@pytest.mark.parametrize("name", ["max_model_len", "max_total_tokens", "num_threads"])
def test_a_setting_that_may_be_absent_is_none_or_a_positive_number(name: str) -> None:
    assert getattr(EngineConfig(), name) is None
    assert getattr(EngineConfig(**{name: 1}), name) == 1
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} is 0, it must be at least 1$"):
        EngineConfig(**{name: 0})


@pytest.mark.parametrize(
    ("flag", "value"), [("--mtp-mode", "medusa"), ("--device", "tpu"), ("--dtype", "int8"), ("--page-size", "4.5")]
)
def test_a_value_outside_its_choices_or_type_is_refused_by_the_parser(flag: str, value: str) -> None:
    with pytest.raises(argparse.ArgumentError, match="invalid"):
        parse(EngineConfig, flag, value)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (EngineConfig, {"mtp_step": -1}, "--mtp-step is -1, the range is 0..8"),
        (EngineConfig, {"mtp_step": 9}, "--mtp-step is 9, the range is 0..8"),
        (EngineConfig, {"page_size": 0}, "--page-size is 0, it must be at least 1"),
        (EngineConfig, {"chunked_prefill_size": -5}, "--chunked-prefill-size is -5, it must be at least 1"),
        (EngineConfig, {"max_running_requests": 0}, "--max-running-requests is 0, it must be at least 1"),
        (ServerConfig, {"max_queue": 0}, "--max-queue is 0, it must be at least 1"),
        (ServerConfig, {"port": 65536}, "--port is 65536, the range is 0..65535"),
        (ServerConfig, {"port": -1}, "--port is -1, the range is 0..65535"),
        (ServerConfig, {"drain_timeout": -0.5}, "--drain-timeout is -0.5, it must be 0 or more seconds"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_flag_and_limit(
    config: type, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**settings)
    assert caught.value.message == message


def test_the_ends_of_each_range_are_served() -> None:
    for mtp_step in (0, MAX_MTP_STEP):
        assert EngineConfig(mtp_step=mtp_step).mtp_step == mtp_step
    for port in (0, 65535):
        assert ServerConfig(port=port).port == port
    assert ServerConfig(drain_timeout=0).drain_timeout == 0


@dataclass(frozen=True)
class Shares:
    """A setting whose help has a percent sign."""

    share: float = field(default=0.5, metadata={"help": "100 % of it", "choices": ()})


def test_a_percent_sign_in_a_help_text_is_printed_as_it_is() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Shares)
    assert "100 % of it (default: 0.5)" in " ".join(parser.format_help().split())
