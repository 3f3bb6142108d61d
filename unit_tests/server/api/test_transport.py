"""Clients that go away, and errors in the middle of a stream: driven by raw ASGI messages."""

import asyncio
import json
from typing import Any

import pytest

from server.api.transport import ClientGone, read_body
from server.errors import EngineDead
from server.messages import Abort
from unit_tests.server.api.conftest import Serving
from unit_tests.server.fake_engine import BROKEN_ID, FOREVER_ID

DEADLINE_SECONDS = 60


class Connection:
    """One HTTP request by hand: `sent` is what the server answered, `leave` closes the connection."""

    def __init__(self, serving: Serving, **fields: Any):
        self._app = serving.app
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": json.dumps(fields).encode()})
        self.sent: list[dict[str, Any]] = []

    async def run(self) -> None:
        """Serve the request to its end."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await self._app(scope, self._inbox.get, self._keep)

    def leave(self) -> None:
        """What the server sees of a closed connection."""
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def _keep(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def text(self) -> str:
        """The body so far."""
        return b"".join(message.get("body", b"") for message in self.sent).decode()


async def _wait_for(condition: Any) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


def run_and_leave(serving: Serving, stream: bool) -> Connection:
    """Start an endless request, leave once it runs, and wait until the engine is idle."""

    async def talk() -> Connection:
        async with serving.delivering():
            connection = Connection(serving, prompt=[FOREVER_ID, 5], stream=stream)
            serving_it = asyncio.create_task(connection.run())
            await _wait_for(lambda: serving.client.stats.num_running == 1)
            connection.leave()
            await asyncio.wait_for(serving_it, DEADLINE_SECONDS)
            assert isinstance(serving.channel.sent[-1], Abort)
            await _wait_for(lambda: serving.client.stats.num_running == 0)
            return connection

    return asyncio.run(talk())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_is_aborted_in_the_engine(make_serving, stream: bool) -> None:
    serving = make_serving()
    run_and_leave(serving, stream)
    assert serving.client.num_in_flight == 0
    assert not serving.engine.has_work()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_before_the_first_token_is_aborted_too(make_serving, stream: bool) -> None:
    serving = make_serving()
    serving.channel.paused = True

    async def talk() -> None:
        async with serving.delivering():
            connection = Connection(serving, prompt=[FOREVER_ID, 5], stream=stream)
            serving_it = asyncio.create_task(connection.run())
            await _wait_for(lambda: serving.channel.sent)
            connection.leave()
            await asyncio.wait_for(serving_it, DEADLINE_SECONDS)
            assert isinstance(serving.channel.sent[-1], Abort)
            assert not any(message["type"] == "http.response.start" for message in connection.sent) or not stream

    asyncio.run(talk())


def test_other_streams_go_on_when_one_client_goes(make_serving) -> None:
    serving = make_serving()

    async def talk() -> str:
        async with serving.delivering():
            leaver = Connection(serving, prompt=[FOREVER_ID, 5], stream=True)
            stayer = Connection(serving, prompt=[10, 11, 12], stream=True, max_tokens=60)
            tasks = [asyncio.create_task(c.run()) for c in (leaver, stayer)]
            await _wait_for(lambda: serving.client.stats.num_running == 2)
            leaver.leave()
            await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_SECONDS)
            return stayer.text()

    text = asyncio.run(talk())
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    joined = "".join(event["choices"][0]["text"] for event in events)
    assert joined == serving.tokenizer.decode([10, 11, 12] * 20)
    assert text.endswith("data: [DONE]\n\n")


def test_a_failure_in_the_middle_of_a_stream_is_one_error_event(make_serving) -> None:
    serving = make_serving()

    async def talk() -> Connection:
        async with serving.delivering():
            connection = Connection(serving, prompt=[FOREVER_ID, 5], stream=True)
            serving_it = asyncio.create_task(connection.run())
            await _wait_for(lambda: len(connection.sent) > 2)
            serving.client.fail(EngineDead("gone"))
            await asyncio.wait_for(serving_it, DEADLINE_SECONDS)
            return connection

    connection = asyncio.run(talk())
    *_, error, done, end = connection.text().split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"] == {
        "message": "gone",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
    assert (done, end) == ("data: [DONE]", "")
    assert connection.sent[0]["status"] == 200
    assert connection.sent[-1]["more_body"] is False


def test_a_model_that_fails_in_the_middle_of_a_stream_is_one_error_event(serving: Serving) -> None:
    prompts = [[BROKEN_ID, 10], [FOREVER_ID]]
    text, error = (
        event
        for event in serving.events("/v1/completions", prompt=prompts, logprobs=0)
        if "error" in event or event["choices"][0]["index"] == 0
    )
    assert text["choices"][0]["finish_reason"] is None
    assert error["error"] == {
        "message": "the logits are not finite",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
    assert serving.client.num_in_flight == 0


def test_a_failure_before_the_first_token_is_a_plain_503(make_serving) -> None:
    serving = make_serving()
    serving.channel.paused = True

    async def talk() -> Connection:
        async with serving.delivering():
            connection = Connection(serving, prompt=[5], stream=True)
            serving_it = asyncio.create_task(connection.run())
            await _wait_for(lambda: serving.channel.sent)
            serving.client.fail(EngineDead("gone"))
            await asyncio.wait_for(serving_it, DEADLINE_SECONDS)
            return connection

    connection = asyncio.run(talk())
    assert connection.sent[0]["status"] == 503
    assert json.loads(connection.text())["error"]["message"] == "gone"


def test_a_body_that_stops_halfway_is_a_client_that_has_gone() -> None:
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    with pytest.raises(ClientGone):
        asyncio.run(read_body(receive, ""))
