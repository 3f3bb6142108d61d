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
# Tokens of one pass: more than a launch can have programs for.
MAX_CHUNK = 65535
# Newest positions per request that the draft head catches up on when drafts are wanted again; it never sees older ones.
MAX_BEHIND = 16
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
    load_format: str = _setting(
        "auto", "where weights come from; auto: the checkpoint, dummy: random ones, to measure speed", ("auto", "dummy")
    )
    mtp_step: int = _setting(0, f"draft tokens per decode step, 0..{MAX_MTP_STEP}; 0 switches speculation off")
    mtp_mode: str = _setting(
        "auto",
        "how drafts are chained: eagle reuses one MTP layer, vanilla uses one layer per draft; auto: by layer count",
        ("auto", "eagle", "vanilla"),
    )
    speculation: str = _setting(
        "adaptive",
        "how many of the mtp_step drafts a request gets; adaptive: what costs least time per token, fixed: all of them",
        ("adaptive", "fixed"),
    )
    overlap: str = _setting(
        "auto",
        "prepare the next step while the device runs one; auto: on for a GPU, off on a CPU, which the host shares",
        ("auto", "on", "off"),
    )
    max_running_requests: int | None = _setting(
        None,
        "requests that decode at the same time (rows of the request table); default: 16 (GPU: 128), fewer if memory is "
        "short",
    )
    chunked_prefill_size: int = _setting(512, "prompt tokens per engine step, at most")
    stream_slowdown: float = _setting(
        2.0, "while requests decode, prompt tokens may prolong a step to this many times its own length, about"
    )
    page_size: int = _setting(16, "tokens per KV page")
    mem_fraction_static: float = _setting(
        0.85, "share of the free memory (of the GPU, or of the machine) that weights and caches may take"
    )
    prefix_cache: str = _setting("on", "reuse what requests with the same beginning have computed", ("on", "off"))
    checkpoint_interval: int = _setting(1024, "prompt tokens between two GDN checkpoints of a long prompt")
    checkpoint_bytes: int | None = _setting(
        None, "bytes of GDN checkpoints for prefix reuse; default: four per running request, if memory allows"
    )
    host_cache_bytes: int = _setting(0, "bytes of host memory for pages and checkpoints that were evicted; 0: none")
    request_timeout: float | None = _setting(None, "seconds after which a request is ended; default: never")
    watchdog: int = _setting(0, "engine steps between two checks of a random request's state by prefill; 0: off")
    max_model_len: int | None = _setting(
        None, "prompt + output tokens per request, at most; default: the checkpoint's, at most 32768"
    )
    max_total_tokens: int | None = _setting(
        None,
        "tokens the KV cache holds over all requests; default: what max-running-requests can use, at most 65536 "
        "(GPU: 524288)",
    )
    attention_backend: str = _setting(
        "auto",
        "kernels of the attention layers; flashinfer: for prefill, with triton's decode step; auto: triton on a GPU, "
        "torch elsewhere",
        ("auto", "triton", "flashinfer", "torch"),
    )
    gdn_backend: str = _setting(
        "auto",
        "kernels of the Gated DeltaNet layers; flashinfer, auto: as for attention",
        ("auto", "triton", "flashinfer", "torch"),
    )
    disable_cuda_graph: bool = _setting(False, "launch the kernels of a decode step one by one")
    cuda_graph_max_bs: int | None = _setting(
        None, "requests that decode in one CUDA graph, at most; default: max-running-requests"
    )
    num_threads: int | None = _setting(None, "CPU threads for torch; default: the cores this process may use")

    def __post_init__(self) -> None:
        _require_choices(self)
        if not 0 <= self.mtp_step <= MAX_MTP_STEP:
            raise ConfigError(f"--mtp-step is {self.mtp_step}, the range is 0..{MAX_MTP_STEP}")
        for name in ("chunked_prefill_size", "page_size", "checkpoint_interval"):
            _require_positive(name, getattr(self, name))
        for name in (
            *("max_running_requests", "max_model_len", "max_total_tokens", "num_threads", "request_timeout"),
            "cuda_graph_max_bs",
        ):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if self.chunked_prefill_size > MAX_CHUNK:
            raise ConfigError(f"--chunked-prefill-size is {self.chunked_prefill_size}, it must be at most {MAX_CHUNK}")
        for name in ("checkpoint_bytes", "host_cache_bytes", "watchdog"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}, it must be 0 or more")
        if not 0 < self.mem_fraction_static < 1:
            raise ConfigError(f"--mem-fraction-static is {self.mem_fraction_static}, the range is above 0 and below 1")
        if not self.stream_slowdown >= 1:
            raise ConfigError(f"--stream-slowdown is {self.stream_slowdown}, it must be at least 1")
        if self.prefix_cache == "on" and self.checkpoint_interval % self.page_size:
            multiple = -(-self.checkpoint_interval // self.page_size) * self.page_size
            raise ConfigError(
                f"--page-size {self.page_size} does not divide --checkpoint-interval {self.checkpoint_interval}, and "
                f"checkpoints lie at page ends: choose another page size, or --checkpoint-interval {multiple}"
            )
        if self.prefix_cache == "off" and (self.checkpoint_bytes or self.host_cache_bytes):
            raise ConfigError("--checkpoint-bytes and --host-cache-bytes need --prefix-cache on")


@dataclass(frozen=True)
class Limits:
    """Sizes the scheduler plans with; `mtp_step` is K. Without checkpoints there is no prefix cache.

    `page_bytes` and `checkpoint_bytes` are the sizes of one of each, `host_cache_bytes` bounds both together.
    The draft head catches up on `max_behind` positions at most: 0 if it may never fall behind.
    """

    max_running_requests: int
    chunked_prefill_size: int
    page_size: int
    num_pages: int
    mtp_step: int
    num_checkpoints: int = 0
    checkpoint_interval: int = 1024
    host_cache_bytes: int = 0
    page_bytes: int = 1
    checkpoint_bytes: int = 1
    max_behind: int = MAX_BEHIND
    stream_slowdown: float = 2.0

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
    max_queue: int = _setting(1024, "requests in the server, at most; more are answered 429")
    log_level: str = _setting("info", "log level", ("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        _require_choices(self)
        _require_positive("max_queue", self.max_queue)
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


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        least = "at least 1" if isinstance(value, int) else "above 0"
        raise ConfigError(f"--{name.replace('_', '-')} is {value}, it must be {least}")


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add one flag per field of the dataclass `config`: `max_model_len` becomes `--max-model-len`."""
    hints = get_type_hints(config)
    for setting in fields(config):
        assert setting.default is not MISSING
        flag, help = "--" + setting.name.replace("_", "-"), setting.metadata["help"].replace("%", "%%")
        if hints[setting.name] is bool:
            assert not setting.default
            parser.add_argument(flag, action="store_true", help=f"{help} (default: {setting.default})")
            continue
        parser.add_argument(
            flag,
            type=_flag_type(hints[setting.name]),
            default=setting.default,
            choices=setting.metadata["choices"] or None,
            help=f"{help} (default: {setting.default})",
        )


def read_flags(args: argparse.Namespace, config: type[C]) -> C:
    """The dataclass `config` with the values of the flags that `add_flags` made. Raises ConfigError."""
    return config(**{setting.name: getattr(args, setting.name) for setting in fields(config)})  # type: ignore[arg-type]


def _flag_type(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(option for option in get_args(hint) if option is not type(None))
    return hint
