"""Prometheus metrics: everything under `tandem:`, and again under the `vllm:` names that dashboards already query.

Request figures are counted here, where tokens are handed to clients. Each choice counts as a request, so output tokens
equal the sums of `usage`, and a prompt's tokens count once for each of its n choices. Scheduler and speculation figures
are the engine's own, read from its last message. Knows neither text nor HTTP.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.messages import FINISH_ABORT, FINISH_LENGTH, FINISH_STOP, EngineStats, Ready, SamplingParams

OWN_PREFIX = "tandem:"
ALIAS_PREFIX = "vllm:"
# Ours alone: no other server has them under these names.
_NOT_ALIASED = (
    "num_requests_aborted",
    "request_timeouts",
    "engine_faults",
    "num_steps",
    "accept_length",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens_per_pos",
    "spec_decode_requests_per_depth",
    "spec_decode_predicted_gain",
    "spec_decode_measured_gain",
    "prefix_cache_requests_hit",
    "prefix_cache_requests_missed",
    "prefix_cache_pages",
    "prefix_cache_checkpoints_used",
    "prefix_cache_checkpoints_free",
    "prefix_cache_evicted_pages",
    "prefix_cache_evicted_checkpoints",
    "prefix_cache_host_bytes_used",
    "prefix_cache_host_hits",
    "prefix_cache_host_refused",
    "is_paused",
    "weights_info",
    "mtp_stale",
    "weight_updates",
    "spec_decode_acceptance_per_pos_since_update",
)
_DRAFT_STEPS = "spec_decode_num_draft_steps"
# What the others call something else. Their accept length is 1 + accepted / drafts, of steps with drafts alone.
_ALIASES = {_DRAFT_STEPS: "spec_decode_num_drafts"}
_LABELS = ("model_name", "engine")
_FINISH_REASONS = (FINISH_STOP, FINISH_LENGTH, FINISH_ABORT)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
_REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 240.0, 480.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_CHOICES = (1, 2, 5, 10, 20, 50, 100)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Metrics:
    """All metrics of one server. `read_stats` gives the engine's last word, `ready` its first."""

    def __init__(self, model_name: str, read_stats: Callable[[], EngineStats], ready: Ready | None = None):
        self._own = CollectorRegistry()
        self._labels = (model_name, "0")
        self._last = EngineStats()
        self._own.register(_EngineCollector(read_stats, self._labels))
        if ready is not None:
            self._own.register(_CacheInfoCollector(ready, self._labels))
        ProcessCollector(registry=self._own)
        self._exposed = CollectorRegistry()
        self._exposed.register(_AliasCollector(self._own))
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that gave a first token.")
        self.generation_tokens = self._counter("generation_tokens", "Output tokens handed to clients.")
        self.aborted = self._counter(
            "num_requests_aborted", "Requests whose client left, or that failed or ran out of time."
        )
        self._success = Counter(
            OWN_PREFIX + "request_success",
            "Requests by finish reason.",
            (*_LABELS, "finished_reason"),
            registry=self._own,
        )
        self.success = {reason: self._success.labels(*self._labels, reason) for reason in _FINISH_REASONS}
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _REQUEST_SECONDS)
        self.itl = self._histogram(
            "inter_token_latency_seconds", "Between two outputs of a request; one may bring several.", _STEP_SECONDS
        )
        self.tpot = self._histogram(
            "request_time_per_output_token_seconds", "First to last token, per token after the first.", _STEP_SECONDS
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_SECONDS)
        self.decode_time = self._histogram("request_decode_time_seconds", "First to last token.", _REQUEST_SECONDS)
        self.queue_time = self._histogram("request_queue_time_seconds", "Wait for a row.", _REQUEST_SECONDS)
        self.prefill_time = self._histogram("request_prefill_time_seconds", "Row to first token.", _REQUEST_SECONDS)
        self.inference_time = self._histogram("request_inference_time_seconds", "Row to last token.", _REQUEST_SECONDS)
        self.prompt_len = self._histogram("request_prompt_tokens", "Prompt tokens per request.", _TOKENS)
        self.output_len = self._histogram("request_generation_tokens", "Output tokens per request.", _TOKENS)
        self.step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens per engine step: computed of prompts, and put out.", _STEP_TOKENS
        )
        self._http_requests = Counter(
            "http_requests", "HTTP requests.", ("method", "status", "handler"), registry=self._own
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "First byte of the request to last byte of the answer.",
            ("method", "handler"),
            registry=self._own,
            buckets=_REQUEST_SECONDS,
        )
        self.params_n = self._histogram("request_params_n", "The n of HTTP requests.", _CHOICES)
        self.params_max_tokens = self._histogram("request_params_max_tokens", "The max_tokens of requests.", _TOKENS)

    def start_request(self, prompt_len: int, sampling: SamplingParams) -> "RequestClock":
        """The clock of a request that arrives now."""
        if sampling.max_tokens is not None:
            self.params_max_tokens.observe(sampling.max_tokens)
        return RequestClock(self, prompt_len)

    def observe_step(self, stats: EngineStats) -> None:
        """What the engine says after its steps; of several at once each had as many tokens."""
        last, self._last = self._last, stats
        num_steps = stats.num_steps - last.num_steps
        num_reused = stats.num_cached_tokens - last.num_cached_tokens
        num_computed = max(0, stats.num_prompt_tokens - last.num_prompt_tokens - num_reused)
        for _ in range(num_steps):
            self.step_tokens.observe((num_computed + stats.num_output_tokens - last.num_output_tokens) / num_steps)

    def observe_http(self, method: str, route: str, status: int, seconds: float) -> None:
        """One HTTP request has been answered; clients may call a method what they like."""
        method = method if method in _HTTP_METHODS else "other"
        self._http_requests.labels(method, f"{status // 100}xx", route).inc()
        self._http_seconds.labels(method, route).observe(seconds)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._exposed)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(OWN_PREFIX + name, help, _LABELS, registry=self._own).labels(*self._labels)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(OWN_PREFIX + name, help, _LABELS, registry=self._own, buckets=buckets)
        return histogram.labels(*self._labels)


