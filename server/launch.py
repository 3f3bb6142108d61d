"""`python -m server`: start the engine process and HTTP, let requests in when the model is loaded, drain, stop.

Exit codes: 0 after SIGTERM or SIGINT, 1 when something went wrong, with one line on stderr that says what. The engine,
and torch with it, is imported in the child process only.
"""

import asyncio
import contextlib
import gc
import importlib.util
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from server import engine_process
from server.api.app import build_app
from server.api.engine_client import EngineClient
from server.api.no_tokenizer import NoTokenizer
from server.api.sampling import read_defaults
from server.api.services import Services, build_services
from server.api.throughput import log_throughput
from server.api.tracing import Tracing
from server.channel import AsyncEnd
from server.command_line import read_command_line
from server.config import EngineConfig, ServerConfig
from server.errors import CheckpointError, ConfigError, EngineDead, TandemError
from server.http_server import FLUSH_SECONDS, Entrance, HttpServer, describe_address, listening
from server.logs import log_fields, set_up_log
from server.messages import Fatal, Ready
from server.tokenizer import Tokenizer, read_template
from server.versions import read_version

# Time for the last message of an engine that has ended to arrive.
_LAST_WORDS_SECONDS = 0.5
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Requests make few cycles; a rare collection keeps pauses out of the streams.
_GC_THRESHOLD = 100_000

log = logging.getLogger("tandem")


def main(arguments: Sequence[str], engine: str = engine_process.ENGINE) -> int:
    """Serve until told to stop; returns the exit code. `engine` names the engine class as "module:class"."""
    try:
        command = read_command_line(arguments)
        set_up_log(command.server.log_level, command.server.log_format)
        check_kernels_package()
        if command.is_check:
            from server.check import check  # needs torch

            print(check(command.engine, command.server))
            return 0
        return asyncio.run(_start(command.engine, command.server, engine))
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
    name = directory.resolve().name
    with (
        _tracing(config, name) as tracing,
        listening(config) as listener,
        contextlib.closing(AsyncEnd()) as channel,
        _engine_running(engine_config, config, channel, engine) as running,
    ):
        entrance = Entrance()
        async with _http_running(HttpServer(entrance, config), listener) as serving:
            log.info("loading %s", directory)
            template = None if config.chat_template is None else read_template(config.chat_template)
            tokenizer = (
                NoTokenizer() if config.skip_tokenizer_init else await asyncio.to_thread(Tokenizer, directory, template)
            )
            defaults = read_defaults(directory, config.generation_config, config.override_generation_config or {})
            ready = await _wait_ready(channel, running, signals, serving)
            if ready is None:
                return 0
            client = EngineClient(channel, ready, config.max_queue)
            services = build_services(name, int(time.time()), tokenizer, client, defaults, config, engine_config)
            gc.freeze()
            gc.set_threshold(_GC_THRESHOLD)
            entrance.app = build_app(services, [tracing.record] if tracing is not None else [])
            _log_banner(services)
            warn_of_open_doors(config)
            log.info("ready: serving at %s", describe_address(listener, config))
            return await _serve(serving, client, running, signals, config)


@contextlib.asynccontextmanager
async def _http_running(http: HttpServer, listener: socket.socket) -> AsyncIterator["asyncio.Task[None]"]:
    """The task that serves HTTP, which ends on leaving. Raises ConfigError if it fails."""
    serving = asyncio.create_task(http.serve([listener]))
    try:
        yield serving
    finally:
        http.should_exit = True
        await asyncio.wait([serving])
    failure = serving.exception()
    if failure is not None:
        raise ConfigError(f"the HTTP server failed: {failure}") from failure


@contextlib.contextmanager
def _tracing(config: ServerConfig, name: str) -> Iterator[Tracing | None]:
    """What sends traces, if anything does; the last ones are sent on leaving."""
    if config.otlp_traces_endpoint is None:
        yield None
        return
    with contextlib.closing(Tracing(config.otlp_traces_endpoint, (config.served_model_name or (name,))[0])) as tracing:
        yield tracing


