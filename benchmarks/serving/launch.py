"""Starts servers for a benchmark, Tandem's or others, one after another, and ends them.

One at a time, because a server measures the costs of its own steps while it starts; what has started waits and takes no
time of the cores. Each has its own session: Ctrl-C reaches the benchmark alone, which then ends them.
"""

import contextlib
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from benchmarks.openai_server import RunFailed, Server, one_line

HOST = "127.0.0.1"
END_SECONDS = 30.0
_POLL_SECONDS, _ASK_SECONDS = 0.1, 5.0


@contextlib.contextmanager
def launched_servers(arguments: Sequence[str], start_seconds: float) -> Iterator[list[str]]:
    """The URLs of `python -m server ARGUMENTS`, ready, for each of `arguments`. Raises RunFailed with what the server
    said where it does not start; all have ended on leaving."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(running(partial(_tandem, one), f"--launch {one!r}", start_seconds)) for one in arguments
        ]


@contextlib.contextmanager
def running(
    command: Callable[[int], Sequence[str]],
    name: str,
    start_seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """The URL of the server that `command` starts on the port it is given, ready. Raises RunFailed by that name."""
    port = _free_port()
    with tempfile.NamedTemporaryFile(prefix="tandem-", suffix=".log") as file:
        log = Path(file.name)
        process = _start(command(port), file, environment)
        try:
            url = f"http://{HOST}:{port}"
            _wait_ready(process, url, name, log, start_seconds)
            yield url
        finally:
            _end(process)


def _tandem(arguments: str, port: int) -> list[str]:
    try:
        words = shlex.split(arguments)
    except ValueError as error:
        raise RunFailed(f"--launch {arguments!r} is no list of arguments: {error}") from error
    return [sys.executable, "-m", "server", *words, "--port", str(port)]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        port: int = one.getsockname()[1]
        return port


def _start(command: Sequence[str], log: IO[bytes], environment: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
    )


def _wait_ready(process: subprocess.Popen[bytes], url: str, name: str, log: Path, start_seconds: float) -> None:
    """Ask for the models until they are told. A server may accept the question long before it answers."""
    deadline = time.monotonic() + start_seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise RunFailed(f"{name} is not ready after {start_seconds:g} s (--start-timeout): {_telling_line(log)}")
        with contextlib.suppress(RunFailed):
            Server(url, _ASK_SECONDS)
            return
        time.sleep(_POLL_SECONDS)
    raise RunFailed(f"{name} ended with status {process.returncode}: {_telling_line(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _telling_line(log: Path) -> str:
    """The first that names an error, which is the cause of those that follow, or else the last."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    return one_line(next((line for line in lines if "Error: " in line and "WARNING" not in line), lines[-1]))
