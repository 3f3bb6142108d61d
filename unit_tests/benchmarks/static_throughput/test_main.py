"""The command prints tables and one JSON object; what does not fit or makes no sense is one line."""

import json

import pytest

from benchmarks.static_throughput import presets
from benchmarks.static_throughput.__main__ import main, parse_args
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


@pytest.mark.parametrize("command", ["--batch 0", "--steps 0", "--set page_size", "--preset 5B", "--context"])
def test_numbers_that_make_no_sense_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(command.split())
    assert "error: " in capsys.readouterr().err


def test_settings_are_numbers_or_words() -> None:
    args = parse_args(["--set", "overlap=on", "page_size=32", "mem_fraction_static=0.5", "disable_cuda_graph=true"])
    expected = {"overlap": "on", "page_size": 32, "mem_fraction_static": 0.5, "disable_cuda_graph": True}
    assert args.set == expected
