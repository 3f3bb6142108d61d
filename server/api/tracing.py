"""One OpenTelemetry span per request that generates, sent over HTTP to a collector (OTLP). Off unless asked for.

The packages are an extra of the installation (`tracing`) and imported only where they are used.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from server.api.exchange import Exchange
from server.api.generation import Generation
from server.errors import ConfigError
from server.versions import read_version

_DEFAULT_PATH = "/v1/traces"
_TIMEOUT_SECONDS = 5
_NS = 10**9


class Tracing:
    """Sends spans to the collector at `endpoint`, in the background. Raises ConfigError without the packages."""

    def __init__(self, endpoint: str, model_name: str):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, Status, StatusCode
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                f"--otlp-traces-endpoint needs the OpenTelemetry packages ({error}): pip install 'tandem[tracing]'"
            ) from error
        self._model_name = model_name
        self._provider = TracerProvider(resource=Resource.create({"service.name": "tandem"}), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(trace_url(endpoint), timeout=_TIMEOUT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tandem", read_version())
        self._propagator, self._kind = TraceContextTextMapPropagator(), SpanKind.SERVER
        self._failed: Callable[[str], Any] = lambda why: Status(StatusCode.ERROR, why)

    def record(self, exchange: Exchange) -> None:
        """Send the span of an exchange that has ended, as part of the trace that its `traceparent` names."""
        if exchange.generation is None:
            return
        span = self._tracer.start_span(
            f"{exchange.method} {exchange.route}",
            context=self._propagator.extract(exchange.headers),
            kind=self._kind,
            attributes=span_attributes(exchange, exchange.generation, self._model_name),
            start_time=exchange.started_ns,
        )
        if exchange.status >= 500:
            span.set_status(self._failed(f"HTTP {exchange.status}"))
        span.end(exchange.started_ns + int(exchange.seconds * _NS))

    def close(self) -> None:
        """Send what waits to be sent; blocks for as long as the collector takes."""
        self._provider.shutdown()


def trace_url(endpoint: str) -> str:
    """Where to post spans: `endpoint`, with OTLP's own path where it has none. Raises ConfigError."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"--otlp-traces-endpoint is {endpoint!r}, it must be a URL such as http://localhost:4318")
    return urlunsplit(parts._replace(path=_DEFAULT_PATH if parts.path in ("", "/") else parts.path))


def span_attributes(exchange: Exchange, generation: Generation, model_name: str) -> dict[str, Any]:
    """What a span tells, by the names of OpenTelemetry's conventions; times in seconds."""
    sampling, figures, clock = generation.job.sampling, exchange.figures(), generation.choices[0].clock
    queue, first, decode = clock.queue_seconds, clock.first_token_seconds, clock.decode_seconds
    prefill = inference = None
    if first is not None and queue is not None and decode is not None:
        prefill, inference = first - queue, first - queue + decode
    attributes = {
        "gen_ai.request.id": exchange.id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.n": generation.job.n,
        "gen_ai.response.model": model_name,
        "gen_ai.response.finish_reasons": figures["finish_reason"].split(","),
        "gen_ai.usage.prompt_tokens": figures["prompt_tokens"],
        "gen_ai.usage.completion_tokens": figures["output_tokens"],
        "gen_ai.latency.e2e": exchange.seconds,
        "gen_ai.latency.time_to_first_token": first,
        "gen_ai.latency.time_in_queue": queue,
        "gen_ai.latency.time_in_model_prefill": prefill,
        "gen_ai.latency.time_in_model_decode": decode,
        "gen_ai.latency.time_in_model_inference": inference,
        "http.response.status_code": exchange.status,
        "tandem.accept_length": figures["accept_length"],
    }
    return {name: value for name, value in attributes.items() if value is not None}
