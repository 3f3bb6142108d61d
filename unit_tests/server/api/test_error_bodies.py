"""Every way to fail has OpenAI's error body."""

import pytest

from server.api.error_bodies import anthropic_error_body, error_event, error_response
from server.errors import (
    EngineDead,
    InvalidRequest,
    ModelFailure,
    NotFound,
    QueueFull,
    RequestTimeout,
    TandemError,
    Unauthorized,
)
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error


def test_unknown_routes_and_wrong_methods_have_error_bodies(serving: Serving) -> None:
    check_error(serving.http.get("/v1/nope"), 404, None, "/v1/nope")
    check_error(serving.http.get("/v1/completions"), 405, None)


@pytest.mark.parametrize(
    ("path", "methods"),
    [("/v1/completions", "POST"), ("/v1/responses/resp_x", "DELETE, GET"), ("/ready", "GET, HEAD")],
)
def test_a_wrong_method_is_told_all_that_the_path_takes(serving: Serving, path: str, methods: str) -> None:
    answer = serving.http.put(path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == methods


def test_our_own_mistake_is_a_500_with_an_error_body(serving: Serving, monkeypatch) -> None:
    monkeypatch.setattr(serving.services.metrics, "render", lambda: 1 / 0)
    check_error(serving.http.get("/metrics"), 500, None)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (InvalidRequest, "invalid_request_error"),
        (Unauthorized, "authentication_error"),
        (NotFound, "not_found_error"),
        (RequestTimeout, "timeout_error"),
        (QueueFull, "rate_limit_error"),
        (ModelFailure, "api_error"),
        (EngineDead, "overloaded_error"),
    ],
)
def test_errors_have_the_names_that_anthropic_gives_them(kind: type[TandemError], name: str) -> None:
    error = kind("seen", "field")
    assert anthropic_error_body(error) == {"type": "error", "error": {"type": name, "message": "seen"}}
    for path, has_param in (("/v1/messages", False), ("/root/v1/messages/count_tokens", False), ("/v1/models", True)):
        response = error_response(error, {"type": "http", "path": path})
        assert response.status_code == kind.status
        assert (b'"param"' in response.body) is has_param
        event = error_event(error, {"type": "http", "path": path})
        assert event == (b"" if has_param else b"event: error\n") + b"data: " + response.body + b"\n\n"
