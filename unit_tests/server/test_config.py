"""Settings are checked where they are made: ranges, choices, and what cannot go together."""

import dataclasses
import math
from typing import Any

import pytest

from server.config import MAX_MTP_STEP, EngineConfig, Limits, ServerConfig, lookahead
from server.errors import ConfigError
from server.messages import LOGPROBS_MODES, SamplingParams


@pytest.mark.parametrize("name", ["max_model_len", "max_total_tokens", "num_threads", "max_running_requests"])
def test_a_setting_that_may_be_absent_is_none_or_a_positive_number(name: str) -> None:
    assert getattr(EngineConfig(), name) is None
    assert getattr(EngineConfig(**{name: 1}), name) == 1
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} is 0, it must be at least 1$"):
        EngineConfig(**{name: 0})


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (EngineConfig, {"mtp_step": -1}, "--mtp-step is -1, the range is 0..8"),
        (EngineConfig, {"mtp_step": 9}, "--mtp-step is 9, the range is 0..8"),
        (EngineConfig, {"page_size": 0}, "--page-size is 0, it must be at least 1"),
        (EngineConfig, {"chunked_prefill_size": -5}, "--chunked-prefill-size is -5, it must be at least 1"),
        (EngineConfig, {"max_running_requests": 0}, "--max-running-requests is 0, it must be at least 1"),
        (EngineConfig, {"checkpoint_interval": 0}, "--checkpoint-interval is 0, it must be at least 1"),
        (EngineConfig, {"checkpoint_bytes": -1}, "--checkpoint-bytes is -1, it must be 0 or more"),
        (EngineConfig, {"host_cache_bytes": -2}, "--host-cache-bytes is -2, it must be 0 or more"),
        (EngineConfig, {"watchdog": -3}, "--watchdog is -3, it must be 0 or more"),
        (EngineConfig, {"mem_fraction_static": 0}, "--mem-fraction-static is 0, the range is above 0 and below 1"),
        (EngineConfig, {"mem_fraction_static": 1}, "--mem-fraction-static is 1, the range is above 0 and below 1"),
        (EngineConfig, {"stream_slowdown": 0.99}, "--stream-slowdown is 0.99, it must be at least 1"),
        (EngineConfig, {"speculation": "x"}, "--speculation is 'x', it must be one of adaptive, fixed"),
        (EngineConfig, {"overlap": "yes"}, "--overlap is 'yes', it must be one of auto, on, off"),
        (EngineConfig, {"prefix_cache": ""}, "--prefix-cache is '', it must be one of on, off"),
        (ServerConfig, {"max_queue": 0}, "--max-queue is 0, it must be at least 1"),
        (ServerConfig, {"port": 65536}, "--port is 65536, the range is 0..65535"),
        (ServerConfig, {"port": -1}, "--port is -1, the range is 0..65535"),
        (ServerConfig, {"drain_timeout": -0.5}, "--drain-timeout is -0.5, it must be 0 or more seconds"),
        (ServerConfig, {"log_interval": math.nan}, "--log-interval is nan, it must be 0 or more seconds"),
        (ServerConfig, {"client_timeout": 0.0}, "--client-timeout is 0.0, it must be above 0"),
        (ServerConfig, {"keep_alive_interval": -1.0}, "--keep-alive-interval is -1.0, it must be above 0"),
        (ServerConfig, {"log_format": "xml"}, "--log-format is 'xml', it must be one of text, json"),
        (
            ServerConfig,
            {"max_logprobs": -2},
            "--max-logprobs is -2, it must be 0 or more, or -1 for the vocabulary",
        ),
        (
            ServerConfig,
            {"root_path": "api"},
            "--root-path is 'api', it must begin with a slash and end without one",
        ),
        (
            ServerConfig,
            {"root_path": "/api/"},
            "--root-path is '/api/', it must begin with a slash and end without one",
        ),
        (ServerConfig, {"ssl_keyfile": "key.pem"}, "--ssl-keyfile needs --ssl-certfile"),
        (ServerConfig, {"served_model_name": ("a", "")}, "--served-model-name has an empty name"),
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


