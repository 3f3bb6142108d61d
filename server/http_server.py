"""The HTTP side of the server process: its socket, TLS, and uvicorn with deadlines for clients. No torch."""

import contextlib
import os
import resource
import socket
import ssl
import stat
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.connection import ImpatientProtocol
from server.api.error_bodies import error_response
from server.config import ServerConfig
from server.errors import ConfigError, EngineDead

# Time for answers that are already written to reach their clients.
FLUSH_SECONDS = 3
# Connections that wait to be accepted, and files that may be open: a thousand clients may come at once, and stay.
_BACKLOG, _MAX_OPEN_FILES = 2048, 65536


class Entrance:
    """Passes requests on to `app`; before there is one, answers 503 to all of them, probes included."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        refusal = EngineDead("the model is being loaded; try again in a moment, or wait until /ready says 200")
        app = error_response(refusal, scope) if self.app is None else self.app
        await app(scope, receive, send)


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: what a signal means is decided elsewhere."""

    def __init__(self, app: ASGIApp, config: ServerConfig):
        protocol: Any = partial(ImpatientProtocol, client_timeout=config.client_timeout)
        settings = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        super().__init__(settings)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


@contextlib.contextmanager
def listening(config: ServerConfig) -> Iterator[socket.socket]:
    """A socket that listens, so that nobody else can take the port while the model loads.

    Raises ConfigError, also for a certificate that cannot be served.
    """
    check_certificate(config)
    _allow_many_files()
    with _bind_path(config.uds) if config.uds is not None else _bind_port(config) as listener:
        try:
            yield listener
        finally:
            if config.uds is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(config.uds)


def check_certificate(config: ServerConfig) -> None:
    """Raise ConfigError for a certificate that is asked for and cannot be served."""
    if config.ssl_certfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        names = " and ".join(filter(None, (config.ssl_certfile, config.ssl_keyfile)))
        raise ConfigError(f"--ssl-certfile, --ssl-keyfile: {names} cannot be served: {error}") from error


def describe_address(listener: socket.socket, config: ServerConfig) -> str:
    """What a client of this server is to be given."""
    if config.uds is not None:
        return f"the socket {config.uds}"
    host, port = listener.getsockname()[:2]
    scheme = "http" if config.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{config.root_path}"


def _bind_port(config: ServerConfig) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it, and asyncio sets it only where a socket names its protocol. Without it every token but the
    # first waits for the client's delayed acknowledgement, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(_BACKLOG)  # a second server can bind the port too, but not listen on it
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on --host {config.host} --port {config.port}: {error.strerror}") from error
    return listener


def _bind_path(path: str) -> socket.socket:
    """A Unix socket; one that a dead server has left behind is replaced."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if _is_abandoned(path):
            os.unlink(path)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on --uds {path}: {error.strerror or error}") from error
    return listener


def _is_abandoned(path: str) -> bool:
    if not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) != 0


def _allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
