"""Every way to fail has OpenAI's error body."""

from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error


def test_unknown_routes_and_wrong_methods_have_error_bodies(serving: Serving) -> None:
    check_error(serving.http.get("/v1/nope"), 404, None, "/v1/nope")
    check_error(serving.http.get("/v1/completions"), 405, None)


def test_our_own_mistake_is_a_500_with_an_error_body(serving: Serving, monkeypatch) -> None:
    monkeypatch.setattr(serving.services.metrics, "render", lambda: 1 / 0)
    check_error(serving.http.get("/metrics"), 500, None)