class RequestClock:
    """Times one request and counts its tokens. Times are in seconds; None before the first token."""

    def __init__(self, metrics: Metrics, prompt_len: int):
        self._metrics = metrics
        self._prompt_len = prompt_len
        self._arrived_at = time.perf_counter()
        self._first_at = self._last_at = self._arrived_at
        self.num_tokens = 0
        self.queue_seconds: float | None = None

    @property
    def first_token_seconds(self) -> float | None:
        """Arrival to first token."""
        return self._first_at - self._arrived_at if self.num_tokens else None

    @property
    def decode_seconds(self) -> float | None:
        """First to last token."""
        return self._last_at - self._first_at if self.num_tokens else None

    def count_tokens(self, num_tokens: int, queue_seconds: float = 0.0, num_steps: int = 0, age: float = 0.0) -> None:
        """One output arrived with `num_tokens` tokens for the client, of so many verify steps and perhaps a prefill,
        the first of which ended `age` seconds ago. Its request had waited `queue_seconds`."""
        if not num_tokens:
            return
        now, metrics, is_first = time.perf_counter(), self._metrics, self.num_tokens == 0
        if is_first:
            self._first_at = self._last_at = now - age
            self.queue_seconds = queue_seconds
            metrics.ttft.observe(self._first_at - self._arrived_at)
            metrics.prompt_tokens.inc(self._prompt_len)
        if not is_first or num_steps > 0:
            metrics.itl.observe((now - self._last_at) / max(1, num_steps))
        self._last_at = now
        self.num_tokens += num_tokens
        metrics.generation_tokens.inc(num_tokens)

    def end(self, finish_reason: str) -> None:
        """The request is over; the latencies of aborted ones are not recorded."""
        metrics = self._metrics
        metrics.success[finish_reason].inc()
        if finish_reason == FINISH_ABORT:
            metrics.aborted.inc()
            return
        if self.num_tokens == 0:  # only its prompt was of interest
            self._first_at = self._last_at = time.perf_counter()
            metrics.prompt_tokens.inc(self._prompt_len)
        total, decode, queue = self._last_at - self._arrived_at, self.decode_seconds or 0.0, self.queue_seconds or 0.0
        metrics.e2e.observe(total)
        metrics.decode_time.observe(decode)
        metrics.queue_time.observe(queue)
        metrics.prefill_time.observe(max(0.0, total - decode - queue))
        metrics.inference_time.observe(max(0.0, total - queue))
        metrics.prompt_len.observe(self._prompt_len)
        metrics.output_len.observe(self.num_tokens)
        if self.num_tokens > 1:
            metrics.tpot.observe(decode / (self.num_tokens - 1))


