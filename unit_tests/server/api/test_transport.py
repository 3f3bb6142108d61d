"""Clients that go away or are slow, and errors in the middle of a stream: driven by raw ASGI messages."""

import asyncio
import json
import selectors
from typing import Any

import pytest

from server.api.transport import MAX_BODY_BYTES, MAX_HELD_BYTES, BodyReader, ClientGone, EventStream
from server.errors import EngineDead, InvalidRequest, QueueFull, RequestTimeout
from server.messages import Abort
from unit_tests.server.api.conftest import Serving
from unit_tests.server.fake_engine import BROKEN_ID, FOREVER_ID

DEADLINE_SECONDS = 60


class Connection:
    """One HTTP request by hand: `sent` is what the server answered, `leave` closes the connection."""

    def __init__(self, serving: Serving, path: str = "/v1/completions", **fields: Any):
        self._app, self._path = serving.app, path
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": json.dumps(fields).encode()})
        self.sent: list[dict[str, Any]] = []

    async def run(self) -> None:
        """Serve the request to its end."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": self._path,
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


def body_of(*chunks: bytes, ends: bool = True, then: Any = None) -> Any:
    """A `receive` that gives a body in pieces; then `then`, or nothing more, for ever."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if ends:
        messages.append({"type": "http.request", "body": b"", "more_body": False})
    messages += [then] if then else []

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.Event().wait()

    return receive


async def read(reader: BodyReader, receive: Any, content_type: str = "application/json") -> bytes:
    async with reader.hold(receive, content_type) as body:
        return body


def test_a_body_that_stops_halfway_is_a_client_that_has_gone() -> None:
    receive = body_of(b"{", ends=False, then={"type": "http.disconnect"})
    with pytest.raises(ClientGone):
        asyncio.run(read(BodyReader(DEADLINE_SECONDS), receive))


def test_a_body_in_pieces_is_one_body() -> None:
    reader = BodyReader(DEADLINE_SECONDS)
    assert asyncio.run(read(reader, body_of(b'{"a"', b"", b": 1}"))) == b'{"a": 1}'
    assert reader.num_held == 0


class Chunk(bytes):
    """A part of a body whose end is seen."""

    num_alive = 0

    def __init__(self, _: bytes):
        Chunk.num_alive += 1

    def __del__(self) -> None:
        Chunk.num_alive -= 1


def test_a_body_is_not_held_in_pieces_too() -> None:
    async def hold_on() -> tuple[bytes, int, int]:
        reader = BodyReader(DEADLINE_SECONDS)
        async with reader.hold(body_of(Chunk(b"{"), Chunk(b"}")), "") as body:
            return body, Chunk.num_alive, reader.num_held

    assert asyncio.run(hold_on()) == (b"{}", 0, 2)


def test_a_body_that_never_ends_is_refused_in_time() -> None:
    reader = BodyReader(0.01)
    with pytest.raises(RequestTimeout, match=r"did not arrive within 0\.01 seconds \(--client-timeout\)"):
        asyncio.run(read(reader, body_of(b"{", ends=False)))
    assert reader.num_held == 0


def test_the_deadline_is_for_the_body_alone() -> None:
    async def hold_on() -> None:
        async with BodyReader(0.001).hold(body_of(b"{}"), ""):
            raise TimeoutError("of somebody else")

    with pytest.raises(TimeoutError, match="of somebody else"):
        asyncio.run(hold_on())


