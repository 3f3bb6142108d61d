"""What /openapi.json says is so: checked route by route, and by a program that reads it and tries everything."""

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.api.openapi import ERROR, nullable, operation, path_parameter, query_parameter
from server.config import EngineConfig, ServerConfig
from server.errors import NotFound, QueueFull
from server.tokenizer import Tokenizer
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_connection import on_a_port
from unit_tests.server.fake_engine import RAISE_ID, FakeEngine

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
NUM_EXAMPLES = 100


def test_an_operation_lists_its_errors_and_a_missing_key() -> None:
    keywords = operation(answer={"type": "string"}, errors=[NotFound, QueueFull])
    assert set(keywords["responses"]) == {200, 401, 404, 429}
    assert keywords["responses"][404]["content"] == {"application/json": {"schema": ERROR}}
    assert keywords["responses"][200]["content"] == {"application/json": {"schema": {"type": "string"}}}
    assert keywords["openapi_extra"] == {}


def test_a_route_may_fail_in_a_form_of_its_own() -> None:
    keywords = operation(errors=[NotFound], failure={"type": "string"})
    schemas = [keywords["responses"][status]["content"]["application/json"]["schema"] for status in (401, 404)]
    assert schemas == [{"type": "string"}] * 2


def test_a_request_a_stream_and_a_parameter_are_described() -> None:
    keywords = operation(request={"type": "object"}, streams=True, parameters=[path_parameter("name")])
    assert set(keywords["responses"][200]["content"]) == {"application/json", "text/event-stream"}
    extra = keywords["openapi_extra"]
    assert extra["requestBody"]["content"]["application/json"]["schema"] == {"type": "object"}
    assert extra["parameters"][0]["name"] == "name"


def test_a_body_may_be_left_out_where_nothing_in_it_is_needed() -> None:
    bodies = [operation(request={}, needs_body=needs)["openapi_extra"]["requestBody"] for needs in (True, False)]
    assert [body["required"] for body in bodies] == [True, False]


def test_a_field_of_the_query_may_be_left_out() -> None:
    found = query_parameter("limit", {"type": "integer"})
    assert found == {"name": "limit", "in": "query", "required": False, "schema": {"type": "integer"}}


def test_an_answer_without_a_content_type_is_empty() -> None:
    assert operation(content_type=None)["responses"][200]["content"] == {}


def test_a_nullable_field_keeps_its_rules() -> None:
    assert nullable("integer", minimum=1) == {"type": ["integer", "null"], "minimum": 1}


def test_every_route_is_described_with_a_summary_and_no_422(serving: Serving) -> None:
    paths = serving.http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"} <= set(paths)
    for path, methods in paths.items():
        for method, description in methods.items():
            assert description["description"], (method, path)
            assert {"200", "401"} <= set(description["responses"]), (method, path)
            assert "422" not in description["responses"], (method, path)


class Site(threading.Thread):
    """A fake model on a port, in a thread of its own. Its vocabulary ends before the tokens with special effects."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(daemon=True)
        engine = FakeEngine(EngineConfig(mtp_step=2))
        engine.ready = dataclasses.replace(engine.ready, vocab_size=RAISE_ID)
        self.config = ServerConfig(port=0)
        self.serving = Serving(engine, tokenizer, config=self.config)
        self.url = ""
        self.is_open = threading.Event()

    def run(self) -> None:
        """Serve until `close`."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._ends = asyncio.get_running_loop(), asyncio.Event()
        async with on_a_port(self.serving, self.config, timeout=None) as site:
            self.url = f"http://127.0.0.1:{site.port}"
            self.is_open.set()
            await self._ends.wait()

    def close(self) -> None:
        """Serve no more."""
        self._loop.call_soon_threadsafe(self._ends.set)
        self.join()


@pytest.fixture(scope="module")
def description(tokenizer: Tokenizer) -> Iterator[Any]:
    """What a running server says of itself."""
    site = Site(tokenizer)
    site.start()
    assert site.is_open.wait(60)
    yield schemathesis.openapi.from_url(f"{site.url}/openapi.json")
    site.close()
    assert site.serving.client.num_in_flight == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_gets_an_answer_that_is_not_described(description: Any, mode: GenerationMode) -> None:
    """Requests by the rules and against them, to every route that takes some."""
    statuses: set[int] = set()
    for found in description.get_all_operations():
        route = found.ok()
        if mode is GenerationMode.NEGATIVE and not list(route.body):  # nothing to send that would be wrong
            continue

        @settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=route.as_strategy(generation_mode=mode))
        def attempt(case: Any) -> None:
            response = case.call()
            statuses.add(response.status_code)
            case.validate_response(response, checks=CHECKS)

        attempt()
    assert statuses >= ({200, 400, 404} if mode is GenerationMode.POSITIVE else {400})
