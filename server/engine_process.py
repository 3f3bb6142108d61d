"""The engine process: receive messages, step, reply; and the one process boundary.

Here alone is every exception caught: it is logged, told to the api, and ends the process, so that no request waits for
an engine that has gone. Imports the engine, and with it torch, inside the process only.
"""

import gc
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import tqdm

from server.channel import SyncEnd
from server.config import ENGINE_ENVIRONMENT, EngineConfig
from server.control import Control, Done
from server.errors import InvalidRequest, TandemError
from server.logs import set_up_log
from server.messages import Abort, EngineStats, Failed, Fatal, Generate, Ready, Request, StepReport, TokenOutput

ENGINE = "server.engine:Engine"
# How long an idle engine sleeps before it looks whether its parent still lives.
_IDLE_SECONDS = 0.5
# Tokens that nobody reads before the last one are kept back for so long: telling each costs both processes more than a
# small model's step. If their client ends the request meanwhile, they are lost.
KEEP_SECONDS = 0.1

log = logging.getLogger("tandem.engine")


class Engine(Protocol):
    """What this loop needs of an engine: `server.engine.Engine`, or a fake in the tests."""

    @property
    def ready(self) -> Ready:
        """The limits the api must know."""

    def add(self, request: Generate) -> None:
        """Queue a request. Raises InvalidRequest."""

    def abort(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""

    def control(self, command: Control) -> None:
        """Take a command."""

    def take_done(self) -> list[Done]:
        """What became of commands since the last call."""

    @property
    def is_changing(self) -> bool:
        """Whether what was emitted must be told before the next step."""

    @property
    def patience(self) -> float:
        """Seconds after which there may be work that no message has brought."""

    def has_work(self) -> bool:
        """Whether `step` has something to do."""

    def step(self) -> list[TokenOutput | Failed]:
        """Advance the running requests; what has come of it, here and of steps before."""

    def tell(self) -> list[TokenOutput]:
        """What the steps have kept back, of requests that are told whole."""

    def stats(self) -> EngineStats:
        """Gauges and counters."""


def run(
    config: EngineConfig, endpoint: str, log_level: str = "info", engine: str = ENGINE, log_format: str = "text"
) -> None:
    """Serve `engine` ("module:class") at `endpoint` until SIGTERM or until the parent process has gone.

    Exits with code 1 on any failure.
    """
    _take_signals(_exit)
    # The lock that tqdm would make is a semaphore of the system, which outlives a killed process.
    tqdm.tqdm.set_lock(threading.RLock())
    set_up_log(log_level, log_format)
    for name, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # read when torch is loaded, which happens below
    channel = SyncEnd(endpoint)
    try:
        loaded = _load(engine, config)
        gc.collect()
        gc.set_threshold(20_000)  # outputs are many small objects, hardly any of them in cycles
        gc.freeze()  # what is loaded lives as long as the process: no collection need look at it again
        serve(loaded, channel)
    except TandemError as error:
        channel.send(Fatal(error.message))
        sys.exit(1)
    except Exception as error:
        log.exception("the engine failed")
        channel.send(Fatal(f"{type(error).__name__}: {error}"))
        sys.exit(1)
    finally:
        _take_signals(signal.SIG_IGN)  # it is ending already
        channel.close()


def serve(engine: Engine, channel: SyncEnd) -> None:
    """Say Ready, then answer until the parent process has gone."""
    channel.send(engine.ready)
    told_at = time.monotonic()
    while _parent_lives():
        requests = channel.receive(0.0 if engine.has_work() else min(engine.patience, _IDLE_SECONDS))
        now = time.monotonic()
        is_due = now - told_at >= KEEP_SECONDS
        report = take_turn(engine, requests, is_due)
        told_at = now if is_due else told_at
        if report is not None:
            channel.send(report)


def take_turn(engine: Engine, requests: Sequence[Request], is_due: bool = False) -> StepReport | None:
    """Hand the requests over, step once if there is work; None when there is nothing to tell.

    Aborts alone give a report too: the gauges in it have changed. So does the last step for now, and any for which one
    `is_due`, which is soon enough for requests that have come while there is work; these tell what was kept back.
    All outputs of a report were made by the weights that its gauges name.
    """
    failed = [failure for request in requests if (failure := _hand_over(engine, request)) is not None]
    works = engine.has_work()
    news = engine.step() if works else []
    is_last = not engine.has_work()
    if is_due or is_last or engine.is_changing:
        news += engine.tell()
    outputs = [one for one in news if isinstance(one, TokenOutput)]
    failed += [one for one in news if isinstance(one, Failed)]
    done = engine.take_done()
    tells_gauges = is_due or is_last if works else len(requests) > 0
    tells_gauges |= any(not isinstance(request, Generate) for request in requests)
    is_said = tells_gauges or outputs or failed or done
    return StepReport(outputs, failed, engine.stats(), done) if is_said else None


def _hand_over(engine: Engine, request: Request) -> Failed | None:
    match request:
        case Generate():
            try:
                engine.add(request)
            except InvalidRequest as error:
                return Failed(request.request_id, type(error).__name__, error.message, error.param)
        case Abort():
            engine.abort(request.request_id)
        case _:
            engine.control(request)
    return None


def _load(engine: str, config: EngineConfig) -> Engine:
    module, _, name = engine.partition(":")
    return getattr(importlib.import_module(module), name)(config)


def _take_signals(on_terminate: Callable[[int, object], NoReturn] | signal.Handlers) -> None:
    """Ctrl-C and signals to the server's process group are for the server, which drains and then ends this process."""
    if multiprocessing.parent_process() is None:
        return
    if os.getsid(0) != os.getpid():
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_terminate)


def _exit(_signal: int, _frame: object) -> NoReturn:
    sys.exit(0)


def _parent_lives() -> bool:
    parent = multiprocessing.parent_process()
    return parent is None or parent.pid == os.getppid()  # is_alive() takes ten times as long