def test_a_body_over_the_limit_is_thrown_away_while_it_comes() -> None:
    reader, piece = BodyReader(DEADLINE_SECONDS), bytes(MAX_BODY_BYTES // 4)
    with pytest.raises(InvalidRequest, match=f"the limit is {MAX_BODY_BYTES}"):
        asyncio.run(read(reader, body_of(*[piece] * 5)))
    endless = body_of(*[piece] * 1000, ends=False)
    with pytest.raises(InvalidRequest, match=f"the limit is {MAX_BODY_BYTES}"):
        asyncio.run(read(reader, endless))
    assert reader.num_held == 0


def test_a_reader_may_take_larger_bodies() -> None:
    reader = BodyReader(DEADLINE_SECONDS, 2 * MAX_BODY_BYTES, 2 * MAX_BODY_BYTES)
    assert len(asyncio.run(read(reader, body_of(*[bytes(MAX_BODY_BYTES)] * 2)))) == 2 * MAX_BODY_BYTES
    with pytest.raises(InvalidRequest, match=f"the limit is {2 * MAX_BODY_BYTES}"):
        asyncio.run(read(reader, body_of(*[bytes(MAX_BODY_BYTES)] * 3)))


def test_the_bodies_of_many_slow_clients_take_bounded_memory() -> None:
    """Full bodies that stand waiting: one more than there is room for is refused, and room comes back."""
    num_fitting = MAX_HELD_BYTES // MAX_BODY_BYTES
    body = bytes(MAX_BODY_BYTES)

    async def talk() -> None:
        reader = BodyReader(DEADLINE_SECONDS)
        waiting = [asyncio.create_task(read(reader, body_of(body, ends=False))) for _ in range(num_fitting)]
        await _wait_for(lambda: reader.num_held == MAX_HELD_BYTES)
        with pytest.raises(QueueFull, match=f"more than {MAX_HELD_BYTES} bytes"):
            await read(reader, body_of(b"{}"))
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        assert await read(reader, body_of(b"{}")) == b"{}"
        for task in waiting[1:]:
            task.cancel()
        await asyncio.wait(waiting)
        assert reader.num_held == 0

    asyncio.run(talk())


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data; boundary=x", "application/jsonp", "\xff"])
def test_another_content_type_is_named(content_type: str) -> None:
    with pytest.raises(InvalidRequest, match=r"Content-Type is .*, it must be application/json"):
        asyncio.run(read(BodyReader(DEADLINE_SECONDS), body_of(b"{}"), content_type))


class Stream:
    """An event stream by hand: events are let go one by one, `sent` is what the client got, bodies at `sent_at`."""

    def __init__(self, interval: float):
        self.events: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        self.sent: list[Any] = []
        self.sent_at: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._response = EventStream(self._take(), interval)

    async def _take(self) -> Any:
        while event := await self.events.get():
            if isinstance(event, Exception):
                raise event
            yield event

    async def run(self) -> None:
        """Serve to the end of the events."""
        await self._response({"type": "http", "path": "/"}, asyncio.Event().wait, self._send)

    async def _send(self, message: Any) -> None:
        await self.gate.wait()
        self.sent.append(message)
        self.sent_at += [asyncio.get_running_loop().time()] * ("body" in message)

    def bodies(self) -> list[bytes]:
        """What was sent behind the head."""
        return [message["body"] for message in self.sent if "body" in message]


def test_a_silent_stream_begins_and_goes_on_with_comments() -> None:
    async def talk() -> Stream:
        stream = Stream(interval=0.005)
        task = asyncio.create_task(stream.run())
        await _wait_for(lambda: stream.bodies().count(b": keep-alive\n\n") == 2)
        stream.events.put_nowait(b"data: 1\n\n")
        stream.events.put_nowait(b"")
        await task
        return stream

    stream = asyncio.run(talk())
    assert [message["type"] for message in stream.sent].count("http.response.start") == 1
    assert stream.sent[0]["status"] == 200
    assert stream.bodies()[-2:] == [b"data: 1\n\n", b"data: [DONE]\n\n"]


class JumpingSelector(selectors.DefaultSelector):
    """Never waits: `seconds` counts what others would have waited."""

    seconds = 0.0

    def select(self, timeout: float | None = None) -> Any:
        """What is ready now."""
        self.seconds += timeout or 0.0
        return super().select(0)


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes as soon as there is nothing to do."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds since it was made."""
        return self._jumping.seconds


def test_a_comment_comes_an_interval_after_the_last_event() -> None:
    async def talk() -> Stream:
        stream = Stream(interval=10)
        task = asyncio.create_task(stream.run())
        for pause in (1, 3, 23):
            await asyncio.sleep(pause)
            stream.events.put_nowait(b"data: 1\n\n")
        stream.events.put_nowait(b"")
        await task
        return stream

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        stream = runner.run(talk())
    assert stream.sent_at == pytest.approx([1, 4, 14, 24, 27, 27])
    assert stream.bodies()[2:4] == [b": keep-alive\n\n"] * 2


def test_a_stream_that_talks_needs_no_comments() -> None:
    async def talk() -> Stream:
        stream = Stream(interval=0.2)
        task = asyncio.create_task(stream.run())
        loop, events = asyncio.get_running_loop(), 0
        end = loop.time() + 0.5
        while loop.time() < end:
            stream.events.put_nowait(b"data: x\n\n")
            events += 1
            await _wait_for(lambda: stream.bodies().count(b"data: x\n\n") == events)  # noqa: B023
        stream.events.put_nowait(b"")
        await task
        return stream

    assert b": keep-alive\n\n" not in asyncio.run(talk()).bodies()


def test_no_comments_pile_up_before_a_client_that_does_not_read() -> None:
    async def talk() -> Stream:
        stream = Stream(interval=0.001)
        stream.gate.clear()
        task = asyncio.create_task(stream.run())
        stream.events.put_nowait(b"data: 1\n\n")
        for _ in range(20):
            await asyncio.sleep(0.002)
        stream.events.put_nowait(b"")
        stream.gate.set()
        await task
        return stream

    bodies = asyncio.run(talk()).bodies()
    assert bodies[0] == b"data: 1\n\n" and bodies.count(b": keep-alive\n\n") <= 1


def test_an_error_after_a_comment_is_an_event_and_before_it_an_answer() -> None:
    async def talk(waits: bool) -> Stream:
        stream = Stream(interval=0.002 if waits else DEADLINE_SECONDS)
        task = asyncio.create_task(stream.run())
        if waits:
            await _wait_for(stream.bodies)
        stream.events.put_nowait(RequestTimeout("late"))
        await task
        return stream

    late, early = asyncio.run(talk(waits=True)), asyncio.run(talk(waits=False))
    assert late.sent[0]["status"] == 200
    assert b'"late"' in late.bodies()[-2] and late.bodies()[-1] == b"data: [DONE]\n\n"
    assert early.sent[0]["status"] == 408
    assert (b"connection", b"close") in early.sent[0]["headers"]
