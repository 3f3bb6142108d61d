"""Flags that users of other servers know do here what they expect."""

import argparse
from dataclasses import fields
from typing import Any

import pytest

from server.command_line import read_command_line
from server.config import EngineConfig, ServerConfig, flag_name
from server.errors import ConfigError
from server.flag_aliases import ALIASES, only, read_speculative_config


def settings(*arguments: str) -> dict[str, Any]:
    """What the arguments change."""
    command = read_command_line(arguments, {})
    return {
        setting.name: getattr(config, setting.name)
        for config in (command.engine, command.server)
        for setting in fields(config)
        if getattr(config, setting.name) != setting.default
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--model-path m", {"model": "m"}),
        ("--model_dir m --model_name n", {"model": "m", "served_model_name": ("n",)}),
        ("--context-length 32k", {"max_model_len": 32000}),
        ("--max_req_total_len 2048", {"max_model_len": 2048}),
        ("--gpu-memory-utilization 0.9", {"mem_fraction_static": 0.9}),
        ("--mem_fraction 0.7", {"mem_fraction_static": 0.7}),
        ("--block-size 32", {"page_size": 32}),
        ("--max-num-seqs 8", {"max_running_requests": 8}),
        ("--running_max_req_size 9", {"max_running_requests": 9}),
        ("--max-num-batched-tokens 8192", {"chunked_prefill_size": 8192}),
        ("--batch_max_tokens 4096", {"chunked_prefill_size": 4096}),
        ("--max-num-queued-reqs 5", {"max_queue": 5}),
        ("--max-queued-requests=6", {"max_queue": 6}),
        ("--data_type bf16", {"dtype": "bfloat16"}),
        ("--enforce-eager", {"disable_cuda_graph": True}),
        ("--disable_cudagraph --graph_max_batch_size 4", {"disable_cuda_graph": True, "cuda_graph_max_bs": 4}),
        ("--enable-prefix-caching", {}),
        ("--no-enable-prefix-caching", {"prefix_cache": "off"}),
        ("--disable-radix-cache", {"prefix_cache": "off"}),
        ("--disable_dynamic_prompt_cache", {"prefix_cache": "off"}),
        ("--disable-radix-cache --prefix-cache on", {}),
        ("--async-scheduling", {"overlap": "on"}),
        ("--disable-overlap-schedule", {"overlap": "off"}),
        ("--spec-method mtp", {"mtp_step": 1}),
        ("--spec-method mtp --spec-tokens 3", {"mtp_step": 3}),
        ("--spec-tokens 3 --spec-method mtp", {"mtp_step": 3}),
        ("--speculative-algorithm NEXTN --speculative-num-steps 2", {"mtp_step": 2}),
        ("--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1", {"mtp_step": 3}),
        ("--speculative-algorithm EAGLE --speculative-num-draft-tokens 4", {"mtp_step": 3}),
        ('--speculative-config {"method":"mtp","num_speculative_tokens":2}', {"mtp_step": 2}),
        ("--sampling-defaults openai", {"generation_config": "none"}),
        ("--sampling-defaults model", {}),
        ("--quant-type none", {}),
        ("--disable-log-stats", {"log_interval": 0.0}),
        ("--disable-uvicorn-access-log", {"disable_log_requests": True}),
        ("--enable-log-requests", {}),
        ("--reasoning-parser qwen3 --enable-auto-tool-choice --tool-call-parser qwen3_coder", {}),
        ("--chat-template-content-format string --stream-interval 1 --decode-log-interval 40", {}),
        ("--per-request-spec-decode-metrics --language-model-only --disable-access-log-for-endpoints /health", {}),
        ("--tensor-parallel-size 1 --tp 1 --kv-cache-dtype auto --trust-remote-code --enable-metrics", {}),
        (
            "--context-length 8192 --mem-fraction-static 0.7 --attention-backend fa3 --max-running-requests 32",
            {
                "max_model_len": 8192,
                "mem_fraction_static": 0.7,
                "attention_backend": "fa3",
                "max_running_requests": 32,
            },
        ),
    ],
)
def test_a_flag_of_another_server_sets_what_it_means_here(arguments: str, expected: dict[str, Any]) -> None:
    assert settings(*arguments.split()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tp 2", "--tp: '2' is not served, only 1"),
        ("--reasoning-parser deepseek_r1", "'deepseek_r1' is not served, only qwen3"),
        ("--tool-call-parser hermes", "only qwen3_coder or qwen3_xml"),
        ("--quant-type vllm-w8a8", "'vllm-w8a8' is not served, only none"),
        ("--quantization w8a8_int8", "invalid choice: 'w8a8_int8'"),
        ("--kv-cache-dtype fp8", "'fp8' is not served, only auto"),
        ("--chat-template-content-format openai", "'openai' is not served, only auto or string"),
        ("--stream-interval 10", "'10' is not served, only 1"),
        ("--speculative-eagle-topk 4", "'4' is not served, only 1"),
        ("--speculative-algorithm NGRAM", "'ngram' is not served, only mtp"),
        ("--speculative-config {", "is not JSON"),
        ('--speculative-config {"model":"other"}', "model is not served, only method and num_speculative_tokens"),
        ('--speculative-config {"method":"ngram"}', "'ngram' is not served"),
        ('--speculative-config {"num_speculative_tokens":"many"}', "'many' is not a whole number"),
        ("--speculative-num-draft-tokens 12", "--mtp-step is 11, the range is 0..8"),
        ("--gpu-memory-utilization 90", "--mem-fraction-static is 90.0"),
        ("--max-num-seqs none", "--max-num-seqs: 'none' is not a whole number"),
    ],
)
def test_what_cannot_be_served_is_refused_rather_than_ignored(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(*arguments.split())
    assert message in caught.value.message


def test_every_alias_is_a_name_of_its_own_for_a_setting_that_exists() -> None:
    names = [name for alias in ALIASES for name in alias.names]
    own = {setting.name for config in (EngineConfig, ServerConfig) for setting in fields(config)}
    assert len(names) == len(set(names))
    assert not {flag_name(name) for name in names} & set(map(flag_name, own))
    assert {alias.setting for alias in ALIASES} - {None} <= own


def test_a_reader_names_all_it_would_take() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="only a or b"):
        only("a", "b")("c")
    assert only("a")("a") == "a"


def test_a_speculative_config_without_a_number_asks_for_one_draft() -> None:
    assert read_speculative_config("{}") == 1
