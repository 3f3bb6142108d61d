"""Flags that cannot be are one line; the others fill each other in."""

import json
from pathlib import Path

import pytest

from benchmarks.openai_server import RunFailed
from benchmarks.serving.command_line import contestant_names, read_command_line, shown_config, urls

BAD_FLAGS = {
    "--num-prompts 0": "--num-prompts is 0, the least is 1",
    "--concurrency 4 0": "--concurrency has 0, it must be above 0",
    "--request-rate -1": "--request-rate has -1, it must be above 0",
    "--request-rate nan": "--request-rate has nan, it must be above 0",
    "--burstiness 0": "--burstiness is 0, the least is 0.001",
    "--range-ratio 1.5": "--range-ratio is 1.5, the most is 1",
    "--dataset sharegpt": "--dataset sharegpt needs --data",
    "--dataset gsm8k": "--dataset gsm8k needs --data",
    "--names a,b": "--names has 2 names, there are 1 servers",
    "--extra-body {": "--extra-body { is not JSON",
    "--extra-body [1]": "must be a JSON object",
    '--extra-body {"stream":false}': "answers are always streamed",
    "--goodput ttft": "--goodput ttft is not NAME:MILLISECONDS",
    "--goodput itl:5": "--goodput names itl, it must be one of ttft, tpot, e2e",
    "--json missing/x.json": "--json missing/x.json lies in no directory that exists",
    "--plot missing/x.png": "--plot missing/x.png lies in no directory that exists",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_flags_that_cannot_be_say_what_may(flags: str) -> None:
    with pytest.raises(RunFailed) as raised:
        read_command_line(flags.split(), None)
    assert BAD_FLAGS[flags] in str(raised.value)


def test_one_server_has_one_round_and_several_have_more() -> None:
    assert read_command_line([], None).rounds == 1
    assert read_command_line(["--compare", "http://b"], None).rounds == 5
    assert read_command_line(["--launch", "", "--launch", "--mtp-step 1"], None).rounds == 5
    assert read_command_line(["--compare", "http://b", "--rounds", "2"], None).rounds == 2


def test_servers_go_by_their_flags_or_addresses_or_names() -> None:
    flags = ["--launch", "--mtp-step 1", "--base-url", "http://a:1/v1", "--compare", "https://b", "c"]
    args = read_command_line(flags, None)
    assert contestant_names(args) == ["--mtp-step 1", "a:1/v1", "b", "c"] and urls(args) == [
        "http://a:1/v1",
        "https://b",
        "c",
    ]
    assert contestant_names(read_command_line([*flags, "--names", "w,x,y,z"], None)) == ["w", "x", "y", "z"]
    assert urls(read_command_line([], None)) == ["http://localhost:8000"]
    assert urls(read_command_line(["--launch", ""], None)) == []


@pytest.mark.parametrize(
    ("flags", "endpoint"),
    [
        ("--dataset random", "completions"),
        ("--dataset multi-turn", "chat"),
        ("--dataset sharegpt --data x", "chat"),
        ("--dataset sharegpt --data x --endpoint completions", "completions"),
    ],
)
def test_chats_are_asked_as_chats(flags: str, endpoint: str) -> None:
    assert read_command_line(flags.split(), None).endpoint == endpoint


def test_loads_are_of_one_kind() -> None:
    closed, rates = read_command_line(["--concurrency", "1", "4"], None), ["--request-rate", "0.5", "inf"]
    assert [str(load) for load in closed.loads] == ["concurrency 1", "concurrency 4"]
    opened = read_command_line([*rates, "--burstiness", "2"], None)
    assert [(load.kind, load.value, load.burstiness) for load in opened.loads] == [
        ("request_rate", 0.5, 2.0),
        ("request_rate", float("inf"), 2.0),
    ]
    with pytest.raises(SystemExit):
        read_command_line([*rates, "--concurrency", "1"], None)


def test_the_config_that_is_printed_is_strict_json_without_the_key(tmp_path: Path) -> None:
    flags = ["--api-key", "secret", "--request-rate", "inf", "--goodput", "ttft:200", "tpot:50.5", "--json"]
    config = shown_config(read_command_line([*flags, str(tmp_path / "x.json")], None))
    text = json.dumps(config, allow_nan=False)
    assert "secret" not in text and config["request_rate"] == ["inf"]
    assert config["goodput"] == {"ttft": 200.0, "tpot": 50.5} and config["json"] == str(tmp_path / "x.json")
