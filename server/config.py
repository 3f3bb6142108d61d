"""Every setting, written once: frozen dataclasses; the command-line flags are made from them.

A field's metadata holds its group and help (with the unit), its choices where the values are few, and whether it is a
secret, which nothing may show. No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from server.errors import ConfigError

MAX_MTP_STEP = 8
# Tokens of one pass: more than a launch can have programs for.
MAX_CHUNK = 65535
# Newest positions per request that the draft head catches up on when drafts are wanted again; it never sees older ones.
MAX_BEHIND = 16
# Default of --draft-vocab-size.
DRAFT_VOCAB_SIZE = 32768
# What torch should find in its environment where it is loaded, for the sake of a CPU. Behind an operation its threads
# then keep their cores for a moment, as a prefill wants, not for the milliseconds of libgomp's default: others need the
# cores, too. And tensors lie in huge pages where the system leaves that to programs: weights are read from end to end.
ENGINE_ENVIRONMENT = {"GOMP_SPINCOUNT": "20000", "THP_MEM_ALLOC_ENABLE": "1"}
DEMO_MODEL = str(Path(__file__).resolve().parent.parent / "models" / "demo")
# Values of --generation-config that are no directory; the last one by vLLM's name.
OF_THE_CHECKPOINT, NEUTRAL = "auto", ("none", "vllm")


def _setting(group: str, default: Any, help: str, choices: tuple[str, ...] = (), is_secret: bool = False) -> Any:
    metadata = {"group": group, "help": help, "choices": choices, "is_secret": is_secret}
    return field(default=default, metadata=metadata, repr=not is_secret)


_model = partial(_setting, "model")
_memory = partial(_setting, "memory and prefix cache")
_scheduling = partial(_setting, "scheduling")
_speculation = partial(_setting, "speculation")
_kernels = partial(_setting, "kernels")
_http = partial(_setting, "HTTP")
_requests = partial(_setting, "defaults and limits of requests")
_training = partial(_setting, "reinforcement learning")
_observability = partial(_setting, "observability")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of the engine process and of `LLM`. Raises ConfigError where two values cannot go together."""

    model: str = _model(DEMO_MODEL, "directory of a Hugging Face checkpoint; the bundled demo when not given")
    device: str = _model("auto", "where the model runs; auto: cuda when there is one", ("auto", "cpu", "cuda"))
    dtype: str = _model(
        "auto",
        "weights and activations; auto: the checkpoint's. float64 removes rounding as a cause of differences",
        ("auto", "bfloat16", "float32", "float64"),
    )
    quantization: str = _model(
        "none",
        "weights of matrices, on a CPU: int8 or int4 numbers with a scale for each 32 of an output, made at load",
        ("none", "int8", "int4"),
    )
    load_format: str = _model(
        "auto", "where weights come from; auto: the checkpoint, dummy: random ones, to measure speed", ("auto", "dummy")
    )
    mtp_step: int = _speculation(0, f"draft tokens per decode step, 0..{MAX_MTP_STEP}; 0 switches speculation off")
    mtp_mode: str = _speculation(
        "auto",
        "how drafts are chained: eagle reuses one MTP layer, vanilla uses one layer per draft; auto: by layer count",
        ("auto", "eagle", "vanilla"),
    )
    draft_vocab_size: int | None = _speculation(
        None,
        "tokens that are guessed: so many of the lowest ids, which byte-pair encoding gives to the most frequent, and "
        f"added ones; no output changes. 0: all; default: {DRAFT_VOCAB_SIZE} of vocabularies four times as large",
    )
    speculation: str = _speculation(
        "adaptive",
        "how many of the mtp_step drafts a request gets; adaptive: what costs least time per token, fixed: all of them",
        ("adaptive", "fixed"),
    )
    overlap: str = _scheduling(
        "auto",
        "prepare the next step while the device runs one; auto: on for a GPU, off on a CPU, which the host shares",
        ("auto", "on", "off"),
    )
    max_running_requests: int | None = _scheduling(
        None,
        "requests that decode at the same time (rows of the request table); default: 16 (GPU: 128), fewer if memory is "
        "short",
    )
    chunked_prefill_size: int | None = _scheduling(
        None, "prompt tokens per engine step, at most; default: 512 (GPU: 2048)"
    )
    stream_slowdown: float = _scheduling(
        2.0,
        "while requests decode, prompt tokens may prolong steps to this many times their own length, on average; more, "
        "while more wait for their first token than decode",
    )
    page_size: int = _memory(16, "tokens per KV page")
    mem_fraction_static: float = _memory(
        0.85, "share of the free memory (of the GPU, or of the machine) that weights and caches may take"
    )
    prefix_cache: str = _memory("on", "reuse what requests with the same beginning have computed", ("on", "off"))
    checkpoint_interval: int = _memory(1024, "prompt tokens between two GDN checkpoints of a long prompt")
    checkpoint_bytes: int | None = _memory(
        None, "bytes of GDN checkpoints for prefix reuse; default: four per running request, if memory allows"
    )
    host_cache_bytes: int = _memory(0, "bytes of host memory for pages and checkpoints that were evicted; 0: none")
    request_timeout: float | None = _scheduling(None, "seconds after which a request is ended; default: never")
    watchdog: int = _observability(0, "engine steps between two checks of a random request's state by prefill; 0: off")
    max_model_len: int | None = _model(
        None, "prompt + output tokens per request, at most; default: the checkpoint's, at most 32768"
    )
    max_total_tokens: int | None = _memory(
        None,
        "tokens the KV cache holds over all requests; default: what max-running-requests can use, at most 65536 "
        "(GPU: 524288)",
    )
    attention_backend: str = _kernels(
        "auto",
        "kernels of the attention layers; flashinfer: for prefill, with triton's decode step; auto: triton on a GPU, "
        "torch elsewhere. Of other engines' names torch_native is torch; triton serves fa2 and flash_attn on a GPU, "
        "fa3 on Hopper (9.0), trtllm_mha on Blackwell (10.x), and elsewhere they are refused",
        ("auto", "triton", "flashinfer", "torch", "torch_native", "fa2", "flash_attn", "fa3", "trtllm_mha"),
    )
    gdn_backend: str = _kernels(
        "auto",
        "kernels of the Gated DeltaNet layers; flashinfer, auto: as for attention",
        ("auto", "triton", "flashinfer", "torch"),
    )
    disable_cuda_graph: bool = _kernels(False, "launch the kernels of a decode step one by one")
    cuda_graph_max_bs: int | None = _kernels(
        None, "requests that decode in one CUDA graph, at most; default: max-running-requests"
    )
    num_threads: int | None = _kernels(None, "CPU threads for torch; default: the cores this process may use")

    def __post_init__(self) -> None:
        _require_choices(self)
        if not 0 <= self.mtp_step <= MAX_MTP_STEP:
            raise ConfigError(f"--mtp-step is {self.mtp_step}, the range is 0..{MAX_MTP_STEP}")
        if self.draft_vocab_size is not None and self.draft_vocab_size < 0:
            raise ConfigError(f"--draft-vocab-size is {self.draft_vocab_size}, it must be at least 0")
        for name in ("page_size", "checkpoint_interval"):
            _require_positive(name, getattr(self, name))
        for name in (
            *("max_running_requests", "max_model_len", "max_total_tokens", "num_threads", "request_timeout"),
            *("cuda_graph_max_bs", "chunked_prefill_size"),
        ):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if (self.chunked_prefill_size or 0) > MAX_CHUNK:
            raise ConfigError(f"--chunked-prefill-size is {self.chunked_prefill_size}, it must be at most {MAX_CHUNK}")
        for name in ("checkpoint_bytes", "host_cache_bytes", "watchdog"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{flag_name(name)} is {getattr(self, name)}, it must be 0 or more")
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
    The draft head catches up on `max_behind` positions at most: 0 if it may never fall behind. Up to
    `max_joint_tokens` of prompts share a pass with the requests that decode.
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
    max_joint_tokens: int = 0

    def pages_for(self, num_tokens: int) -> int:
        """Pages of a request that may write ahead of num_tokens committed ones."""
        return -(-(num_tokens + lookahead(self.mtp_step)) // self.page_size)


def lookahead(mtp_step: int) -> int:
    """Positions past the committed ones that a decode step may write: T verify rows, then K - 1 draft rows."""
    return 2 * mtp_step + 1


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the HTTP process. Raises ConfigError where two values cannot go together."""

    served_model_name: tuple[str, ...] = _model(
        (), "names of the model in requests, the first also in answers; default: the checkpoint directory's name"
    )
    host: str = _http("127.0.0.1", "address to listen on")
    port: int = _http(8000, "port to listen on; 0: a free one")
    uds: str | None = _http(None, "path of a Unix socket to listen on, instead of host and port")
    root_path: str = _http("", "path under which a proxy serves this server")
    ssl_certfile: str | None = _http(None, "certificate chain (PEM) to serve HTTPS with")
    ssl_keyfile: str | None = _http(None, "private key of the certificate, if it is not in the same file")
    api_key: tuple[str, ...] = _http(
        (),
        "keys, one of which every request but those for health and the page must bring; also TANDEM_API_KEY",
        is_secret=True,
    )
    allowed_origins: tuple[str, ...] = _http((), "origins whose web pages may call this server; *: all of them")
    client_timeout: float = _http(
        60.0, "seconds that a client has to send a request, and to take what is sent to it, before it is cut off"
    )
    keep_alive_interval: float = _http(15.0, "seconds of silence after which a stream gets a comment")
    drain_timeout: float = _http(30.0, "seconds that SIGTERM waits for requests in flight")
    max_queue: int = _http(1024, "requests in the server, at most; more are answered 429")
    max_logprobs: int = _requests(20, "alternatives per token that a request may ask for; -1: the vocabulary")
    generation_config: str = _requests(
        OF_THE_CHECKPOINT,
        f"where defaults of sampling come from: {OF_THE_CHECKPOINT}: generation_config.json of the checkpoint, or of "
        f"another directory; {NEUTRAL[0]}: temperature 1 and no filters",
    )
    override_generation_config: Mapping[str, Any] | None = _requests(None, "defaults of sampling that go before those")
    chat_template: str | None = _requests(
        None, "chat template (Jinja) instead of the checkpoint's: a file with it, or the template itself"
    )
    default_chat_template_kwargs: Mapping[str, Any] | None = _requests(
        None, "defaults of chat_template_kwargs, such as enable_thinking"
    )
    trust_request_chat_template: bool = _requests(
        False, "let requests bring a chat template, which can take all of a processor's time"
    )
    logprobs_mode: str = _requests(
        "raw_logprobs",
        "what log-probabilities are of, unless a request says: the model's own law, or the one that tokens are drawn "
        "from, after temperature and filters",
        ("raw_logprobs", "processed_logprobs"),
    )
    enable_rl: bool = _training(
        False, "serve the routes of trainers, which pause the engine and change its weights, versions and memory"
    )
    admin_api_key: str | None = _training(
        None,
        "key that requests for those routes must bring instead of one of --api-key; also TANDEM_ADMIN_API_KEY",
        is_secret=True,
    )
    skip_tokenizer_init: bool = _training(
        False, "load no tokenizer: requests bring token ids to /generate or /inference/v1/generate, and get ids only"
    )
    log_level: str = _observability("info", "what is logged", ("debug", "info", "warning", "error"))
    log_format: str = _observability("text", "lines of text, or of one JSON object each", ("text", "json"))
    disable_log_requests: bool = _observability(False, "leave out the line about each finished request")
    log_interval: float = _observability(10.0, "seconds between lines about throughput while requests run; 0: none")
    otlp_traces_endpoint: str | None = _observability(
        None, "URL of an OpenTelemetry collector (OTLP over HTTP) that gets a span per request"
    )

    def __post_init__(self) -> None:
        _require_choices(self)
        for name in ("max_queue", "client_timeout", "keep_alive_interval"):
            _require_positive(name, getattr(self, name))
        for name in ("drain_timeout", "log_interval"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{flag_name(name)} is {getattr(self, name)}, it must be 0 or more seconds")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}, the range is 0..65535")
        if self.max_logprobs < -1:
            raise ConfigError(f"--max-logprobs is {self.max_logprobs}, it must be 0 or more, or -1 for the vocabulary")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"--root-path is {self.root_path!r}, it must begin with a slash and end without one")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile")
        if not all(self.served_model_name):
            raise ConfigError("--served-model-name has an empty name")
        admin_keys = () if self.admin_api_key is None else (self.admin_api_key,)
        for flag, keys in (("--api-key", self.api_key), ("--admin-api-key", admin_keys)):
            if not all(key and key.isascii() and key.isprintable() and " " not in key for key in keys):
                raise ConfigError(f"{flag} has a key that is empty or has characters other than visible ASCII")
        if admin_keys and not self.enable_rl:
            raise ConfigError("--admin-api-key guards the routes of --enable-rl; add that, or leave it out")


def _require_choices(config: Any) -> None:
    for setting in fields(config):
        choices, value = setting.metadata["choices"], getattr(config, setting.name)
        if choices and value not in choices:
            raise ConfigError(f"{flag_name(setting.name)} is {value!r}, it must be one of {', '.join(choices)}")


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        least = "at least 1" if isinstance(value, int) else "above 0"
        raise ConfigError(f"{flag_name(name)} is {value}, it must be {least}")


def flag_name(setting: str) -> str:
    """The command-line flag of a setting: `max_model_len` is set by `--max-model-len`."""
    return "--" + setting.replace("_", "-")
