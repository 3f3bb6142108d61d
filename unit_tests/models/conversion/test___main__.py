import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.conversion.__main__ import main
from unit_tests.models.conversion.conversions import FIXTURES, make_pair, read_bytes

ROOT = Path(__file__).resolve().parents[3]


def test_there_and_back_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, base = make_pair(tmp_path, moe=True)
    there = ["hf2mcore", "--source", str(source), "--out", str(tmp_path / "m"), "--format", "mp_rank"]
    assert main([*there, "--tensor-parallel", "2", "--block", "mtp_model_layer"]) == 0
    back = ["mcore2hf", "--source", str(tmp_path / "m"), "--base", str(base), "--in-place"]
    assert main([*back, "--report", str(tmp_path / "r.json")]) == 0
    assert read_bytes(base) == read_bytes(source)
    out = capsys.readouterr().out
    assert "2 tensor-parallel ranks" in out and "left over  0\nmissing    0" in out
    assert json.loads((tmp_path / "r.json").read_text())["mapped"]["mtp.layers.0.eh_proj.weight"] == ["mtp.fc.weight"]


def test_an_error_is_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hf2mcore", "--source", str(tmp_path / "none"), "--out", str(tmp_path / "m")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out


def test_it_runs_as_a_module_without_megatron(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text((FIXTURES / "moe" / "config.json").read_text())
    command = [sys.executable, "-m", "models.conversion", "mcore2hf", "--norms", "ones", "--mtp-only"]
    command += ["--source", str(FIXTURES / "moe" / "mp_rank"), "--base", str(tmp_path / "base")]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of the trunk" in done.stdout and (tmp_path / "out" / "model.safetensors").exists()
