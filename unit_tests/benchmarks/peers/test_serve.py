"""Servers are started with the same limits, those that do not answer are left out, and tables have ratios."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.openai_server import RunFailed
from benchmarks.peers import serve
from benchmarks.peers.__main__ import main, read_command_line
from benchmarks.peers.checkpoints import DEMO, Checkpoint
from benchmarks.peers.environments import Environment
from unit_tests.benchmarks.serving.fake_server import FakeModel, serving


def command(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for peer in ("llama.cpp", "vllm"):
        (root / peer).mkdir(exist_ok=True)
        (root / peer / "installed").touch()
    monkeypatch.setattr(Checkpoint, "gguf", lambda self, own, kind: root / f"model{kind}.gguf")
    flags = ["serve", "--directory", str(root), "--concurrency", "1", "8", "--max-len", "100", "--mtp-step", "3"]
    args = read_command_line([*flags, "--num-threads", "5"])
    model = root / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"linear_value_head_dim": 128}))
    return " ".join(serve.command_line(name, 99, Checkpoint(model, root), args))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tandem", ["--max-running-requests 8 --mtp-step 0 --port 99", "--num-threads 5"]),
        ("tandem-int8-mtp", ["--mtp-step 3 --quantization int8", "model --max-model-len 100"]),
        ("llama.cpp", ["llama-server -m", "model.gguf --port 99", "-np 8 -c 800", "-t 5 -tb 5"]),
        ("llama.cpp-Q4_0-mtp", ["modelQ4_0.gguf", "--spec-type draft-mtp --spec-draft-n-max 3"]),
        ("vllm-mtp", ['{"method": "mtp", "num_speculative_tokens": 3}', "--max-num-seqs 8 --max-model-len 100"]),
    ],
)
def test_each_server_gets_the_same_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, parts: list[str]
) -> None:
    line = command(name, tmp_path, monkeypatch)
    assert all(part in line for part in parts), line
    assert ("spec" in line and "mtp" in line) == (name.endswith("-mtp") and not name.startswith("tandem"))


def test_a_peer_that_cannot_serve_it_has_no_command(tmp_path: Path) -> None:
    args = read_command_line(["serve", "--directory", str(tmp_path)])
    with pytest.raises(RunFailed, match=r"llama\.cpp is not installed in"):
        serve.command_line("llama.cpp", 99, Checkpoint(DEMO, tmp_path), args)
    with pytest.raises(RunFailed, match="takes value heads in multiples of 32 alone"):
        serve.command_line("vllm", 99, Checkpoint(DEMO, tmp_path), args)
    assert Environment(tmp_path, "vllm").directory == tmp_path / "vllm"


def test_those_that_answer_are_compared_and_the_others_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextlib.contextmanager
    def fake(name: str, checkpoint: Any, args: Any) -> Iterator[str]:
        if name == "vllm":
            raise RunFailed("vllm ended with status 1: no AVX2")
        with serving(FakeModel()) as url:
            yield url

    monkeypatch.setattr(serve, "_server", fake)
    file = tmp_path / "results.json"
    flags = ["--contestants", "tandem", "llama.cpp", "vllm", "--checkpoint", "demo", "--concurrency", "1", "2"]
    flags += ["--rounds", "2", "--directory", str(tmp_path), "--json", str(file), "--load", "--num-prompts", "4"]
    assert main(["serve", *flags]) == 0
    output = capsys.readouterr()
    assert "vllm is missing: vllm ended with status 1: no AVX2" in output.out
    results = json.loads(file.read_text())["results"]
    assert results["missing"] == {"vllm": "vllm ended with status 1: no AVX2"}
    assert [(row["concurrency"], row["server"]) for row in results["serve"]] == [
        (1, "tandem"),
        (1, "llama.cpp"),
        (2, "tandem"),
        (2, "llama.cpp"),
    ]
    first, second, *_ = results["serve"]
    assert first["tok_s_ratio"] == 1 and second["tok_s_ratio_min"] <= second["tok_s_ratio"] <= second["tok_s_ratio_max"]
    assert first["itl_p99"] >= first["itl_p50"] and first["ttft_p99"] > 0 and first["failed"] == 0


def test_no_server_at_all_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--contestants", "vllm", "--checkpoint", "demo", "--directory", str(tmp_path)]
    assert main(["serve", *flags]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: no server answers; the reasons stand above"
