"""What is sent, what a server is found to tell, and every way in which a request can fail."""

import asyncio
from typing import Any

import httpx
import pytest

from benchmarks.openai_server import RunFailed
from benchmarks.serving.answer import Answer
from benchmarks.serving.client import Client
from benchmarks.serving.command_line import read_command_line
from benchmarks.serving.datasets import Prompt
from unit_tests.benchmarks.serving.fake_server import FakeModel, Piece, VirtualNetwork, event, refuse
from unit_tests.benchmarks.serving.virtual_time import run_virtually

SAID = Prompt({"prompt": "Hello"}, 8)


def client_of(model: FakeModel, *flags: str, headers: dict[str, str] | None = None) -> Client:
    args = read_command_line(["--timeout", "64", *flags], None)
    return Client("http://a", args.model or "fake", headers or {}, args, VirtualNetwork(a=model))


def ask(model: FakeModel, *flags: str, prompt: Prompt = SAID) -> Answer:
    async def asked() -> Answer:
        async with client_of(model, *flags) as client:
            return await client.ask(3, 1, prompt)

    return run_virtually(asked())


def test_a_greedy_completion_is_asked_for_as_openai_has_it() -> None:
    model = FakeModel()
    answer = ask(model)
    assert model.requests == [
        {
            "model": "fake",
            "stream": True,
            "temperature": 0.0,
            "prompt": "Hello",
            "max_tokens": 8,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ]
    assert answer.text == " t0 t1 t2 t3 t4 t5 t6 t7" and answer.finish_reason == "stop" and not answer.failure
    assert (answer.index, answer.turn) == (3, 1)


def test_flags_show_in_the_body_and_extra_fields_rule() -> None:
    model, extra = FakeModel(), '{"top_p": 0.9, "max_tokens": 5}'
    flags = ["--temperature", "0.5", "--seed", "40", "--ignore-eos", "--extra-body", extra, "--endpoint", "chat"]
    answer = ask(model, *flags, prompt=Prompt.saying("Hi", 8, "chat"))
    (body,) = model.requests
    expected = {"temperature": 0.5, "seed": 43, "ignore_eos": True, "top_p": 0.9, "max_tokens": 5}
    assert body.items() >= expected.items() and body["messages"] == [{"role": "user", "content": "Hi"}]
    assert answer.text == " t0 t1 t2 t3 t4"


def test_the_clock_of_an_answer_is_exact() -> None:
    answer = ask(FakeModel(num_tokens=7, per_event=3, first_seconds=0.5, step_seconds=0.25))
    assert (answer.ttft, answer.e2e, answer.num_tokens) == (0.5, 1.0, 7)
    assert answer.gaps == [(0.25, 3), (0.25, 1)] and answer.tpot == 0.5 / 6


def wait_and_fail(*pieces: Piece) -> FakeModel:
    return FakeModel(fail=lambda number: (200, list(pieces)))


TEXT = event({"choices": [{"text": "x", "finish_reason": None}]})
FAILURES: dict[str, tuple[FakeModel, str, str]] = {
    "refused": (FakeModel(fail=lambda number: refuse(429, "queue full")), "HTTP 429", "queue full"),
    "cut": (wait_and_fail((0.0, TEXT)), "stream ended early", "after 1 events"),
    "nothing": (wait_and_fail(), "stream ended early", "after 0 events"),
    "broken": (wait_and_fail((0.0, event(b"{nonsense"))), "broken event", "{nonsense"),
    "error": (wait_and_fail((0.0, TEXT), (0.0, event({"error": {"message": "oom"}}))), "error in the stream", "oom"),
    "empty": (wait_and_fail((0.0, event(b"[DONE]"))), "empty answer", "no tokens"),
    "slow": (wait_and_fail((32.0, TEXT), (33.0, event(b"[DONE]"))), "timeout", "within 64 s (--timeout)"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_request_that_fails_says_why(name: str) -> None:
    model, reason, detail = FAILURES[name]
    answer = ask(model)
    assert answer.failure == reason and detail in answer.detail


@pytest.mark.parametrize(
    ("error", "reason"), [(httpx.ConnectError("refused"), "cannot connect"), (httpx.ReadError(""), "connection lost")]
)
def test_a_server_that_is_gone_is_a_failed_request(error: httpx.HTTPError, reason: str) -> None:
    def fail(number: int) -> Any:
        raise error

    assert ask(FakeModel(fail=fail)).failure == reason


def test_the_last_event_may_end_without_an_empty_line() -> None:
    said = {"choices": [{"text": "x", "finish_reason": "stop"}]}
    assert ask(wait_and_fail((0.0, event(said).rstrip()))).text == "x"


@pytest.mark.parametrize(
    ("refuses", "options"),
    [
        ((), {"include_usage": True, "continuous_usage_stats": True}),
        (("continuous_usage_stats",), {"include_usage": True}),
        (("continuous_usage_stats", "include_usage"), {}),
    ],
)
def test_a_server_is_asked_for_as_much_as_it_does_not_refuse(refuses: tuple[str, ...], options: dict[str, Any]) -> None:
    model = FakeModel(refuses=(*refuses, "ids"))

    async def probed() -> bool:
        async with client_of(model) as client:
            await client.probe()
            return await client.takes_token_ids()

    assert run_virtually(probed()) is False
    assert model.requests[-1]["prompt"] == [1, 2, 3] and model.requests[-1].get("stream_options", {}) == options


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        (FakeModel(), ["--model", "other"], "HTTP 404: The model other does not exist"),
        (FakeModel(fail=lambda number: refuse(400, "bad top_p")), [], "HTTP 400: bad top_p"),
        (FakeModel(fail=lambda number: refuse(500, "engine died")), [], "HTTP 500: engine died"),
    ],
)
def test_a_server_that_answers_nothing_ends_the_run(model: FakeModel, flags: list[str], message: str) -> None:
    async def probed() -> None:
        async with client_of(model, *flags) as client:
            await client.probe()

    with pytest.raises(RunFailed, match=message):
        run_virtually(probed())


def test_an_answer_without_tokens_is_enough_to_begin() -> None:
    async def probed() -> dict[str, bool]:
        async with client_of(wait_and_fail((0.0, event(b"[DONE]")))) as client:
            await client.probe()
            return client.stream_options

    assert "continuous_usage_stats" in run_virtually(probed())


def test_headers_go_with_every_request() -> None:
    model = FakeModel()

    async def asked() -> None:
        async with client_of(model, headers={"authorization": "Bearer k"}) as client:
            await asyncio.gather(*(client.ask(index, 0, SAID) for index in range(3)))

    run_virtually(asked())
    assert [headers["authorization"] for headers in model.headers] == ["Bearer k"] * 3
