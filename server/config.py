"""Every setting, written once: frozen dataclasses; the command-line flags are made from them.

A field's metadata holds its help (with the unit) and, where the values are few, its choices. No torch.
"""

import argparse
import types
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from server.errors import ConfigError

MAX_MTP_STEP = 8
DEMO_MODEL = str(Path(__file__).resolve().parent.parent / "models" / "demo")

C = TypeVar("C")


def _setting(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of the engine process and of `LLM`. Raises ConfigError where two values cannot go together."""

    model: str = _setting(DEMO_MODEL, "directory of a Hugging Face checkpoint; the bundled demo when not given")
    device: str = _setting("auto", "where the model runs; auto: cuda when there is one", ("auto", "cpu", "cuda"))
    dtype: str = _setting(
        "auto",
        "weights and activations; auto: the checkpoint's. float64 removes rounding as a cause of differences",
        ("auto", "bfloat16", "float32", "float64"),
    )
    mtp_step: int = _setting(0, f"draft tokens per decode step, 0..{MAX_MTP_STEP}; 0 switches speculation off")
    mtp_mode: str = _setting(
        "auto",
        "how drafts are chained: eagle reuses one MTP layer, vanilla uses one layer per draft; auto: by layer count",
        ("auto", "eagle", "vanilla"),
    )
    max_running_requests: int = _setting(16, "requests that decode at the same time (rows of the request table)")
    chunked_prefill_size: int = _setting(512, "prompt tokens per engine step, at most")
    page_size: int = _setting(16, "tokens per KV page")
    max_model_len: int | None = _setting(
        None, "prompt + output tokens per request, at most; default: the checkpoint's, at most 32768"
    )
    max_total_tokens: int | None = _setting(
        None, "tokens the KV cache holds over all requests; default: what max-running-requests can use, at most 65536"
    )
    num_threads: int | None = _setting(None, "CPU threads for torch; default: the cores this process may use")

    def __post_init__(self) -> None:
        _require_choices(self)
        if not 0 <= self.mtp_step <= MAX_MTP_STEP:
            raise ConfigError(f"--mtp-step is {self.mtp_step}, the range is 0..{MAX_MTP_STEP}")
        for name in ("max_running_requests", "chunked_prefill_size", "page_size"):
            _require_positive(name, getattr(self, name))
        for name in ("max_model_len", "max_total_tokens", "num_threads"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))


@dataclass(frozen=True)
class Limits:
    """Sizes the scheduler plans with; `mtp_step` is K."""

    max_running_requests: int
    chunked_prefill_size: int
    page_size: int
    num_pages: int
    mtp_step: int

    def pages_for(self, num_tokens: int) -> int:
        """Pages of a request that may write ahead of num_tokens committed ones."""
        return -(-(num_tokens + lookahead(self.mtp_step)) // self.page_size)


def lookahead(mtp_step: int) -> int:
    """Positions past the committed ones that a decode step may write: T verify rows, then K - 1 draft rows."""
    return 2 * mtp_step + 1


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the HTTP process."""

    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8000, "port to listen on")
    served_model_name: str | None = _setting(None, "model name in requests; default: the checkpoint directory's name")
    drain_timeout: float = _setting(30.0, "seconds that SIGTERM waits for requests in flight")
    max_queued_requests: int = _setting(1024, "requests in the server, at most; more are answered 429")
    log_level: str = _setting("info", "log level", ("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        _require_choices(self)
        _require_positive("max_queued_requests", self.max_queued_requests)
        if self.drain_timeout < 0:
            raise ConfigError(f"--drain-timeout is {self.drain_timeout}, it must be 0 or more seconds")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}, the range is 0..65535")


def _require_choices(config: Any) -> None:
    for setting in fields(config):
        choices, value = setting.metadata["choices"], getattr(config, setting.name)
        if choices and value not in choices:
            raise ConfigError(
                f"--{setting.name.replace('_', '-')} is {value!r}, it must be one of {', '.join(choices)}"
            )


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"--{name.replace('_', '-')} is {value}, it must be at least 1")


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add one flag per field of the dataclass `config`: `max_model_len` becomes `--max-model-len`."""
    hints = get_type_hints(config)
    for setting in fields(config):
        assert setting.default is not MISSING
        parser.add_argument(
            "--" + setting.name.replace("_", "-"),
            type=_flag_type(hints[setting.name]),
            default=setting.default,
            choices=setting.metadata["choices"] or None,
            help=f"{setting.metadata['help']} (default: {setting.default})".replace("%", "%%"),
        )


def read_flags(args: argparse.Namespace, config: type[C]) -> C:
    """The dataclass `config` with the values of the flags that `add_flags` made. Raises ConfigError."""
    return config(**{setting.name: getattr(args, setting.name) for setting in fields(config)})  # type: ignore[arg-type]


def _flag_type(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(option for option in get_args(hint) if option is not type(None))
    return hint
