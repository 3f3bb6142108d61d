"""Every request has an id, a line in the log and a place in the metrics, and none of them has a word of its text."""

import asyncio
import logging
from typing import Any

import pytest

from server.api.exchange import Exchange, ExchangeRecorder, log_exchange
from server.config import ServerConfig
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error
from unit_tests.server.api.test_transport import run_and_leave

SECRET = "the quick brown fox jumps over the lazy dog"


@pytest.fixture
def exchanges() -> list[Exchange]:
    """What the serving of the test has answered."""
    return []


@pytest.fixture
def watched(make_serving, exchanges: list[Exchange]):
    """A serving whose exchanges are kept."""
    serving = make_serving(observers=[exchanges.append])
    with serving.listening():
        yield serving


@pytest.mark.parametrize("wanted", ["abc", "a" * 128, "~!{}"])
def test_the_id_that_a_client_gives_comes_back(watched: Serving, exchanges: list[Exchange], wanted: str) -> None:
    answer = watched.http.get("/health", headers={"x-request-id": wanted})
    assert answer.headers["x-request-id"] == answer.headers["request-id"] == wanted == exchanges[0].id


@pytest.mark.parametrize("wanted", [b"", b"two words", b"a" * 129, "ä".encode(), b"\x01\x02"])
def test_an_id_that_a_log_cannot_hold_is_replaced(watched: Serving, wanted: bytes) -> None:
    given = watched.http.get("/health", headers={"x-request-id": wanted}).headers["x-request-id"]
    assert len(given) == 32 and int(given, 16)


def test_every_answer_has_an_id_of_its_own(watched: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched.services.metrics, "render", lambda: 1 / 0)
    answers = [
        watched.http.get("/nowhere"),
        watched.http.post("/v1/completions", content=b"{"),
        watched.http.post("/v1/completions", json={"prompt": [5], "max_tokens": 2, "stream": True}),
        watched.http.get("/metrics"),
    ]
    assert [answer.status_code for answer in answers] == [404, 400, 200, 500]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4
    assert all(answer.headers["request-id"] == answer.headers["x-request-id"] for answer in answers)
    check_error(answers[3], 500, None, answers[3].headers["x-request-id"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_has_the_figures_of_its_request(watched: Serving, exchanges: list[Exchange], stream: bool) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 8, "n": 2, "stream": stream}
    answer = watched.http.post("/v1/completions", json=body, headers={"x-request-id": "r"})
    assert answer.status_code == 200
    figures = exchanges[0].figures()
    assert figures.pop("ttft") <= figures.pop("seconds")
    assert figures == {
        "id": "r",
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "prompt_tokens": 3,
        "output_tokens": 16,
        "cached_tokens": 0,
        "accept_length": 2.33,
        "finish_reason": "length",
    }


def test_a_request_that_is_refused_has_no_figures_of_a_generation(watched: Serving, exchanges: list[Exchange]) -> None:
    watched.http.post("/v1/completions", json={"prompt": [5], "temperature": 9})
    assert set(exchanges[0].figures()) == {"id", "method", "route", "status", "seconds"}
    assert exchanges[0].status == 400


def test_ends_of_several_choices_are_told_once_each(watched: Serving, exchanges: list[Exchange]) -> None:
    watched.complete([[5], [5, 2]], max_tokens=4)
    assert exchanges[0].figures()["finish_reason"] == "length,stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_an_abort_and_no_mistake_of_the_server(
    make_serving, exchanges: list[Exchange], stream: bool
) -> None:
    run_and_leave(make_serving(observers=[exchanges.append]), stream=stream)
    assert exchanges[0].figures()["finish_reason"] == "abort" and exchanges[0].status in (200, 499)


def test_a_client_that_leaves_before_the_answer_begins_is_counted_as_one() -> None:
    exchanges: list[Exchange] = []

    async def leave(scope: Any, receive: Any, send: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "headers": [], "path": "/v1/completions"}
    asyncio.run(ExchangeRecorder(leave, [exchanges.append])(scope, None, None))
    assert exchanges[0].status == 499


def test_the_log_has_one_line_per_request_and_none_of_its_words(
    watched: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    watched.complete(SECRET, max_tokens=4)
    watched.chat(SECRET, max_tokens=4, stop=["fox"])
    watched.http.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 9**9})
    lines = [record for record in caplog.records if record.name == "tandem.requests"]
    assert [record.fields["status"] for record in lines] == [200, 200, 400]
    for record in caplog.records:
        text = f"{record.getMessage()} {getattr(record, 'fields', '')}"
        assert "fox" not in text and "quick" not in text


def test_what_machines_poll_is_logged_for_debugging_only(caplog: pytest.LogCaptureFixture, watched: Serving) -> None:
    caplog.set_level(logging.DEBUG, "tandem.requests")
    for path in ("/health", "/metrics", "/v1/models"):
        watched.http.get(path)
    levels = {record.fields["route"]: record.levelno for record in caplog.records if record.name == "tandem.requests"}
    assert levels == {"/health": logging.DEBUG, "/metrics": logging.DEBUG, "/v1/models": logging.INFO}


def test_the_lines_can_be_switched_off(make_serving, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "tandem.requests")
    serving = make_serving(config=ServerConfig(disable_log_requests=True))
    with serving.listening():
        serving.complete([5], max_tokens=1)
    assert not [record for record in caplog.records if record.name == "tandem.requests"]


def test_http_metrics_count_routes_not_paths(watched: Serving) -> None:
    for path in ("/nowhere", "/also/nowhere", "/v1/models/tiny", "/v1/models/other"):
        watched.http.get(path)
    watched.http.request("BREW", "/health")
    text = watched.http.get("/metrics").text
    for labels, count in (
        ('handler="none",method="GET",status="4xx"', 2),
        ('handler="/v1/models/{model_id:path}",method="GET",status="2xx"', 1),
        ('handler="/v1/models/{model_id:path}",method="GET",status="4xx"', 1),
        ('handler="/health",method="other",status="4xx"', 1),
    ):
        assert f"http_requests_total{{{labels}}} {count}.0" in text
    assert 'http_request_duration_seconds_count{handler="none",method="GET"} 2.0' in text


def test_an_exception_is_counted_as_a_mistake_of_the_server(
    watched: Serving, exchanges: list[Exchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched.services.metrics, "render", lambda: 1 / 0)
    watched.http.get("/metrics")
    assert (exchanges[0].status, exchanges[0].route) == (500, "/metrics")


def test_what_is_no_http_passes_through(make_serving) -> None:
    sent: list[Any] = []

    async def talk() -> None:
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message["type"])

        config = ServerConfig(api_key=("k",))
        await make_serving(config=config).app({"type": "lifespan"}, receive, send)

    asyncio.run(talk())
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_a_line_is_not_made_where_nobody_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "tandem.requests")

    class Unread(Exchange):
        """Must not be asked."""

        def figures(self) -> dict[str, Any]:
            """Nobody wants them."""
            raise AssertionError

    log_exchange(Unread("id", "GET", None))  # type: ignore[arg-type]
