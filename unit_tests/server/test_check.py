"""`--check` finds what would keep a server from starting, without loading anything."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.check import check
from server.config import DEMO_MODEL, EngineConfig, ServerConfig
from server.errors import ConfigError
from unit_tests.checkpoints import make_checkpoint


def refusal(engine: dict[str, Any], server: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check(EngineConfig(**engine), ServerConfig(**(server or {})))
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny checkpoint of the test's own."""
    return make_checkpoint(tmp_path / "tiny", num_layers=4)


def test_the_demo_can_be_served_and_its_memory_is_told() -> None:
    report = check(EngineConfig(model=DEMO_MODEL, mtp_step=1), ServerConfig())
    assert "tensors as config.json asks" in report
    assert "a chat template that renders" in report
    assert "weights" in report and "KV tokens" in report


def test_nothing_of_the_weights_is_read(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    weights.write_bytes(content[:header_end])
    with weights.open("r+b") as file:
        file.truncate(len(content))  # a hole where the numbers were
    assert "tensors as config.json asks" in check(EngineConfig(model=str(checkpoint)), ServerConfig())


def test_quantized_weights_are_told_and_counted(checkpoint: Path) -> None:
    def megabytes(quantization: str) -> float:
        report = check(EngineConfig(model=str(checkpoint), quantization=quantization), ServerConfig())
        assert ("weights int8, " in report) == (quantization == "int8")
        return float(next(line for line in report.splitlines() if line.startswith("  weights ")).split()[1])

    assert 0 < megabytes("int4") < megabytes("int8") < megabytes("none")


def test_a_directory_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal({"model": str(tmp_path)})


def test_weights_that_do_not_fit_the_config_are_named(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["intermediate_size"] += 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    message = refusal({"model": str(checkpoint)})
    assert "mlp" in message and "config.json asks for" in message
    assert "0 tensors" in check(EngineConfig(model=str(checkpoint), load_format="dummy"), ServerConfig())


def test_a_tokenizer_of_another_checkpoint_is_noticed(tmp_path: Path) -> None:
    small = make_checkpoint(tmp_path, num_layers=4, vocab_size=260)
    assert "are of different checkpoints" in refusal({"model": str(small)})


def test_a_broken_tokenizer_is_named(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    assert "tokenizer.json is not valid JSON" in refusal({"model": str(checkpoint)})


def test_a_server_that_skips_the_tokenizer_needs_none(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    found = check(EngineConfig(model=str(checkpoint)), ServerConfig(skip_tokenizer_init=True))
    assert "tokenizer:  none (--skip-tokenizer-init)" in found


def test_drafts_without_a_draft_head_are_refused(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path, num_layers=4, mtp_layers=0)
    assert "it carries no draft head, serve it with --mtp-step 0" in refusal({"model": str(plain), "mtp_step": 1})


def test_a_plan_that_does_not_fit_the_memory_names_the_mend(checkpoint: Path) -> None:
    message = refusal({"model": str(checkpoint), "max_running_requests": 10**9})
    assert "--max-running-requests" in message


def test_defaults_of_sampling_are_read_too(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"top_p": 7}')
    assert "generation_config.json: top_p is 7" in refusal({"model": str(checkpoint)})
    overrides = {"override_generation_config": {"top_q": 1}, "generation_config": "none"}
    assert "--override-generation-config has top_q" in refusal({"model": str(checkpoint)}, overrides)


def test_a_template_that_renders_no_chat_is_told_not_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ raise_exception('only tools here') }}")
    report = check(EngineConfig(model=str(checkpoint)), ServerConfig())
    assert "no chat: the chat template refused the messages: only tools here" in report


def test_what_http_and_traces_need_is_checked_too(checkpoint: Path) -> None:
    nowhere = {"ssl_certfile": str(checkpoint / "nowhere.pem")}
    assert "nowhere.pem cannot be served" in refusal({"model": str(checkpoint)}, nowhere)
    assert "must be a URL" in refusal({"model": str(checkpoint)}, {"otlp_traces_endpoint": "localhost"})
    check(EngineConfig(model=str(checkpoint)), ServerConfig(otlp_traces_endpoint="http://localhost:4318"))


def test_the_chat_template_of_the_settings_is_the_one_that_is_tried() -> None:
    own = ServerConfig(chat_template="{{ raise_exception('never') }}")
    assert "no chat: the chat template refused the messages: never" in check(EngineConfig(model=DEMO_MODEL), own)
    assert "--chat-template /nowhere cannot be read" in refusal({"model": DEMO_MODEL}, {"chat_template": "/nowhere"})