class _EngineCollector(Collector):
    """The engine's gauges and counters, as of its last message."""

    def __init__(self, read_stats: Callable[[], EngineStats], labels: tuple[str, str]):
        self._read_stats = read_stats
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        """One family per figure."""
        stats = self._read_stats()
        yield from self._scheduling(stats)
        yield from self._prefix_cache(stats)
        yield from self._speculation(stats)
        yield from self._weights(stats)
        yield self._counter("request_timeouts", "Requests ended because their time was over.", stats.num_timeouts)
        yield self._counters("engine_faults", "What self-diagnosis found.", "kind", stats.faults)

    def _scheduling(self, stats: EngineStats) -> Iterable[Metric]:
        used = 1 - stats.num_free_pages / stats.num_pages if stats.num_pages else 0.0
        yield self._gauge("num_requests_running", "Requests that hold a row.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests that wait for a row.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV pages in use, 0..1.", used)
        yield self._counter("num_steps", "Engine steps.", stats.num_steps)
        yield self._counter("num_preemptions", "Requests sent back for want of pages.", stats.num_preemptions)

    def _prefix_cache(self, stats: EngineStats) -> Iterable[Metric]:
        name = "prefix_cache_"
        yield self._counter(name + "queries", "Prompt tokens that were looked up.", stats.num_prompt_tokens)
        yield self._counter(name + "hits", "Prompt tokens that were found.", stats.num_cached_tokens)
        yield self._counter(name + "requests_hit", "Requests that reused a prefix.", stats.num_cache_hits)
        yield self._counters(
            name + "requests_missed", "Requests that reused none, by reason.", "reason", stats.cache_misses
        )
        yield self._gauge(name + "pages", "KV pages whose contents can be reused.", stats.num_cached_pages)
        yield self._gauge(name + "checkpoints_used", "GDN checkpoints on the device.", stats.num_checkpoints)
        yield self._gauge(name + "checkpoints_free", "Room for more of them.", stats.num_free_checkpoints)
        yield self._counter(name + "evicted_pages", "Pages that left the device.", stats.num_evicted_pages)
        yield self._counter(
            name + "evicted_checkpoints", "Checkpoints that left the device.", stats.num_evicted_checkpoints
        )
        yield self._gauge(name + "host_bytes_used", "Host memory of evicted ones.", stats.host_cache_bytes_used)
        yield self._counter(name + "host_hits", "Reuses that brought some back from the host.", stats.num_host_hits)
        yield self._counter(name + "host_refused", "Host copies that were damaged.", stats.num_host_refused)

    def _speculation(self, stats: EngineStats) -> Iterable[Metric]:
        length = 1 + stats.num_accepted / stats.num_verify_steps if stats.num_verify_steps else 0.0
        name = "spec_decode_"
        proposed, accepted = stats.proposed_per_position, stats.accepted_per_position
        yield self._gauge("accept_length", "Tokens per verify step since start.", length)
        yield self._counter(name + "num_drafts", "Verify steps of requests.", stats.num_verify_steps)
        # Every step with drafts has a first one.
        yield self._counter(_DRAFT_STEPS, "Those of them that had drafts.", proposed[0] if proposed else 0)
        yield self._counter(name + "num_draft_tokens", "Tokens drafted.", stats.num_proposed)
        yield self._counter(name + "num_accepted_tokens", "Drafted tokens accepted.", stats.num_accepted)
        yield self._per_index(name + "num_draft_tokens_per_pos", "Tokens drafted, by draft.", "position", proposed)
        yield self._per_index(
            name + "num_accepted_tokens_per_pos", "Drafted tokens accepted, by draft.", "position", accepted
        )
        yield self._per_index(
            name + "requests_per_depth", "Requests of verify steps, by drafts.", "depth", stats.requests_per_depth
        )
        gain = "Tokens per second over plain decoding, "
        yield self._gauge(name + "predicted_gain", gain + "as the planner expects.", stats.predicted_gain)
        yield self._gauge(name + "measured_gain", gain + "as it turned out.", stats.measured_gain)

    def _weights(self, stats: EngineStats) -> Iterable[Metric]:
        names = ("weight_version", "mtp_weight_version")
        info = GaugeMetricFamily(OWN_PREFIX + "weights_info", "Which weights serve.", labels=(*_LABELS, *names))
        info.add_metric((*self._labels, stats.weight_version, stats.mtp_weight_version), 1)
        yield info
        yield self._gauge("mtp_stale", "Whether the target has changed since the draft head has.", stats.mtp_stale)
        yield self._gauge("is_paused", "Whether the engine is paused.", stats.is_paused)
        yield self._counter("weight_updates", "Changes of the weights since start.", stats.num_weight_updates)
        share = GaugeMetricFamily(
            OWN_PREFIX + "spec_decode_acceptance_per_pos_since_update",
            "Share of the drafts accepted since the weights have changed, by draft.",
            labels=(*_LABELS, "position"),
        )
        counts = zip(*stats.drafts_by_version.get(stats.weight_version, ((), ())), strict=True)
        for position, (proposed, accepted) in enumerate(counts):
            share.add_metric((*self._labels, str(position)), accepted / max(1, proposed))
        yield share

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(OWN_PREFIX + name, help, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(OWN_PREFIX + name, help, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counters(self, name: str, help: str, label: str, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(OWN_PREFIX + name, help, labels=(*_LABELS, label))
        for key, value in values.items():
            family.add_metric((*self._labels, key), value)
        return family

    def _per_index(self, name: str, help: str, label: str, values: Sequence[float]) -> Metric:
        return self._counters(name, help, label, {str(index): value for index, value in enumerate(values)})


class _CacheInfoCollector(Collector):
    """The sizes of the KV cache, as labels of a 1."""

    def __init__(self, ready: Ready, labels: tuple[str, str]):
        names = ("block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching")
        values = (str(ready.page_size), str(ready.num_pages), ready.dtype, str(ready.num_checkpoints > 0))
        self._family = GaugeMetricFamily(
            OWN_PREFIX + "cache_config_info", "Sizes of the KV cache.", labels=(*_LABELS, *names)
        )
        self._family.add_metric((*labels, *values), 1)

    def collect(self) -> Iterable[Metric]:
        """The one family."""
        yield self._family


class _AliasCollector(Collector):
    """Everything of a registry, and the `tandem:` families a second time as `vllm:`."""

    def __init__(self, registry: CollectorRegistry):
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """All families, each alias right after its original."""
        for family in self._registry.collect():
            yield family
            if family.name.startswith(OWN_PREFIX) and family.name.removeprefix(OWN_PREFIX) not in _NOT_ALIASED:
                yield _rename(family)


def _rename(family: Metric) -> Metric:
    alias = Metric(_alias(family.name), family.documentation, family.type, family.unit)
    alias.samples = [sample._replace(name=_alias(sample.name)) for sample in family.samples]
    return alias


def _alias(name: str) -> str:
    name, end = name.removeprefix(OWN_PREFIX), "_total" if name.endswith("_total") else ""
    name = name.removesuffix(end)
    return ALIAS_PREFIX + _ALIASES.get(name, name) + end
