"""Where the server listens: ports, Unix sockets, with and without TLS. What cannot be had is one line."""

import asyncio
import os
import resource
import socket
import ssl
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from server.config import EngineConfig, ServerConfig
from server.errors import ConfigError
from server.http_server import Entrance, describe_address, listening
from server.tokenizer import Tokenizer
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_connection import on_a_port
from unit_tests.server.api.test_requests import check_error
from unit_tests.server.fake_engine import FakeEngine

GET = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
# Made for these tests, for localhost and 127.0.0.1, until 2126: nothing else trusts it.
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgA1GkE/R1pYugBRXh
TfUBZj+zKbjsmxcoVUVuL/5X8RihRANCAARnVhxrTqJkWw/bQRTKjCVaDd6jSPq8
UhqlZ4jISw24gg0WWN7mpolpSxkYSQziM3cKbcX7glAmFbbaedA51AxX
-----END PRIVATE KEY-----
"""
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUXvmAIoDAQ1UPIB31O+wdZLqxkPwwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNjA2NDk0N1oYDzIxMjYxMTAy
MDY0OTQ3WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARnVhxrTqJkWw/bQRTKjCVaDd6jSPq8UhqlZ4jISw24gg0WWN7mpolp
SxkYSQziM3cKbcX7glAmFbbaedA51AxXo28wbTAdBgNVHQ4EFgQU024gD2oxK8an
fEo9KV9W25eJmSkwHwYDVR0jBBgwFoAU024gD2oxK8anfEo9KV9W25eJmSkwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIhAIcvFVe0yJjH8L+XCMGrqgdmz6cq9h3UeCnC2tTL6f6nAiBU
R5RnZ9VNbgvLvg8T32BTZtxpyOoYiwDZRaBbl4tl1g==
-----END CERTIFICATE-----
"""


def make_serving(tokenizer: Tokenizer, config: ServerConfig) -> Serving:
    """A serving of a fake engine."""
    return Serving(FakeEngine(EngineConfig()), tokenizer, config=config)


@pytest.fixture
def pem(tmp_path: Path) -> tuple[str, str]:
    """Paths of a certificate and its key."""
    (tmp_path / "cert.pem").write_text(CERTIFICATE)
    (tmp_path / "key.pem").write_text(KEY)
    return str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")


def test_before_there_is_an_application_everything_is_refused(tokenizer: Tokenizer) -> None:
    entrance = Entrance()
    client = TestClient(entrance)
    for path in ("/health", "/ready", "/v1/models"):
        check_error(client.get(path), 503, None, "being loaded", "/ready")
    entrance.app = make_serving(tokenizer, ServerConfig()).app
    assert client.get("/ready").status_code == 200


def test_a_certificate_makes_it_https(tokenizer: Tokenizer, pem: tuple[str, str]) -> None:
    config = ServerConfig(port=0, ssl_certfile=pem[0], ssl_keyfile=pem[1])
    trust = ssl.create_default_context(cafile=pem[0])

    async def talk() -> bytes:
        async with on_a_port(make_serving(tokenizer, config), config) as site:
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=trust)
            writer.write(GET)
            answer = await reader.read()
            writer.close()
            return answer

    assert asyncio.run(talk()).startswith(b"HTTP/1.1 200 OK")


def test_a_unix_socket_serves_and_goes_away(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    config = ServerConfig(uds=str(path))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))  # a server that was killed leaves this behind

    async def talk() -> bytes:
        async with on_a_port(make_serving(tokenizer, config), config):
            with pytest.raises(ConfigError, match="cannot listen on --uds"), listening(config):
                pass
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(GET)
            answer = await reader.read()
            writer.close()
            return answer

    assert asyncio.run(talk()).startswith(b"HTTP/1.1 200 OK")
    assert not path.exists()


def test_a_file_in_the_place_of_the_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="cannot listen on --uds"), listening(ServerConfig(uds=str(path))):
        pass
    assert path.read_text() == "mine"


@pytest.mark.parametrize("broken", ["missing", "garbage", "foreign key"])
def test_a_certificate_that_cannot_be_served_is_told_before_anything_is_loaded(
    pem: tuple[str, str], tmp_path: Path, broken: str
) -> None:
    if broken == "missing":
        os.unlink(pem[0])
    elif broken == "garbage":
        Path(pem[0]).write_text("not PEM")
    else:
        Path(pem[1]).write_text(KEY.replace("RnVhxr", "RnVhxs"))
    config = ServerConfig(port=0, ssl_certfile=pem[0], ssl_keyfile=pem[1])
    with pytest.raises(ConfigError, match=r"cert\.pem and .*key\.pem cannot be served"), listening(config):
        pass


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1"), listening(ServerConfig(host="192.0.2.1", port=0)):
        pass


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({}, r"http://127.0.0.1:{port}"),
        ({"root_path": "/api"}, r"http://127.0.0.1:{port}/api"),
        ({"host": "::1"}, "http://[::1]:{port}"),
    ],
)
def test_the_address_is_what_a_client_needs(settings: dict[str, str], address: str) -> None:
    config = ServerConfig(port=0, **settings)  # type: ignore[arg-type]
    with listening(config) as listener:
        assert describe_address(listener, config) == address.format(port=listener.getsockname()[1])


def test_many_clients_may_have_connections_open(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    with listening(ServerConfig(port=0)):
        assert limits == [(4096, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with listening(ServerConfig(port=0)):
        assert len(limits) == 1


def test_a_small_answer_does_not_wait_for_acknowledgements() -> None:
    with listening(ServerConfig(port=0)) as listener, socket.create_connection(listener.getsockname()[:2]):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