@pytest.mark.parametrize("settings", [{"checkpoint_bytes": 1}, {"host_cache_bytes": 1}])
def test_memory_for_the_prefix_cache_needs_the_prefix_cache(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(prefix_cache="off", **settings)
    assert caught.value.message == "--checkpoint-bytes and --host-cache-bytes need --prefix-cache on"
    assert EngineConfig(**settings).prefix_cache == "on"
    assert EngineConfig(prefix_cache="off", **dict.fromkeys(settings, 0)).prefix_cache == "off"


def test_the_ends_of_the_ranges_of_memory_and_time_are_served() -> None:
    EngineConfig(
        checkpoint_bytes=0, host_cache_bytes=0, watchdog=0, page_size=1, checkpoint_interval=1, stream_slowdown=1.0
    )
    assert EngineConfig(stream_slowdown=math.inf).stream_slowdown == math.inf
    for share in (0.001, 0.999):
        assert EngineConfig(mem_fraction_static=share).mem_fraction_static == share


def test_a_request_timeout_may_be_absent_or_a_part_of_a_second_but_not_zero() -> None:
    assert EngineConfig().request_timeout is None
    assert EngineConfig(request_timeout=0.25).request_timeout == 0.25
    for seconds in (0, -1.5, math.nan):
        with pytest.raises(ConfigError, match=f"^--request-timeout is {seconds}, it must be "):
            EngineConfig(request_timeout=seconds)


@pytest.mark.parametrize("key", ["", "two words", "tab\t", "größer"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(api_key=("good", key))
    assert caught.value.message == "--api-key has a key that is empty or has characters other than visible ASCII"


def test_a_secret_is_not_in_what_is_printed_of_the_settings() -> None:
    config = ServerConfig(api_key=("sesame",), admin_api_key="sesame", enable_rl=True)
    assert "sesame" not in repr(config)
    secrets = [setting.name for setting in dataclasses.fields(config) if setting.metadata["is_secret"]]
    assert secrets == ["api_key", "admin_api_key"]


def test_the_administrators_key_is_one_that_a_header_can_carry_and_has_something_to_guard() -> None:
    with pytest.raises(ConfigError, match="--admin-api-key has a key that is empty or has characters other than"):
        ServerConfig(admin_api_key="two words", enable_rl=True)
    with pytest.raises(ConfigError, match="--admin-api-key guards the routes of --enable-rl"):
        ServerConfig(admin_api_key="key")


def test_log_probabilities_have_the_modes_that_the_engine_has() -> None:
    (setting,) = [setting for setting in dataclasses.fields(ServerConfig) if setting.name == "logprobs_mode"]
    assert setting.metadata["choices"] == LOGPROBS_MODES
    assert setting.default == SamplingParams().logprobs_mode


def make_limits(mtp_step: int, page_size: int) -> Limits:
    return Limits(max_running_requests=1, chunked_prefill_size=1, page_size=page_size, num_pages=1, mtp_step=mtp_step)


@pytest.mark.parametrize("mtp_step", [0, 1, 3, 8])
def test_a_decode_step_writes_no_further_ahead_than_is_reserved(mtp_step: int) -> None:
    """The newest token and K drafts are verified from `length` on; if all are right, K - 1 draft rows follow them."""
    length = 10
    verified = list(range(length, length + mtp_step + 1))
    drafted = list(range(verified[-1] + 1, verified[-1] + mtp_step))
    assert max(verified + drafted) < length + lookahead(mtp_step)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_pages_hold_the_tokens_and_what_is_written_ahead_but_not_a_page_more(page_size: int) -> None:
    limits = make_limits(3, page_size)
    for num_tokens in range(1, 40):
        held = limits.pages_for(num_tokens) * page_size
        assert held >= num_tokens + 7 > held - page_size


def test_a_page_size_that_does_not_divide_the_checkpoint_interval_is_refused_with_one_that_works() -> None:
    with pytest.raises(ConfigError, match=r"--page-size 48 does not divide .* 1024, .* --checkpoint-interval 1056"):
        EngineConfig(page_size=48)
    assert EngineConfig(page_size=48, checkpoint_interval=1056).page_size == 48
    assert EngineConfig(page_size=48, prefix_cache="off").page_size == 48


def test_a_chunk_that_no_launch_can_hold_is_refused() -> None:
    assert EngineConfig(chunked_prefill_size=65535).chunked_prefill_size == 65535
    with pytest.raises(ConfigError, match="--chunked-prefill-size is 65536, it must be at most 65535"):
        EngineConfig(chunked_prefill_size=65536)
