"""Spans reach a collector over HTTP, with the names of the conventions and inside the client's trace."""

import builtins
import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from server.api.tracing import Tracing, trace_url
from server.errors import ConfigError
from unit_tests.server.api.conftest import Serving

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """An OpenTelemetry collector that keeps the spans it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.paths: list[str] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                request = ExportTraceServiceRequest.FromString(body)
                collector.paths.append(self.path)
                for resource in request.resource_spans:
                    collector.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that listens."""
    made = Collector()
    yield made
    made.close()


def attributes(span: Any) -> dict[str, Any]:
    """A span's attributes as plain values."""
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}


def serve(make_serving, collector: Collector) -> tuple[Serving, Tracing]:
    """A serving that sends traces to the collector."""
    tracing = Tracing(collector.url, "tiny")
    return make_serving(observers=[tracing.record]), tracing


def test_a_span_has_what_was_asked_and_what_was_given(make_serving, collector: Collector) -> None:
    serving, tracing = serve(make_serving, collector)
    body = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "n": 2}
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "x-request-id": "r"}
    with serving.listening():
        assert serving.http.post("/v1/completions", json=body, headers=headers).status_code == 200
        serving.http.get("/v1/models", headers=headers)
    tracing.close()
    (span,) = collector.spans
    assert collector.paths == ["/v1/traces"]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert span.name == "POST /v1/completions"
    told = attributes(span)
    expected = {
        "gen_ai.request.id": "r",
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.n": 2,
        "gen_ai.response.model": "tiny",
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.completion_tokens": 16,
        "http.response.status_code": 200,
        "tandem.accept_length": 2.33,
    }
    assert told | expected == told
    seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert told["gen_ai.latency.e2e"] == pytest.approx(seconds, abs=1e-6)
    parts = [told[f"gen_ai.latency.time_in_{part}"] for part in ("queue", "model_prefill", "model_decode")]
    assert told["gen_ai.latency.time_in_model_inference"] == pytest.approx(parts[1] + parts[2])
    assert 0 < told["gen_ai.latency.time_to_first_token"] == pytest.approx(parts[0] + parts[1])
    assert sum(parts) <= seconds


def test_no_word_of_prompt_or_answer_is_sent(make_serving, collector: Collector) -> None:
    serving, tracing = serve(make_serving, collector)
    with serving.listening():
        serving.chat("the quick brown fox", max_tokens=5)
    tracing.close()
    assert "fox" not in str(collector.spans[0]) and "quick" not in str(collector.spans[0])


def test_a_request_without_a_trace_begins_one_and_a_failed_one_is_marked(make_serving, collector: Collector) -> None:
    serving, tracing = serve(make_serving, collector)
    with serving.listening():
        serving.complete([5], max_tokens=1)
        refused = serving.http.post("/v1/completions", json={"prompt": [5], "timeout": 0.5})
        assert refused.status_code == 408
    tracing.close()
    good, late = collector.spans
    assert good.parent_span_id == b"" and good.trace_id != late.trace_id
    assert good.status.code == 0
    assert attributes(late)["http.response.status_code"] == 408
    assert "gen_ai.latency.time_to_first_token" not in attributes(late)


def test_an_error_of_the_server_is_an_error_of_its_span(make_serving, collector: Collector) -> None:
    serving, tracing = serve(make_serving, collector)
    with serving.listening():
        serving.services.metrics.ttft = None  # a mistake in the middle of an answer
        assert serving.http.post("/v1/completions", json={"prompt": [5], "max_tokens": 1}).status_code == 500
    tracing.close()
    assert (collector.spans[0].status.code, collector.spans[0].status.message) == (2, "HTTP 500")


def test_a_collector_that_is_away_harms_no_request(make_serving, collector: Collector) -> None:
    serving, _ = serve(make_serving, collector)
    collector.close()
    with serving.listening():
        for _ in range(3):
            serving.complete([5], max_tokens=1)


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/traces"),
        ("https://host/", "https://host/v1/traces"),
        ("http://host:1/own/path?x=1", "http://host:1/own/path?x=1"),
    ],
)
def test_the_path_of_the_protocol_is_added_where_there_is_none(endpoint: str, url: str) -> None:
    assert trace_url(endpoint) == url


@pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://host:4317", "http://", "/v1/traces"])
def test_what_is_no_url_of_a_collector_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"--otlp-traces-endpoint is .*, it must be a URL such as"):
        Tracing(endpoint, "tiny")


def test_without_the_packages_the_flag_is_refused_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import_module = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'tandem\[tracing\]'"):
        Tracing("http://localhost:4318", "tiny")
