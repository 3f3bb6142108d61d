"""With keys set, only probes and the page answer without one."""

import secrets
from collections.abc import Iterator

import pytest

from server.config import ServerConfig
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error

OPEN = ("/", "/health", "/ready", "/ping", "/playground/page.js")


@pytest.fixture
def guarded(make_serving) -> Iterator[Serving]:
    """A serving with two keys."""
    serving = make_serving(config=ServerConfig(api_key=("first-key", "second-key")))
    with serving.listening():
        yield serving


def test_every_route_but_the_open_ones_asks_for_a_key(guarded: Serving) -> None:
    paths = guarded.app.openapi()["paths"]
    assert set(OPEN[1:4]) <= set(paths)
    closed = [(path, method) for path, methods in paths.items() for method in methods if path not in OPEN]
    assert len(closed) > 5
    for path, method in [*closed, ("/openapi.json", "get"), ("/docs", "get"), ("/nowhere", "get"), ("", "options")]:
        answer = guarded.http.request(method, path or "/v1/models")
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", path
    check_error(guarded.http.post("/v1/completions", json={"prompt": [5]}), 401, None, "--api-key")
    assert guarded.channel.sent == []


@pytest.mark.parametrize("path", OPEN)
def test_probes_and_the_page_need_no_key(guarded: Serving, path: str) -> None:
    assert guarded.http.get(path).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer  second-key "},
        {"x-api-key": "second-key"},
        {"authorization": "Bearer wrong", "x-api-key": "first-key"},
    ],
)
def test_any_of_the_keys_opens_as_bearer_or_by_its_own_header(guarded: Serving, headers: dict[str, str]) -> None:
    assert guarded.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "first-key"},
        {"authorization": "Basic first-key"},
        {"authorization": "Bearer first-key2"},
        {"authorization": "Bearer First-Key"},
        {"authorization": "Bearer first-key,second-key"},
        {"x-api-key": ""},
        {"x-api-key": b"first-key\xff"},
        {"cookie": "api_key=first-key"},
    ],
)
def test_nothing_else_opens(guarded: Serving, headers: dict[str, str]) -> None:
    check_error(guarded.http.get("/v1/models?api_key=first-key", headers=headers), 401, None, "key")


@pytest.mark.parametrize("path", ["//health", "/health/", "/health/../v1/models", "/playground", "/HEALTH", "/ping/x"])
def test_paths_that_look_like_open_ones_are_not(guarded: Serving, path: str) -> None:
    assert guarded.http.get(f"http://testserver{path}").status_code == 401


def test_a_folder_of_the_page_leads_nowhere_else(guarded: Serving) -> None:
    for path in ("/playground/../v1/models", "/playground/%2e%2e/v1/models", "/playground/..%2fv1%2fmodels"):
        assert guarded.http.get(f"http://testserver{path}").status_code in (401, 404)


def test_how_long_a_comparison_takes_depends_on_no_match(guarded: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bytes, bytes]] = []
    compare = secrets.compare_digest

    def count(given: bytes, key: bytes) -> bool:
        calls.append((given, key))
        return compare(given, key)

    monkeypatch.setattr(secrets, "compare_digest", count)
    counts = set()
    for token in ("first-key", "second-key", "wrong"):
        calls.clear()
        guarded.http.get("/v1/models", headers={"authorization": f"Bearer {token}"})
        counts.add(len(calls))
    assert counts == {4}


def test_behind_a_proxy_open_paths_are_open_with_and_without_the_proxys_part(make_serving) -> None:
    serving = make_serving(config=ServerConfig(api_key=("k",), root_path="/api"))
    with serving.listening():
        assert [serving.http.get(path).status_code for path in ("/api/health", "/health")] == [200, 200]
        assert [serving.http.get(path).status_code for path in ("/api/v1/models", "/v1/models")] == [401, 401]
        keyed = {"x-api-key": "k"}
        assert serving.http.get("/api/v1/models", headers=keyed).status_code == 200
        assert serving.http.get("/openapi.json", headers=keyed).json()["servers"] == [{"url": "/api"}]


def test_without_keys_everything_is_open(serving: Serving) -> None:
    assert serving.http.get("/v1/models").status_code == 200
    assert serving.http.get("/v1/models", headers={"authorization": "Bearer whatever"}).status_code == 200
