"""Routes of trainers are there if asked for, ask for the administrator's key, and are what they say."""

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from server.api.rl.routes import RL_PATHS
from server.config import ServerConfig
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.rl.conftest import TrainedServing
from unit_tests.server.api.test_connection import on_a_port
from unit_tests.server.api.test_openapi import CHECKS
from unit_tests.server.api.test_requests import check_error
from unit_tests.server.fake_engine import RAISE_ID

NUM_EXAMPLES = 20


def methods(serving: Serving) -> list[tuple[str, str]]:
    """Every route of trainers with its methods."""
    paths = serving.app.openapi()["paths"]
    return [(path, method) for path in sorted(RL_PATHS) for method in paths[path]]


def test_the_paths_are_all_that_the_flag_adds(serving: Serving, trained: TrainedServing) -> None:
    plain, all_paths = (set(one.app.openapi()["paths"]) for one in (serving, trained))
    assert all_paths - plain == RL_PATHS and plain < all_paths
    assert len(methods(trained)) == len(RL_PATHS) + 2


def test_without_the_flag_nothing_is_there(serving: Serving) -> None:
    for path in RL_PATHS:
        for method in ("GET", "POST"):
            check_error(serving.http.request(method, path, json={}), 404, None, "no route")


def test_every_route_is_described(trained: TrainedServing) -> None:
    paths = trained.app.openapi()["paths"]
    for path, method in methods(trained):
        described = paths[path][method]
        assert described["description"], path
        statuses = {"200", "401"} if method == "get" and "parameters" not in described else {"200", "400", "401", "409"}
        assert statuses <= set(described["responses"]), path
        assert "422" not in described["responses"]


BOTH = {"api_key": ("users",), "admin_api_key": "admins"}


@pytest.mark.parametrize(
    ("keys", "key", "is_open"),
    [
        ({}, None, True),
        ({"api_key": ("users",)}, None, False),
        ({"api_key": ("users",)}, "users", True),
        ({"admin_api_key": "admins"}, None, False),
        ({"admin_api_key": "admins"}, "admin", False),
        ({"admin_api_key": "admins"}, "admins", True),
        (BOTH, "users", False),
        (BOTH, "admins", True),
    ],
)
def test_the_administrators_key_goes_before_the_others(
    make_trained: Callable[..., TrainedServing], keys: dict[str, Any], key: str | None, is_open: bool
) -> None:
    trained = make_trained(**keys)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    flag = "--admin-api-key" if "admin_api_key" in keys else "--api-key"
    with trained.listening():
        for path, method in methods(trained) if not is_open else [("/is_paused", "get"), ("/pause", "post")]:
            answer = trained.http.request(method, path, headers=headers)
            if is_open:
                assert answer.status_code == 200
            else:
                check_error(answer, 401, None, f"({flag} of the server)")
    assert is_open or trained.engine.commands == []


def test_other_routes_ask_for_the_other_keys_and_take_the_administrators(
    make_trained: Callable[..., TrainedServing],
) -> None:
    trained = make_trained(**BOTH)
    with trained.listening():
        statuses = {key: trained.http.get("/v1/models", headers={"x-api-key": key}) for key in ("users", "admins", "x")}
        assert [answer.status_code for answer in statuses.values()] == [200, 200, 401]
        assert trained.http.get("/health").status_code == 200
    alone = make_trained(admin_api_key="admins")
    with alone.listening():
        assert alone.http.get("/v1/models").status_code == 200


@pytest.mark.parametrize("root_path", ["/api", "/p"])
def test_no_proxys_part_of_a_path_leads_around_the_key(
    make_trained: Callable[..., TrainedServing], root_path: str
) -> None:
    trained = make_trained(admin_api_key="admins", root_path=root_path)
    with trained.listening():
        for path in ("/pause", f"{root_path}/pause"):
            assert trained.http.post(path).status_code == 401
            assert trained.http.post(path, headers={"x-api-key": "admins"}).status_code == 200
        for path in ("//pause", "/pause/", f"{root_path}{root_path}/pause", "/./pause", "/%2e/pause"):
            assert trained.http.post(f"http://testserver{path}").status_code in (401, 404)
    assert trained.commands() == ["Pause", "FlushCache"] * 2


class Site(threading.Thread):
    """The routes on a port, in a thread of its own."""

    def __init__(self, trained: TrainedServing):
        super().__init__(daemon=True)
        self.trained, self.url, self.is_open = trained, "", threading.Event()

    def run(self) -> None:
        """Serve until `close`."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._ends = asyncio.get_running_loop(), asyncio.Event()
        async with on_a_port(self.trained, ServerConfig(port=0), timeout=None) as site:
            self.url = f"http://127.0.0.1:{site.port}"
            self.is_open.set()
            await self._ends.wait()

    def close(self) -> None:
        """Serve no more."""
        self._loop.call_soon_threadsafe(self._ends.set)
        self.join()


@pytest.fixture
def description(make_trained: Callable[..., TrainedServing]) -> Iterator[Any]:
    """What a running server says of itself."""
    trained = make_trained()
    trained.engine.ready = dataclasses.replace(trained.engine.ready, vocab_size=RAISE_ID)
    site = Site(trained)
    site.start()
    assert site.is_open.wait(60)
    yield schemathesis.openapi.from_url(f"{site.url}/openapi.json")
    site.close()


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_gets_an_answer_that_is_not_described(description: Any, mode: GenerationMode) -> None:
    """Requests by the rules and against them, to every route of trainers."""
    statuses: set[int] = set()
    found = [result.ok() for result in description.get_all_operations()]
    for route in (route for route in found if route.path in RL_PATHS):
        if mode is GenerationMode.NEGATIVE and not list(route.body):
            continue

        @settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=route.as_strategy(generation_mode=mode))
        def attempt(case: Any) -> None:
            response = case.call()
            statuses.add(response.status_code)
            case.validate_response(response, checks=CHECKS)

        attempt()
    assert statuses >= ({200, 400} if mode is GenerationMode.POSITIVE else {400})