def _log_banner(services: Services) -> None:
    ready = services.client.ready
    figures = {
        "model": services.model_name,
        "dtype": ready.dtype,
        "device": ready.device,
        "context": ready.max_model_len,
        "requests": ready.max_running_requests,
        "kv_tokens": ready.num_pages * ready.page_size,
        "gdn_checkpoints": ready.num_checkpoints,
        "mtp_step": ready.mtp_step,
    }
    log_fields(log, logging.INFO, f"Tandem {read_version()}", figures)


def warn_of_open_doors(config: ServerConfig) -> None:
    """Say so in the log where anybody who reaches the server may change its weights."""
    is_near = config.uds is not None or config.host in _LOOPBACK
    if config.enable_rl and not (is_near or config.api_key or config.admin_api_key):
        log.warning(
            "--enable-rl on --host %s without a key: whoever reaches it can replace the weights; set --admin-api-key",
            config.host,
        )


async def _wait_ready(
    channel: AsyncEnd, engine: "_EngineProcess", signals: "_Signals", serving: "asyncio.Task[None]"
) -> Ready | None:
    """The engine's Ready, or None if a signal, or the end of HTTP, came first. Raises ConfigError if the engine
    fails."""
    receiving = asyncio.ensure_future(channel.receive())
    await _first(receiving, engine.died.wait(), signals.stop.wait(), serving)
    if engine.died.is_set():
        await asyncio.wait([receiving], timeout=_LAST_WORDS_SECONDS)
    if receiving.done():
        reply = receiving.result()
        if isinstance(reply, Fatal):
            raise ConfigError(reply.message)
        assert isinstance(reply, Ready)
        return reply
    receiving.cancel()
    if signals.stop.is_set() or serving.done():
        return None
    raise ConfigError(f"the engine process ended at start, {engine.describe_exit()}")


async def _serve(
    serving: "asyncio.Task[None]",
    client: EngineClient,
    engine: "_EngineProcess",
    signals: "_Signals",
    config: ServerConfig,
) -> int:
    """Serve until a signal, or the end of HTTP (returns 0), or until the engine has gone (returns 1)."""
    delivering = asyncio.create_task(client.run())
    reporting = asyncio.create_task(_report(client, config.log_interval))
    await _first(signals.stop.wait(), engine.died.wait(), delivering, serving)
    if signals.stop.is_set():
        await _drain(client, signals, engine, config.drain_timeout)
    if engine.died.is_set():
        await asyncio.wait([delivering], timeout=_LAST_WORDS_SECONDS)
    failed = engine.died.is_set() or delivering.done()
    client.fail(client.failure or EngineDead(f"the engine process has gone, {engine.describe_exit()}"))
    if failed:
        log.error("stopping: %s", client.failure)
    delivering.cancel()
    reporting.cancel()
    return 1 if failed else 0


async def _report(client: EngineClient, interval: float) -> None:
    if interval:
        await log_throughput(lambda: client.stats, interval)


async def _drain(client: EngineClient, signals: "_Signals", engine: "_EngineProcess", timeout_seconds: float) -> None:
    """Admit no more, and wait for the requests in flight; a second signal cuts the wait short."""
    log.info("draining %d requests for up to %g seconds", client.num_in_flight, timeout_seconds)
    client.refuse(EngineDead("the server is shutting down; send the request to another one"))
    timeout = asyncio.sleep(timeout_seconds)
    await _first(client.wait_idle(), engine.died.wait(), signals.hurry.wait(), timeout)
    if client.num_in_flight:
        log.warning("ending %d requests that did not finish in time (--drain-timeout)", client.num_in_flight)
    if client.stats.is_frozen and not engine.died.is_set():  # a pause is no failure
        client.end(client.find(lambda _: True))


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


@contextlib.contextmanager
def _engine_running(
    engine_config: EngineConfig, config: ServerConfig, channel: AsyncEnd, engine: str
) -> Iterator["_EngineProcess"]:
    """The engine process; ended on leaving, the hard way if it takes long, since by then nobody waits for it."""
    if config.log_format == "json":
        os.environ["TQDM_DISABLE"] = "1"  # progress bars are no JSON
    process = multiprocessing.get_context("spawn").Process(
        target=engine_process.run,
        args=(engine_config, channel.endpoint, config.log_level, engine, config.log_format),
        name="tandem-engine",
    )
    process.start()
    try:
        yield _EngineProcess(process)
    finally:
        process.terminate()
        process.join(FLUSH_SECONDS)
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
