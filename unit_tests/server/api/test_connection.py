"""Slow, greedy and hasty clients on real sockets, with a fake engine: bounded in time and memory, others are served."""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import h11
import psutil
import pytest

from server.api import connection
from server.api.connection import FrugalConnection
from server.config import ServerConfig
from server.http_server import HttpServer, listening
from server.messages import Abort
from unit_tests.server.api.conftest import Serving
from unit_tests.server.fake_engine import FOREVER_ID

DEADLINE_SECONDS = 60
PATIENCE = 0.25
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
MIB = 2**20


@dataclass
class Site:
    """A serving that listens on a port."""

    serving: Serving
    http: HttpServer
    port: int

    @property
    def num_connections(self) -> int:
        """Those that are open."""
        return len(self.http.server_state.connections)

    async def connect(self, receive_bytes: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection, with room for `receive_bytes` that nobody reads."""
        client = socket.socket()
        if receive_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
        return await asyncio.open_connection(sock=client, limit=1024)

    async def ask(self, request: bytes) -> bytes:
        """What comes back on a connection of its own, to the end."""
        reader, writer = await self.connect()
        writer.write(request)
        try:
            return await reader.read(-1)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def is_well(self) -> bool:
        """Whether a request is still answered."""
        return b" 200 OK" in await self.ask(post(prompt=[5], max_tokens=1, close=True))


@contextlib.asynccontextmanager
async def on_a_port(
    serving: Serving, config: ServerConfig, timeout: float | None = DEADLINE_SECONDS
) -> AsyncIterator[Site]:
    """`serving` behind real sockets."""
    with listening(config) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        http = HttpServer(serving.app, config)
        async with serving.delivering(), asyncio.timeout(timeout):
            task = asyncio.create_task(http.serve([listener]))
            while not http.started:
                await asyncio.sleep(0.001)
            port = 0 if config.uds is not None else listener.getsockname()[1]
            try:
                yield Site(serving, http, port)
            finally:
                http.should_exit = True
                await task


@pytest.fixture
def visit(make_serving) -> Callable[[Callable[[Site], Coroutine[Any, Any, None]]], Serving]:
    """Runs a visitor of an impatient server; gives what was served."""

    def run(visitor: Callable[[Site], Coroutine[Any, Any, None]], patience: float = PATIENCE) -> Serving:
        config = ServerConfig(port=0, client_timeout=patience, keep_alive_interval=0.05)
        serving = make_serving(config=config, max_requests=2000)

        async def talk() -> None:
            async with on_a_port(serving, config) as site:
                await visitor(site)

        asyncio.run(talk())
        return serving

    return run


def post(close: bool = False, **fields: Any) -> bytes:
    """A completion request."""
    body = json.dumps(fields).encode()
    return POST + b"Connection: close\r\n" * close + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def until(condition: Callable[[], object]) -> None:
    """Return when the condition holds."""
    while not condition():
        await asyncio.sleep(0.005)


async def drip(site: Site, start: bytes) -> bytes:
    """Send a byte now and then after `start`, until the server has enough: what it said."""
    reader, writer = await site.connect()
    writer.write(start)
    said = bytearray()

    async def listen() -> None:
        # Bytes that the server has not read make it end with a reset, which takes what was not read here.
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                said.extend(data)

    answer = asyncio.create_task(listen())
    while not answer.done():
        writer.write(b"x")
        await asyncio.wait([answer], timeout=PATIENCE / 20)
    writer.close()
    return bytes(said)


@pytest.mark.parametrize("start", [b"", b"GET / HT", GET + b"X-Slow: "], ids=["nothing", "line", "header"])
def test_a_head_that_drips_in_is_cut_off(visit, start: bytes) -> None:
    async def visitor(site: Site) -> None:
        assert await drip(site, start) == b""
        assert await site.is_well()

    visit(visitor)


def test_a_client_that_says_nothing_is_cut_off(visit) -> None:
    async def visitor(site: Site) -> None:
        reader, writer = await site.connect()
        assert await reader.read() == b""
        writer.close()

    visit(visitor)


def test_a_second_head_that_drips_in_is_cut_off_too(visit) -> None:
    async def visitor(site: Site) -> None:
        assert (await drip(site, GET + b"\r\nGET /heal")).count(b" 200 OK") == 1

    visit(visitor)


def test_a_body_that_does_not_come_is_answered_408_and_cut_off(visit) -> None:
    async def visitor(site: Site) -> None:
        reader, writer = await site.connect()
        writer.write(POST + b"Content-Length: 1000\r\n\r\n{")
        head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
        writer.close()
        assert b" 408 " in head and b"connection: close" in head.lower()
        assert json.loads(body)["error"]["message"].endswith("within 0.25 seconds (--client-timeout)")
        assert await site.is_well()

    serving = visit(visitor)
    assert len(serving.channel.sent) == 1


def test_a_body_that_nobody_asked_for_may_not_drip_for_ever(visit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_GRACE_SECONDS", 0.1)

    async def visitor(site: Site) -> None:
        await drip(site, GET + b"Content-Length: 1000\r\n\r\n{")  # returns when it is cut off
        await until(lambda: site.num_connections == 0)
        assert await site.is_well()

    visit(visitor)


def test_a_client_that_does_not_read_its_stream_is_cut_off_and_its_request_aborted(visit) -> None:
    async def visitor(site: Site) -> None:
        _, writer = await site.connect(receive_bytes=4096)
        writer.write(post(prompt=[FOREVER_ID, 5], stream=True))
        await until(lambda: any(isinstance(message, Abort) for message in site.serving.channel.sent))
        await until(lambda: site.num_connections == 0)
        assert site.serving.client.num_in_flight == 0
        writer.close()

    visit(visitor)


def test_a_client_that_does_not_read_its_answer_is_cut_off(visit) -> None:
    """Answers to requests in a row that are never read; each is smaller than what makes a connection stop writing."""

    async def visitor(site: Site) -> None:
        _, writer = await site.connect(receive_bytes=4096)
        request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        writer.write(request * 50)
        await until(lambda: site.num_connections == 1)
        await until(lambda: site.num_connections == 0)
        writer.close()
        assert await site.is_well()

    visit(visitor)


def test_a_client_that_reads_slowly_but_reads_is_served_to_the_end(visit) -> None:
    async def visitor(site: Site) -> None:
        reader, writer = await site.connect(receive_bytes=4096)
        writer.write(post(prompt=[5, 6], max_tokens=200, stream=True, close=True))
        answer = b""
        start = asyncio.get_running_loop().time()
        while chunk := await reader.read(512):
            answer += chunk
            await asyncio.sleep(0.005)
        assert answer.rstrip(b"0\r\n").endswith(b"data: [DONE]")
        assert b'"error"' not in answer
        assert asyncio.get_running_loop().time() - start > PATIENCE / 2
        writer.close()

    visit(visitor)


def test_a_stream_may_take_longer_than_the_patience_with_clients(visit) -> None:
    async def visitor(site: Site) -> None:
        site.serving.channel.paused = True
        reader, writer = await site.connect()
        writer.write(post(prompt=[5, 6], max_tokens=20, stream=True, close=True))
        await asyncio.sleep(3 * PATIENCE)
        site.serving.channel.paused = False
        answer = await reader.read(-1)
        assert answer.count(b": keep-alive") >= 3
        assert answer.rstrip(b"0\r\n").endswith(b"data: [DONE]")
        writer.close()

    visit(visitor)


@pytest.mark.parametrize(
    "request_bytes",
    [
        GET + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        GET + b"".join(b"X-%d: y\r\n" % index for index in range(20_000)) + b"\r\n",
        b"GET /" + b"y" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",
        b"\r\n\x00\xff garbage\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        POST + b"Content-Length: -5\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["long", "many", "path", "tls", "garbage", "no host", "negative", "two lengths", "chunk"],
)
def test_what_is_not_http_or_has_too_much_of_a_head_is_a_400_of_ours(visit, request_bytes: bytes) -> None:
    async def visitor(site: Site) -> None:
        answer = await site.ask(request_bytes)
        if answer:  # else the client was still sending when the answer came
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b" 400 " in head
            assert json.loads(body)["error"]["type"] == "BadRequestError"
        await until(lambda: site.num_connections == 0)
        assert await site.is_well()

    visit(visitor)


@pytest.mark.parametrize("route", [b"/v1/completions", b"/nowhere"], ids=["while it is read", "after the answer"])
def test_a_body_in_tiny_chunks_is_cut_off_before_it_keeps_others_waiting(visit, route: bytes) -> None:
    async def visitor(site: Site) -> None:
        head = b"POST " + route + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        reader, writer = await site.connect()
        answer = asyncio.create_task(reader.read(-1))
        writer.write(head)
        await until(lambda: site.num_connections == 1)
        writer.write(b"1\r\n \r\n" * 200_000)
        await asyncio.wait([answer])
        writer.close()
        await until(lambda: site.num_connections == 0)
        assert await site.is_well()
        if answer.exception() is None and route == b"/v1/completions" and answer.result():
            assert b"more than 4096 chunks of less than 256 bytes" in answer.result()

    visit(visitor, patience=2 * DEADLINE_SECONDS)


def test_a_body_in_a_few_tiny_chunks_and_many_large_ones_is_read(visit) -> None:
    async def visitor(site: Site) -> None:
        body = b'{"prompt": [5], "max_tokens": 1, "stop": null}'
        tiny = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
        large = (b"100\r\n" + b" " * 256 + b"\r\n") * 5000
        head = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert b" 200 OK" in await site.ask(head + large + tiny + b"0\r\n\r\n")

    visit(visitor, patience=10.0)


@pytest.mark.parametrize("method", [b"POST", b"GET"])
def test_garbage_behind_an_answer_ends_the_connection_without_a_word(visit, caplog, method: bytes) -> None:
    async def visitor(site: Site) -> None:
        reader, writer = await site.connect()
        writer.write(method + b" /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b" 404 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"zz\r\n")
        assert b"400" not in (await reader.read(-1)).replace(b'"code":404', b"")
        writer.close()

    visit(visitor)
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_a_thousand_who_come_and_go_leave_nothing_behind(visit) -> None:
    async def visitor(site: Site) -> None:
        assert await site.is_well()
        process = psutil.Process()
        before, loop = process.memory_info().rss, asyncio.get_running_loop()
        start = loop.time()

        async def come_and_go(index: int) -> None:
            _, writer = await site.connect()
            if index % 2:
                writer.write(GET if index % 4 == 1 else post(prompt=[FOREVER_ID, 5], stream=True))
            writer.transport.abort()

        for first in range(0, 1000, 100):
            await asyncio.gather(*(come_and_go(first + index) for index in range(100)))
        await until(lambda: site.num_connections == 0 and site.serving.client.num_in_flight == 0)
        assert loop.time() - start < 20
        assert await site.is_well()
        assert process.memory_info().rss - before < 64 * MIB

    serving = visit(visitor)
    assert not serving.engine.has_work()


def test_a_hundred_megabytes_are_refused_in_bounded_memory(visit) -> None:
    async def visitor(site: Site) -> None:
        before = psutil.Process().memory_info().rss
        reader, writer = await site.connect()
        answer = asyncio.create_task(reader.read(-1))
        writer.write(POST + b"Content-Length: %d\r\n\r\n" % (100 * MIB))
        for _ in range(100):
            if answer.done() or writer.is_closing():
                break
            writer.write(bytes(MIB))
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            assert psutil.Process().memory_info().rss - before < 64 * MIB
        writer.close()
        await asyncio.wait([answer])
        if answer.exception() is None and answer.result():
            assert b" 400 " in answer.result()
        assert await site.is_well()

    visit(visitor, patience=10.0)


def test_requests_in_one_packet_are_answered_in_turn(visit) -> None:
    async def visitor(site: Site) -> None:
        answers = await site.ask(
            post(prompt=[5], max_tokens=1) + GET + b"\r\n" + post(prompt=[6], max_tokens=1, close=True)
        )
        assert answers.count(b"HTTP/1.1 200 OK") == 3

    visit(visitor)


@pytest.mark.parametrize("ahead", [b"\r\n", GET + b"\r\n"], ids=["line", "request"])
def test_a_client_that_has_sent_ahead_and_goes_is_noticed(visit, ahead: bytes) -> None:
    async def visitor(site: Site) -> None:
        _, writer = await site.connect()
        writer.write(post(prompt=[FOREVER_ID, 5]))
        await until(lambda: site.serving.client.stats.num_running == 1)
        writer.write(ahead)
        writer.close()
        await until(lambda: any(isinstance(message, Abort) for message in site.serving.channel.sent))
        await until(lambda: site.num_connections == 0)

    visit(visitor)


def test_what_is_sent_ahead_takes_bounded_memory_and_is_answered_in_turn(visit) -> None:
    async def visitor(site: Site) -> None:
        reader, writer = await site.connect()
        writer.write(post(prompt=[FOREVER_ID, 5]))
        await until(lambda: site.serving.client.stats.num_running == 1)
        (protocol,) = site.http.server_state.connections
        writer.write(post(prompt=[6], max_tokens=1, close=True, user="x" * MIB))
        await until(lambda: protocol.flow.read_paused)
        assert len(protocol.conn.trailing_data[0]) < MIB // 2
        assert b'"num_aborted":1' in await site.ask(
            b"POST /abort_request HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 19\r\n\r\n"
            b'{"abort_all": true}'
        )
        assert (await reader.read(-1)).count(b"HTTP/1.1 200 OK") == 2
        writer.close()

    visit(visitor, patience=DEADLINE_SECONDS)


def test_an_upgrade_is_passed_over_and_is_nothing_for_the_log(visit, caplog: pytest.LogCaptureFixture) -> None:
    async def visitor(site: Site) -> None:
        answer = await site.ask(GET + b"Connection: upgrade, close\r\nUpgrade: websocket\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ")

    visit(visitor)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def talk(method: str, headers: list[tuple[str, str]], *rest: h11.Event) -> list[bytes | None]:
    """What is written for the events of an answer, one after the other."""
    frugal = FrugalConnection(h11.SERVER)
    frugal.receive_data(f"{method} / HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    frugal.next_event()
    return [frugal.send(event) for event in (h11.Response(status_code=200, headers=headers), *rest, h11.EndOfMessage())]


def test_the_head_of_an_answer_waits_for_its_body_but_that_of_a_stream_goes_ahead() -> None:
    head = b"HTTP/1.1 200 \r\ncontent-length: 2\r\n\r\n"
    body = h11.Data(data=b"ok")
    assert talk("GET", [("content-length", "2")], body) == [b"", head + b"ok", b""]
    assert talk("HEAD", [("content-length", "2")]) == [b"", head]
    started, chunk, end = talk("GET", [("content-type", "text/event-stream")], body)
    assert started is not None and started.startswith(b"HTTP/1.1 200 ")
    assert (chunk, end) == (b"2\r\nok\r\n", b"0\r\n\r\n")
