"""`python -m server`: start the engine process, wait until it is ready, serve HTTP, drain, stop.

Exit codes: 0 after SIGTERM or SIGINT, 1 when something went wrong, with one line on stderr that says what. The engine,
and torch with it, is imported in the child process only.
"""

import asyncio
import contextlib
import gc
import importlib.util
import logging
import multiprocessing
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import uvicorn

from server import engine_process
from server.api.app import build_app
from server.api.engine_client import EngineClient
from server.api.sampling import read_generation_config
from server.api.services import build_services
from server.channel import AsyncEnd
from server.command_line import read_command_line
from server.config import EngineConfig, ServerConfig
from server.errors import CheckpointError, ConfigError, EngineDead, TandemError
from server.messages import Fatal, Ready
from server.tokenizer import Tokenizer

# Time for answers that are already written to reach their clients.
_FLUSH_SECONDS = 3
# Time for the last message of an engine that has ended to arrive.
_LAST_WORDS_SECONDS = 0.5
# Requests make few cycles; a rare collection keeps pauses out of the streams.
_GC_THRESHOLD = 100_000

log = logging.getLogger("tandem")


def main(arguments: Sequence[str], engine: str = engine_process.ENGINE) -> int:
    """Serve until told to stop; returns the exit code. `engine` names the engine class as "module:class"."""
    try:
        engine_config, server_config = read_command_line(arguments)
        _set_up_log(server_config.log_level)
        check_kernels_package()
        return asyncio.run(_start(engine_config, server_config, engine))
    except TandemError as error:
        print(f"tandem: error: {error.message}", file=sys.stderr, flush=True)
        return 1


def check_kernels_package() -> None:
    """Raise ConfigError if another package named `kernels` (PyPI has one) hides Tandem's."""
    own = Path(__file__).resolve().parent.parent / "kernels"
    spec = importlib.util.find_spec("kernels")
    found = [Path(path).resolve() for path in (spec and spec.submodule_search_locations) or ()]
    if found[:1] != [own]:
        raise ConfigError(
            f"the package `kernels` is {found[0] if found else 'missing'}, Tandem's is {own}; uninstall the other one "
            f"(pip uninstall kernels), or start from {own.parent}"
        )


async def _start(engine_config: EngineConfig, config: ServerConfig, engine: str) -> int:
    signals = _Signals()
    directory = Path(engine_config.model)
    if not directory.is_dir():
        raise CheckpointError(f"--model {directory} is not a directory; give a downloaded Hugging Face checkpoint")
    with (
        _bind(config) as listener,
        contextlib.closing(AsyncEnd()) as channel,
        _engine_running(engine_config, config, channel, engine) as running,
    ):
        log.info("loading %s", directory)
        tokenizer = await asyncio.to_thread(Tokenizer, directory)
        defaults = read_generation_config(directory)
        ready = await _wait_ready(channel, running, signals)
        if ready is None:
            return 0
        client = EngineClient(channel, ready, config.max_queue)
        name = config.served_model_name or directory.resolve().name
        services = build_services(name, int(time.time()), tokenizer, client, defaults)
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD)
        settings = uvicorn.Config(
            build_app(services), log_config=None, lifespan="off", timeout_graceful_shutdown=_FLUSH_SECONDS
        )
        return await _serve(_HttpServer(settings), listener, client, running, signals, config.drain_timeout)


async def _wait_ready(channel: AsyncEnd, engine: "_EngineProcess", signals: "_Signals") -> Ready | None:
    """The engine's Ready, or None if a signal came first. Raises ConfigError if the engine fails."""
    receiving = asyncio.ensure_future(channel.receive())
    await _first(receiving, engine.died.wait(), signals.stop.wait())
    if engine.died.is_set():
        await asyncio.wait([receiving], timeout=_LAST_WORDS_SECONDS)
    if receiving.done():
        reply = receiving.result()
        if isinstance(reply, Fatal):
            raise ConfigError(reply.message)
        assert isinstance(reply, Ready)
        return reply
    receiving.cancel()
    if signals.stop.is_set():
        return None
    raise ConfigError(f"the engine process ended at start, {engine.describe_exit()}")


