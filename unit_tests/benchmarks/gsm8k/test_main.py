"""The whole harness against a small HTTP server that says what a test wants, and against the real one."""

import itertools
import json
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gsm8k import __main__ as harness
from benchmarks.gsm8k.__main__ import main
from models.training.word_problems import draw_problem
from unit_tests.benchmarks.gsm8k.fake_server import FakeServer, asked_number, right_answer
from unit_tests.benchmarks.gsm8k.splits import TEST, TRAIN, write_rows
from unit_tests.server.test_end_to_end import RunningServer, free_ports

DEMO = Path(__file__).resolve().parents[3] / "models" / "demo"


def results_of(output: str) -> dict[str, Any]:
    line = json.loads(output.splitlines()[-1])
    assert line["benchmark"] == "gsm8k"
    return line["results"]


def metrics_text(steps: int, proposed: list[int], accepted: list[int], tokens: int) -> str:
    """What /metrics says of speculation and tokens, as two engines count that add up to these numbers."""
    label = 'model_name="m"'
    lines = [
        f'vllm:spec_decode_num_drafts_total{{{label},engine="0"}} {steps - 1}',
        f'vllm:spec_decode_num_drafts_total{{{label},engine="1"}} 1',
        f"vllm:spec_decode_num_draft_tokens_total{{{label}}} {sum(proposed)}",
        f"vllm:spec_decode_num_accepted_tokens_total{{{label}}} {sum(accepted)}",
        f"vllm:generation_tokens_total{{{label}}} {tokens}",
    ]
    for position, (tried, kept) in enumerate(zip(proposed, accepted, strict=True)):
        place = f'{{{label},position="{position}"}}'
        lines.append(f"tandem:spec_decode_num_draft_tokens_per_pos_total{place} {tried}")
        lines.append(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{place} {kept}")
    return "\n".join(lines) + "\n"


def test_completions_are_greedy_and_end_where_the_next_question_would_begin(
    serve: Callable[..., FakeServer], data: Path
) -> None:
    server = serve(right_answer)
    assert main(["--base-url", server.url + "/v1/", "--data", str(data), "--shots", "2", "--num-questions", "1"]) == 0
    ((path, body),) = server.requests
    assert path == "/v1/completions" and body["prompt"].startswith("Question: What is 1 plus 1?\nAnswer: 1+1")
    assert body["prompt"].endswith("#### 4\n\nQuestion: What is 1 times 1000?\nAnswer:")
    del body["prompt"]
    stop = ["Question", "Assistant:", "<|separator|>"]
    assert body == {"model": "fake", "max_tokens": 512, "temperature": 0.0, "stop": stop}


@pytest.mark.parametrize("thinking", ["on", "off"])
def test_a_chat_switches_thinking_and_is_cut_by_nothing(
    serve: Callable[..., FakeServer], data: Path, thinking: str
) -> None:
    server = serve(right_answer)
    flags = ["--chat", "--thinking", thinking, "--temperature", "0.5", "--num-questions", "3", "--parallel", "1"]
    assert main(["--base-url", server.url, "--data", str(data), *flags]) == 0
    path, body = server.requests[2]
    assert path == "/v1/chat/completions" and len(body.pop("messages")) == 11
    switch = {"enable_thinking": thinking == "on"}
    assert body == {"model": "fake", "max_tokens": 512, "temperature": 0.5, "seed": 3, "chat_template_kwargs": switch}


def test_acceptance_is_what_the_servers_counters_grew_by(
    serve: Callable[..., FakeServer], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = iter([metrics_text(100, [50, 0], [7, 0], 1000), metrics_text(140, [90, 20], [37, 5], 1125)])
    server = serve(right_answer, lambda: next(texts))
    assert main(["--base-url", server.url, "--data", str(data)]) == 0
    output = capsys.readouterr().out
    (result,) = results_of(output)["servers"]
    assert result["accuracy"] == 1.0 and result["questions"] == 12 and result["mean_output_len"] == 10
    assert result["acceptance_per_position"] == [0.75, 0.25] and result["drafts_per_step"] == 1.5
    assert result["accept_length"] == 1 + 35 / 40 and result["acceptance"] == 35 / 60
    assert result["tokens_of_others"] == 5 and "5 more tokens to others" in output
    assert "0.750 0.250" in output.splitlines()[1]


@pytest.mark.parametrize("page", [None, "<html>{ 1 2 3 }</html>"])
def test_a_server_without_metrics_is_scored_all_the_same(
    serve: Callable[..., FakeServer], data: Path, capsys: pytest.CaptureFixture[str], page: str | None
) -> None:
    assert main(["--base-url", serve(right_answer, lambda: page).url, "--data", str(data)]) == 0
    output = capsys.readouterr().out
    (result,) = results_of(output)["servers"]
    assert result["accuracy"] == 1.0 and result["accept_length"] is None and result["tokens_of_others"] is None
    assert output.splitlines()[1].split()[-2] == "-"


def test_as_many_requests_run_at_a_time_as_were_asked_for(serve: Callable[..., FakeServer], data: Path) -> None:
    together, lock, active, peaks = threading.Barrier(4), threading.Lock(), [0], [0]

    def reply(body: dict[str, Any]) -> tuple[str, str, int]:
        with lock:
            active[0] += 1
            peaks.append(active[0])
        together.wait(30)
        with lock:
            active[0] -= 1
        return right_answer(body)

    assert main(["--base-url", serve(reply).url, "--data", str(data), "--parallel", "4"]) == 0
    assert max(peaks) == 4


def test_compare_lists_every_output_that_differs(
    serve: Callable[..., FakeServer], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_answer(body: dict[str, Any]) -> tuple[str, str, int]:
        text, finish_reason, num_tokens = right_answer(body)
        if asked_number(body) == 3:
            return text.replace("#### 3000", "#### 3100"), finish_reason, num_tokens
        return text, "length" if asked_number(body) == 5 else finish_reason, num_tokens

    first, second, saved = serve(right_answer), serve(other_answer), tmp_path / "outputs.jsonl"
    flags = ["--data", str(data), "--shots", "1", "--save-outputs", str(saved)]
    assert main(["--base-url", first.url, "--compare", second.url, *flags]) == 0
    output = capsys.readouterr().out
    results = results_of(output)
    place = len(" That is 3,000.\n#### 3")
    assert results["differences"] == [
        {"question": 3, "character": place, "outputs": ["000<stop>", "100<stop>"], "answers": ["3000", "3100"]},
        {"question": 5, "character": place + 3, "outputs": ["<stop>", "<length>"], "answers": ["5000", "5000"]},
    ]
    assert f"question 3 differs from character {place}: '000<stop>' (3000) | '100<stop>' (3100)" in output
    assert "2 of 12 outputs differ" in output
    assert [server["accuracy"] for server in results["servers"]] == [1.0, 11 / 12]
    assert sorted(map(repr, first.requests)) == sorted(map(repr, second.requests))
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert len(lines) == 24 and lines[14]["answer"] == "3100" and lines[14]["gold"] == "3000"
    assert lines[14]["url"] == second.url and lines[14]["text"] == " That is 3,000.\n#### 3100"


def break_nothing(_: Path) -> None:
    """The data are well; the flags are at fault."""


BAD_INPUTS = {
    "too few questions": (break_nothing, ["--num-questions", "13"], "asks for 13 problems, the test split has 12"),
    "too few examples": (break_nothing, ["--shots", "8"], "--shots asks for 8 problems, the train split has 7"),
    "negative shots": (break_nothing, ["--shots", "-1"], "--shots is -1, the least is 0"),
    "no questions": (break_nothing, ["--num-questions", "0"], "--num-questions is 0, the least is 1"),
    "no requests": (break_nothing, ["--parallel", "0"], "--parallel is 0, the least is 1"),
    "nan": (break_nothing, ["--temperature", "nan"], "--temperature is nan, the least is 0"),
    "thinking in a completion": (break_nothing, ["--thinking", "on"], "add --chat"),
    "nowhere to save": (break_nothing, ["--save-outputs", "missing/x.jsonl"], "no file in a directory that exists"),
    "a directory to save": (break_nothing, ["--save-outputs", "."], "no file in a directory that exists"),
    "no test split": (lambda data: (data / "test.jsonl").unlink(), [], "no test file (.jsonl, .parquet) in"),
    "no train split": (lambda data: (data / "train.jsonl").unlink(), [], "no train file (.jsonl, .parquet) in"),
    "empty": (lambda data: write_rows(data / "test.jsonl", []), [], "(0 are broken)"),
    "not json": (lambda data: (data / "test.jsonl").write_text("{\n{\n"), [], "(2 are broken)"),
    "not utf-8": (lambda data: (data / "test.jsonl").write_bytes(b"\xff\n"), [], "(1 are broken)"),
    "other fields": (lambda data: write_rows(data / "test.jsonl", [{"text": "x"}]), [], "has no row with a `question`"),
    "no objects": (lambda data: write_rows(data / "train.jsonl", [["x"]]), [], "train split has no row with"),
    "mixed splits": (
        lambda data: write_rows(data / "train.jsonl", TRAIN[:4] + TEST[6:7]),
        [],
        "train problem 5 is test question 7: the splits are mixed",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_data_and_flags_are_one_line_and_exit_code_one(
    name: str, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    spoil, flags, message = BAD_INPUTS[name]
    spoil(data)
    assert_fails(["--base-url", "http://127.0.0.1:9", "--data", str(data), *flags], message, capsys)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data/train.jsonl", "is a train split, questions come from test"),
        ("data/own.jsonl", "there is none beside"),
        ("data/own.txt", "the formats are .jsonl and .parquet"),
        ("data/own.parquet", "pip install pyarrow"),
        ("data/missing.jsonl", "there is no file or directory"),
        ("openai/gsm8k", "there is no openai/gsm8k here; other layouts and names on the Hub need the datasets library"),
    ],
)
def test_a_wrong_file_is_one_line_and_exit_code_one(
    name: str, message: str, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.chdir(data.parent)
    for suffix in ("jsonl", "txt", "parquet"):
        write_rows(data / f"own.{suffix}", TEST)
    assert_fails(["--base-url", "http://127.0.0.1:9", "--data", name], message, capsys)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost:8000", "nonsense", "http://127.0.0.1:x"])
def test_a_server_that_is_not_there_is_one_line_and_exit_code_one(
    url: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_fails(["--base-url", url, "--data", str(data)], f"cannot reach {url}/v1/models", capsys)


def test_a_second_server_that_is_not_there_is_noticed_before_anything_is_asked(
    serve: Callable[..., FakeServer], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(right_answer)
    flags = ["--base-url", server.url, "--compare", "http://127.0.0.1:9", "--data", str(data)]
    assert_fails(flags, "cannot reach http://127.0.0.1:9", capsys)
    assert server.requests == []


def test_a_refused_question_is_counted_and_named_and_the_others_are_kept(
    serve: Callable[..., FakeServer], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(body: dict[str, Any]) -> tuple[str, str, int]:
        return ("the prompt is too long", "refuse", 0) if asked_number(body) == 2 else right_answer(body)

    servers, saved = [serve(reply).url, serve(right_answer).url], tmp_path / "outputs.jsonl"
    flags = ["--data", str(data), "--save-outputs", str(saved)]
    assert main(["--base-url", servers[0], "--compare", servers[1], *flags]) == 1
    output = capsys.readouterr()
    line = output.err.splitlines()[-1]
    assert line.startswith("error: questions failed: 1 of 12, first question 2: ") and "the prompt is too long" in line
    results = results_of(output.out)
    assert [(one["questions"], one["failed"], one["accuracy"]) for one in results["servers"]] == [
        (11, 1, 1),
        (12, 0, 1),
    ]
    assert "0 of 11 outputs differ" in output.out and results["is_partial"] is False
    assert len(saved.read_text().splitlines()) == 11 + 12


def test_ctrl_c_keeps_what_was_answered(
    serve: Callable[..., FakeServer],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(done: Iterable[Any], **_: object) -> Iterator[Any]:
        yield from itertools.islice(done, 3)
        raise KeyboardInterrupt

    is_over = threading.Event()

    def reply(body: dict[str, Any]) -> tuple[str, str, int]:
        assert asked_number(body) <= 3 or is_over.wait(30)
        return right_answer(body)

    monkeypatch.setattr(harness, "tqdm", interrupt)
    server, saved = serve(reply), tmp_path / "outputs.jsonl"
    flags = ["--parallel", "1", "--save-outputs", str(saved), "--compare", server.url]
    try:
        assert main(["--base-url", server.url, "--data", str(data), *flags]) == 130
    finally:
        is_over.set()
    output = capsys.readouterr()
    results = results_of(output.out)
    (only,) = results["servers"]
    assert (only["questions"], only["failed"], results["is_partial"]) == (3, 0, True)
    assert len(saved.read_text().splitlines()) == 3 and output.err == "error: interrupted\n"


def test_broken_rows_are_told_in_one_line(
    serve: Callable[..., FakeServer], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(data / "test.jsonl", [{"text": "x"}, *TEST, ["x"]])
    assert main(["--base-url", serve(right_answer).url, "--data", str(data)]) == 0
    output = capsys.readouterr().out
    assert results_of(output)["skipped"] == 2 and "\n2 rows of the data were broken and left out\n" in output


def assert_fails(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert output.out == "" and line.startswith("error: ") and message in line


@pytest.mark.slow
def test_the_demo_solves_its_own_problems_alike_with_and_without_drafts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    problems = [draw_problem(rng, held_out=True) for _ in range(24)]
    rows = [{"question": problem.question, "answer": problem.answer} for problem in problems]
    path = write_rows(tmp_path / "own.jsonl", rows)
    checkpoint = Path(shutil.copytree(DEMO, tmp_path / "demo"))
    flags = ("--dtype", "float32", "--max-model-len", "512", "--speculation", "fixed")
    plain, drafting = (
        RunningServer(checkpoint, port, *flags, "--mtp-step", str(step))
        for port, step in zip(free_ports(2), (0, 2), strict=True)
    )
    try:
        urls = ["--base-url", plain.wait_ready().url, "--compare", drafting.wait_ready().url]
        assert main([*urls, "--data", str(path), "--shots", "0", "--parallel", "4"]) == 0
    finally:
        plain.stop()
        drafting.stop()
    results = results_of(capsys.readouterr().out)
    without, with_drafts = results["servers"]
    assert results["differences"] == [] and without["accuracy"] == with_drafts["accuracy"] > 0.8
    assert without["truncated"] == without["tokens_of_others"] == 0 and without["accept_length"] == 1
    assert with_drafts["accept_length"] > 2 and len(with_drafts["acceptance_per_position"]) == 2
    assert all(1 >= share > 0.9 for share in with_drafts["acceptance_per_position"])
