"""The whole load generator against small servers that say what a test wants, and against the real one."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.serving.__main__ import main
from unit_tests.benchmarks.serving.fake_server import FakeModel, Reply, metrics_text, refuse

Serve = Callable[[FakeModel], str]
PROBLEMS = ["--dataset", "word-problems", "--num-prompts", "6"]


def results_of(output: str) -> dict[str, Any]:
    line = json.loads(output.splitlines()[-1])
    assert line["benchmark"] == "serving" and {"commit", "date", "device", "config"} <= line.keys()
    results: dict[str, Any] = line["results"]
    return results


def only_row(results: dict[str, Any]) -> dict[str, Any]:
    ((row,),) = (load["servers"] for load in results["loads"])
    return row


def test_one_server_gives_tables_and_the_object_as_the_last_line_and_in_a_file(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = iter([metrics_text(100, [50, 50], [7, 0], 1000), metrics_text(140, [90, 80], [37, 5], 1053)])
    url, path = serve(FakeModel(metrics=lambda: next(texts))), tmp_path / "results.json"
    flags = ["--concurrency", "3", "--goodput", "ttft:60000", "--json", str(path)]
    assert main(["--base-url", url + "/v1", *PROBLEMS, *flags]) == 0
    output = capsys.readouterr().out
    assert json.loads(path.read_text()) == json.loads(output.splitlines()[-1])
    results = results_of(output)
    row = only_row(results)
    assert (row["requests"], row["failed"], row["output_tokens"], row["input_tokens"]) == (6, 0, 48, 60)
    assert (row["accept_length"], row["acceptance_per_position"]) == (1 + 35 / 40, [0.75, 0.125])
    assert row["goodput_requests_s"] == row["requests_s"] and row["tokens_per_event"] == 2
    assert results["dataset"]["asked"] == 4 + 6 and results["is_partial"] is False
    assert results["servers"] == [{"server": url.partition("//")[2] + "/v1", "url": url, "model": "fake"}]
    header, cells = output.splitlines()[:2]
    assert header.split()[:4] == ["concurrency", "requests", "failed", "output_tok_s"]
    assert cells.split()[:3] == ["3", "6", "0"] and "0.750 0.125" in cells
    assert "tokens are counted by usage, those of one event by continuous usage" in output
    assert "the server counts 5 more tokens than came here" in output


@pytest.mark.parametrize(
    ("tells", "total", "event"),
    [("final", "usage", "events"), ("logprobs", "usage", "logprobs"), ("nothing", "events", "events")],
)
def test_it_is_said_what_tokens_were_counted_by(
    serve: Serve, capsys: pytest.CaptureFixture[str], tells: str, total: str, event: str
) -> None:
    assert main(["--base-url", serve(FakeModel(tells=tells)), *PROBLEMS]) == 0
    output = capsys.readouterr().out
    row = only_row(results_of(output))
    assert (row["tokens_counted_by"], row["event_tokens_counted_by"]) == (total, event)
    assert f"tokens are counted by {total}, those of one event by {event}" in output
    assert (row["itl_token_ms"] is None) == (event == "events") == ("ITL per token needs" in output)
    assert row["output_tokens"] == 6 * (4 if tells == "nothing" else 8)


def test_servers_are_compared_round_by_round_and_answer_by_answer(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = [serve(FakeModel()), serve(FakeModel(word="u")), serve(FakeModel())]
    flags = ["--compare", *urls[1:], "--names", "plain,other,same", "--rounds", "2", "--concurrency", "1", "2"]
    assert main(["--base-url", urls[0], *PROBLEMS, *flags]) == 0
    output = capsys.readouterr().out
    results = results_of(output)
    for load in results["loads"]:
        plain, other, same = load["servers"]
        assert [row["server"] for row in load["servers"]] == ["plain", "other", "same"]
        assert "differences" not in plain and same["differences"]["different"] == 0
        assert (other["differences"]["compared"], other["differences"]["different"]) == (12, 12)
        for row in load["servers"]:
            for entry, first in zip(row["comparison"], plain["comparison"], strict=True):
                assert len(entry["rounds"]) == 2 and entry["min"] <= entry["median"] <= entry["max"]
                pairs = zip(entry["rounds"], first["rounds"], strict=True)
                assert entry["ratios"] == pytest.approx([value / base for value, base in pairs])
    assert "concurrency 2, other: 12 of 12 greedy answers differ from the first server's" in output
    assert "concurrency 2, same: 0 of 12 greedy answers differ" in output
    assert "| output tokens per second | concurrency 1 | concurrency 2 |\n|---|--:|--:|\n| `plain` | " in output
    ratio = results["loads"][1]["servers"][1]["comparison"][0]["ratio_median"]
    (line,) = [line for line in output.splitlines() if line.startswith("| `other`")][:1]
    assert f"({ratio:.2f}x)" in line


def test_sampled_answers_are_not_compared(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--compare", serve(FakeModel(word="u")), "--temperature", "0.5", "--rounds", "1"]
    assert main(["--base-url", serve(FakeModel()), *PROBLEMS, *flags]) == 0
    output = capsys.readouterr().out
    assert "differences" not in results_of(output)["loads"][0]["servers"][1] and "differ" not in output.splitlines()[-2]


def test_a_chat_grows_over_http(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    model = FakeModel(num_tokens=2)
    flags = ["--dataset", "multi-turn", "--num-turns", "2", "--num-prompts", "3", "--num-warmups", "0"]
    assert main(["--base-url", serve(model), *flags]) == 0
    assert only_row(results_of(capsys.readouterr().out))["requests"] == 6
    grown = model.requests[-1]["messages"]
    assert [message["role"] for message in grown] == ["user", "assistant", "user"]
    assert grown[1]["content"] == " t0 t1" and grown[0] == model.requests[-2]["messages"][0]


def test_failed_requests_are_counted_by_reason(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    replies: dict[int, Reply] = {6: refuse(429, "the queue is full"), 8: refuse(429, "still"), 9: (200, [])}
    model = FakeModel(fail=replies.get)
    assert main(["--base-url", serve(model), *PROBLEMS]) == 0
    output = capsys.readouterr().out
    row = only_row(results_of(output))
    assert (row["requests"], row["failed"]) == (3, 3) and list(row["failures"]) == ["HTTP 429", "stream ended early"]
    assert ": 2 requests failed, HTTP 429: the queue is full" in output


def test_entries_left_out_and_asked_again_are_told(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chats.jsonl"
    exchange = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "By four times six letters"}]
    path.write_text(json.dumps({"conversations": exchange}) + "\n{broken\n")
    flags = ["--dataset", "sharegpt", "--data", str(path), "--num-prompts", "6"]
    assert main(["--base-url", serve(FakeModel()), *flags]) == 0
    output = capsys.readouterr().out
    assert results_of(output)["dataset"] == {"size": 1, "asked": 10, "skipped": 1, "unit": "words"}
    assert "1 entries of the data set were broken and left out" in output
    assert "10 conversations were asked for, the data set has 1: some came again" in output


def test_an_interruption_reports_what_there_is(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(number: int) -> Reply | None:
        if number < 5 + 8:
            return None
        os.kill(os.getpid(), signal.SIGINT)
        return 200, [(3600.0, b"")]

    flags = ["--base-url", serve(FakeModel(fail=interrupt)), "--num-prompts", "50", "--concurrency", "1", "2"]
    assert main([*PROBLEMS[:2], *flags]) == 130
    output = capsys.readouterr().out
    results = results_of(output)
    row = only_row(results)
    assert results["is_partial"] is True and (row["requests"], row["cut"], row["failed"]) == (8, 1, 0)
    assert "PARTIAL" in output and "1 requests were in flight" in output
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interruption_of_the_first_request_ends_the_run(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(number: int) -> Reply:
        os.kill(os.getpid(), signal.SIGINT)
        return 200, [(3600.0, b"")]

    assert main([*PROBLEMS, "--base-url", serve(FakeModel(fail=interrupt))]) == 130
    output = capsys.readouterr()
    assert output.out == "" and output.err == "error: interrupted\n"


def assert_fails(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert output.out == "" and line.startswith("error: ") and message in line


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost:8000", "nonsense"])
def test_a_server_that_is_down_is_one_line_and_exit_code_one(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_fails(["--base-url", url], f"cannot reach {url}/v1/models", capsys)


def test_a_second_server_that_is_down_is_noticed_first(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    model = FakeModel()
    assert_fails(
        ["--base-url", serve(model), "--compare", "http://127.0.0.1:9"], "cannot reach http://127.0.0.1:9", capsys
    )
    assert model.requests == []


def test_an_unknown_model_is_one_line_and_exit_code_one(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    message = "/v1/completions, asked once: HTTP 404: The model other does not exist"
    assert_fails(["--base-url", serve(FakeModel()), "--model", "other"], message, capsys)


@pytest.mark.parametrize("dataset", ["sharegpt", "gsm8k"])
def test_a_missing_file_is_noticed_before_a_server_is_asked(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--base-url", "http://127.0.0.1:9", "--dataset", dataset, "--data", "missing.jsonl"]
    assert_fails(flags, "missing.jsonl", capsys)


def test_a_server_that_answers_nothing_is_reported_and_exit_code_one(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    model = FakeModel(fail=lambda number: refuse(500, "engine died") if number else None)
    assert main(["--base-url", serve(model), *PROBLEMS, "--names", "a"]) == 1
    output = capsys.readouterr()
    assert output.err.splitlines()[-1] == "error: no request was answered by a; the reasons stand above"
    assert only_row(results_of(output.out))["failures"] == {"HTTP 500": {"count": 6, "example": "engine died"}}


@pytest.mark.slow
def test_launched_servers_answer_alike_with_and_without_drafts_and_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = "--dtype float32 --max-model-len 512 --speculation fixed --num-threads 1"
    flags = ["--launch", f"--mtp-step 0 {common}", "--launch", f"--mtp-step 2 {common}", "--names", "plain,drafts"]
    more = ["--concurrency", "1", "4", "--rounds", "2", "--num-prompts", "6", "--json", str(tmp_path / "x.json")]
    assert main([*flags, "--dataset", "word-problems", *more]) == 0
    output = capsys.readouterr().out
    for load in results_of(output)["loads"]:
        plain, drafts = load["servers"]
        assert plain["requests"] == drafts["requests"] == 12 and plain["output_tokens"] == drafts["output_tokens"] > 100
        assert drafts["differences"] == {"compared": 12, "different": 0, "example": None}
        assert plain["tokens_of_others"] == drafts["tokens_of_others"] == 0
        assert plain["accept_length"] == 1 and drafts["accept_length"] > 2
        assert plain["tokens_per_event"] < drafts["tokens_per_event"] and len(drafts["acceptance_per_position"]) == 2
        assert drafts["event_tokens_counted_by"] == "continuous usage"
    children = psutil.Process().children(recursive=True)
    assert not [child for child in children if "server" in child.cmdline()]