async def _serve(
    http: "_HttpServer",
    listener: socket.socket,
    client: EngineClient,
    engine: "_EngineProcess",
    signals: "_Signals",
    drain_timeout: float,
) -> int:
    """Serve until a signal (returns 0) or until the engine has gone (returns 1). Raises ConfigError if HTTP fails."""
    serving = asyncio.create_task(http.serve([listener]))
    delivering = asyncio.create_task(client.run())
    await _first(signals.stop.wait(), engine.died.wait(), delivering, serving)
    if signals.stop.is_set():
        await _drain(client, signals, engine, drain_timeout)
    if engine.died.is_set():
        await asyncio.wait([delivering], timeout=_LAST_WORDS_SECONDS)
    failed = engine.died.is_set() or delivering.done()
    client.fail(client.failure or EngineDead(f"the engine process has gone, {engine.describe_exit()}"))
    if failed:
        log.error("stopping: %s", client.failure)
    http.should_exit = True
    await asyncio.wait([serving])
    delivering.cancel()
    failure = serving.exception()
    if failure is not None:
        raise ConfigError(f"the HTTP server failed: {failure}") from failure
    return 1 if failed else 0


async def _drain(client: EngineClient, signals: "_Signals", engine: "_EngineProcess", timeout_seconds: float) -> None:
    """Admit no more, and wait for the requests in flight; a second signal cuts the wait short."""
    log.info("draining %d requests for up to %g seconds", client.num_in_flight, timeout_seconds)
    client.refuse(EngineDead("the server is shutting down; send the request to another one"))
    timeout = asyncio.sleep(timeout_seconds)
    await _first(client.wait_idle(), engine.died.wait(), signals.hurry.wait(), timeout)
    if client.num_in_flight:
        log.warning("ending %d requests that did not finish in time (--drain-timeout)", client.num_in_flight)


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers (what a signal means is decided here), that says when it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then log the address."""
        await super().startup(sockets)
        for listener in sockets or ():
            log.info("ready: serving at http://%s:%d", *listener.getsockname()[:2])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


class _Signals:
    """SIGTERM and SIGINT as events: `stop` on the first, `hurry` on the second."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._receive)

    def _receive(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()


def _set_up_log(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)


def _bind(config: ServerConfig) -> socket.socket:
    """A socket that listens, so that nobody else can take the port while the model loads. Raises ConfigError.

    Clients that come early wait until the server is ready.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen()  # a second server can bind the port too, but not listen on it
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on --host {config.host} --port {config.port}: {error.strerror}") from error
    return listener


@contextlib.contextmanager
def _engine_running(
    engine_config: EngineConfig, config: ServerConfig, channel: AsyncEnd, engine: str
) -> Iterator["_EngineProcess"]:
    """The engine process; ended on leaving, the hard way if it takes long, since by then nobody waits for it."""
    process = multiprocessing.get_context("spawn").Process(
        target=engine_process.run,
        args=(engine_config, channel.endpoint, config.log_level, engine),
        name="tandem-engine",
    )
    process.start()
    try:
        yield _EngineProcess(process)
    finally:
        process.terminate()
        process.join(_FLUSH_SECONDS)
        process.kill()
        process.join()


class _EngineProcess:
    """The engine process as seen from the event loop: `died` is set when it ends."""

    def __init__(self, process: BaseProcess):
        self.died = asyncio.Event()
        self._process = process
        asyncio.get_running_loop().add_reader(process.sentinel, self._notice_death)

    def describe_exit(self) -> str:
        """How the process ended, for a log line."""
        self._process.join(_LAST_WORDS_SECONDS)
        code = self._process.exitcode
        if code is None or code >= 0:
            return f"exit code {code}"
        return f"killed by {signal.Signals(-code).name}{' (out of memory?)' if code == -signal.SIGKILL else ''}"

    def _notice_death(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self.died.set()


async def _first(*waits: Awaitable[object]) -> None:
    """Return when one of `waits` is done; tasks among them go on, the others are cancelled."""
    given = {wait for wait in waits if isinstance(wait, asyncio.Future)}
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task not in given:
            task.cancel()
