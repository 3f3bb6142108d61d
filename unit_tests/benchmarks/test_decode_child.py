"""The contestant answers its commands, in this process."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.decode_child import main
from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.versions import HERE


def answers(commands: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[Any]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(command) + "\n" for command in commands)))
    main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_it_decodes_and_computes_prompts_on_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_random_checkpoint(tmp_path, "tiny")
    settings = {"model": str(tmp_path), "num_threads": 1, "max_model_len": 128, "prefix_cache": "off"}
    decode = {"settings": settings, "batch": 3, "prompt_len": 8, "texts": []}
    commands = [decode, 4, 2, decode | {"batch": 0, "prompt_len": 32}, 2]
    root, started, decoded, again, prefill, computed = answers(commands, monkeypatch, capsys)
    assert root == {"root": str(HERE)} and started == prefill == {}
    assert (decoded["tokens"], again["tokens"], computed["tokens"]) == (12, 6, 64)
    assert min(decoded["seconds"], again["seconds"], computed["seconds"]) > 0
