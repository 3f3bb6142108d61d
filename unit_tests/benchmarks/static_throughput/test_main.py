"""The command prints tables and one JSON object; what does not fit or makes no sense is one line."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.static_throughput import __main__ as command
from benchmarks.static_throughput import presets
from benchmarks.static_throughput.__main__ import count_engines, main, parse_args
from benchmarks.static_throughput.presets import Preset


@pytest.fixture
def known(nano: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line knows the small preset."""
    monkeypatch.setattr("benchmarks.static_throughput.__main__.PRESET_NAMES", ("nano", "27B"))


@pytest.mark.usefixtures("known")
def test_results_are_the_last_line_and_what_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(presets, "free_memory", lambda device: 2**30)
    small = "--batch 1 --context 40 --mtp-steps 0 1 --accept-rate 1 --chunks 16 --steps 2 --rounds 1 --num-threads 1"
    assert main(f"--preset nano 27B {small} --set page_size=32".split()) == 1
    captured = capsys.readouterr()
    assert "error: preset 27B does not fit: its weights take 54641" in captured.err
    written = json.loads(captured.out.splitlines()[-1])
    assert written["config"]["set"] == {"page_size": 32} and written["config"]["preset"] == ["nano", "27B"]
    (result,) = written["results"]
    assert [row["accept_len"] for row in result["rows"]] == [1.0, 2.0] and result["gb_s"] > 0
    assert [row["chunk"] for row in result["prefill"]] == [16] and not result["skipped"]
    assert "bandwidth_share" in captured.out and "memory read at" in captured.out


@pytest.mark.usefixtures("known")
def test_what_an_engine_refuses_is_named_and_the_rest_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--mtp-steps 0 --chunks --steps 2 --rounds 1 --num-threads 1 --batch 1"
    assert main(f"--preset nano --context 40 300000 {small}".split()) == 1
    out = capsys.readouterr().out
    (result,) = json.loads(out.splitlines()[-1])["results"]
    assert [row["context"] for row in result["rows"]] == [40]
    assert len(result["skipped"]) == 1 and "262144 positions" in result["skipped"][0]


@pytest.mark.usefixtures("known")
def test_comparisons_that_fail_are_named_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> float:
        raise OSError("no space left")

    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").touch()
    (tmp_path / "server" / "llm.py").write_text("raise SystemExit(3)")
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))  # one without the model
    monkeypatch.setattr(command, "trace_steps", fail)
    small = "--mtp-steps 1 --chunks --steps 2 --rounds 1 --num-threads 1 --batch 1 --context 24"
    others = ["--compare", "transformers", "overlap", "--baseline", str(tmp_path), "--trace", str(tmp_path / "x.json")]
    assert main(["--preset", "nano", *small.split(), *others]) == 1
    (result,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [len(result[name]) for name in ("rows", "overlap", "transformers", "baseline")] == [1, 1, 0, 0]
    transformers, baseline, trace = result["skipped"]
    assert "transformers: cannot import name 'Qwen3_5ForCausalLM'" in transformers
    assert "baseline: the process of another version ended with status 3" in baseline
    assert "trace of" in trace and "no space left" in trace


@pytest.mark.usefixtures("known")
def test_prompts_alone_are_measured_where_nothing_decodes(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--context 24 --chunks 16 --rounds 1 --num-threads 1"
    assert main(["--preset", "nano", "--batch", *small.split()]) == 0
    (result,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert len(result["prefill"]) == 1 and result["gb_s"] > 0


def test_models_that_stand_side_by_side_are_counted() -> None:
    here = str(Path(__file__).resolve().parents[3])
    counts = {"": 1, "--compare overlap": 2, f"--baseline {here}": 2, "--compare overlap --mtp-steps 0 1 3": 3}
    for flags, count in counts.items():
        assert count_engines(parse_args(["--mtp-steps", "1", *flags.split()])) == count


NONSENSE = {
    "--batch 0": "at least 1",
    "--steps 0": "at least 1",
    "--set page_size": "NAME=VALUE",
    "--preset 5B": "invalid choice",
    "--context": "expected at least one",
    "--baseline no/such/directory": "--baseline no/such/directory is no checkout of this project",
    "--baseline /": "--baseline / is no checkout of this project",
    "--trace no/such/x.json": "--trace no/such/x.json must be a file in a directory that exists",
    "--trace /": "--trace / must be a file",
}


@pytest.mark.parametrize(("flags", "message"), NONSENSE.items())
def test_what_makes_no_sense_is_refused(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(flags.split())
    assert message in capsys.readouterr().err


def test_settings_are_numbers_or_words() -> None:
    args = parse_args(["--set", "overlap=on", "page_size=32", "mem_fraction_static=0.5", "disable_cuda_graph=true"])
    expected = {"overlap": "on", "page_size": 32, "mem_fraction_static": 0.5, "disable_cuda_graph": True}
    assert args.set == expected
