"""Flags by the names that vLLM, SGLang and LightLLM have for them, and what they set here. No torch."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.config import NEUTRAL, OF_THE_CHECKPOINT
from server.flags import read_count, read_object

_MTP_METHODS = ("mtp", "qwen3_5_mtp", "qwen3_next_mtp", "nextn", "eagle")
_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "float": "float32"}


@dataclass(frozen=True)
class Alias:
    """`names` set `setting`: to what `read` makes of the flag's text (None: what the setting's own flag would), or to
    `value` where the flag has no text. Without a setting the flag changes nothing. A weak one counts only where nothing
    else sets the setting."""

    names: tuple[str, ...]
    setting: str | None
    read: Callable[[str], Any] | None = None
    value: Any = None
    is_weak: bool = False

    @property
    def takes_text(self) -> bool:
        """Whether a value follows the flag."""
        return self.value is None


def only(*served: str) -> Callable[[str], str]:
    """Reads a value that must be one of `served`."""

    def read(text: str) -> str:
        if text not in served:
            raise argparse.ArgumentTypeError(f"{text!r} is not served, only {' or '.join(served)}")
        return text

    return read


def renamed(**names: str) -> Callable[[str], str]:
    """Reads a value by another name; others stay as they are."""
    return lambda text: names.get(text, text)


def read_method(text: str) -> int:
    """The drafts per step that naming a method alone asks for. The draft head is the checkpoint's own."""
    only(*_MTP_METHODS)(text.lower())
    return 1


def read_speculative_config(text: str) -> int:
    """vLLM's {"method": "mtp", "num_speculative_tokens": N}: N, 1 if it is not there."""
    config = read_object(text)
    unknown = sorted(set(config) - {"method", "num_speculative_tokens"})
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not served, only method and num_speculative_tokens")
    read_method(str(config.get("method", "mtp")))
    return read_count(str(config.get("num_speculative_tokens", 1)))


def count_but_one(text: str) -> int:
    """SGLang counts the last token itself as a draft token."""
    return read_count(text) - 1


ALIASES = (
    Alias(("model-path", "model-dir"), "model"),
    Alias(("model-name",), "served_model_name"),
    Alias(("data-type",), "dtype", renamed(**_DTYPES)),
    Alias(("quant-type",), "quantization", only("none")),
    Alias(("context-length", "max-req-total-len"), "max_model_len"),
    Alias(("gpu-memory-utilization", "mem-fraction"), "mem_fraction_static"),
    Alias(("block-size",), "page_size"),
    Alias(("enable-prefix-caching",), "prefix_cache", value="on"),
    Alias(
        ("no-enable-prefix-caching", "disable-radix-cache", "disable-dynamic-prompt-cache"), "prefix_cache", value="off"
    ),
    Alias(("max-num-seqs", "running-max-req-size"), "max_running_requests"),
    Alias(("max-num-batched-tokens", "batch-max-tokens"), "chunked_prefill_size"),
    Alias(("max-num-queued-reqs", "max-queued-requests"), "max_queue"),
    Alias(("async-scheduling",), "overlap", value="on"),
    Alias(("no-async-scheduling", "disable-overlap-schedule"), "overlap", value="off"),
    Alias(("speculative-config",), "mtp_step", read_speculative_config),
    Alias(("spec-tokens", "num-speculative-tokens", "speculative-num-steps"), "mtp_step"),
    Alias(("speculative-num-draft-tokens",), "mtp_step", count_but_one),
    Alias(("spec-method", "speculative-algorithm"), "mtp_step", read_method, is_weak=True),
    Alias(("speculative-eagle-topk",), None, only("1")),
    Alias(("enforce-eager", "disable-cudagraph"), "disable_cuda_graph", value=True),
    Alias(("graph-max-batch-size", "max-cudagraph-capture-size"), "cuda_graph_max_bs"),
    Alias(("sampling-defaults",), "generation_config", renamed(model=OF_THE_CHECKPOINT, openai=NEUTRAL[0])),
    Alias(("disable-log-stats",), "log_interval", value=0.0),
    Alias(("disable-uvicorn-access-log", "no-enable-log-requests"), "disable_log_requests", value=True),
    Alias(("enable-log-requests",), "disable_log_requests", value=False),
    # There is one way here, and it is always on.
    Alias(("reasoning-parser",), None, only("qwen3")),
    Alias(("tool-call-parser",), None, only("qwen3_coder", "qwen3_xml")),
    Alias(
        (
            *("enable-auto-tool-choice", "enable-chunked-prefill", "enable-metrics", "trust-remote-code"),
            *("enable-memory-saver", "enable-sleep-mode", "enable-weights-cpu-backup"),
            *("per-request-spec-decode-metrics", "enable-prompt-tokens-details", "language-model-only"),
        ),
        None,
        value=True,
    ),
    Alias(("kv-cache-dtype",), None, only("auto")),
    Alias(("chat-template-content-format",), None, only("auto", "string")),
    Alias(("stream-interval",), None, only("1")),
    # What is asked for again and again is not logged, and throughput by the second.
    Alias(("disable-access-log-for-endpoints", "decode-log-interval"), None),
    Alias(
        (
            *("tensor-parallel-size", "tp-size", "tp", "pipeline-parallel-size", "pp-size"),
            *("data-parallel-size", "dp-size", "dp"),
        ),
        None,
        only("1"),
    ),
)
