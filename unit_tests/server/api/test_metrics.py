"""Counts are exact, and the well-known names are there."""

import pytest

from server.api.metrics import Metrics
from server.messages import EngineStats, Ready, SamplingParams
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_transport import run_and_leave

STATS = EngineStats(
    num_prompt_tokens=101,
    num_cached_tokens=102,
    num_cache_hits=103,
    cache_misses={"no checkpoint": 104, "too short": 0},
    num_cached_pages=105,
    num_checkpoints=106,
    num_free_checkpoints=107,
    num_evicted_pages=108,
    num_evicted_checkpoints=109,
    host_cache_bytes_used=110,
    num_host_hits=111,
    num_host_refused=112,
    proposed_per_position=(113, 114),
    accepted_per_position=(115, 116),
    requests_per_depth=(117, 118, 119),
    predicted_gain=1.25,
    measured_gain=1.5,
    num_timeouts=120,
    faults={"non_finite": 121, "divergence": 0},
)


DASHBOARD_NAMES = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"),
    *("prompt_tokens_total", "generation_tokens_total", "request_success_total", "num_preemptions_total"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total", "iteration_tokens_total"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens"),
    *("request_generation_tokens", "request_params_n", "request_params_max_tokens"),
    *("spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total"),
    *("spec_decode_num_accepted_tokens_total", "spec_decode_num_accepted_tokens_per_pos_total"),
)


def _lines(text: str, name: str) -> list[str]:
    """The samples of a metric, without the labels that all have."""
    found = [line.removeprefix(name) for line in text.splitlines() if line.startswith(name + "{")]
    for label in ('engine="0",', 'model_name="tiny",', ',model_name="tiny"', 'model_name="tiny"'):
        found = [line.replace(label, "") for line in found]
    return found


def test_counters_equal_the_sums_of_usage(serving: Serving) -> None:
    answers = [serving.complete("the quick brown fox", max_tokens=m) for m in (1, 2, 9)]
    answers.append(serving.complete("the quick brown fox", max_tokens=50, stop="k"))
    serving.events("/v1/completions", prompt=[5, 6], max_tokens=4, n=3)
    prompt = sum(answer["usage"]["prompt_tokens"] for answer in answers) + 6
    output = sum(answer["usage"]["completion_tokens"] for answer in answers) + 12
    for prefix in ("tandem:", "vllm:"):
        assert serving.gauge(prefix + "prompt_tokens_total") == prompt
        assert serving.gauge(prefix + "generation_tokens_total") == output
        assert serving.gauge(prefix + "request_generation_tokens_sum") == output
        assert serving.gauge(prefix + "e2e_request_latency_seconds_count") == 7
        assert serving.gauge(prefix + "time_to_first_token_seconds_count") == 7


def test_a_request_of_several_choices_counts_its_prompt_for_each_and_its_n_once(serving: Serving) -> None:
    answer = serving.complete([5, 6], max_tokens=4, n=3)
    assert serving.gauge("tandem:prompt_tokens_total") == 3 * answer["usage"]["prompt_tokens"]
    assert serving.gauge("tandem:generation_tokens_total") == answer["usage"]["completion_tokens"]
    assert serving.gauge("tandem:request_params_n_count") == 1
    assert serving.gauge("tandem:request_params_n_sum") == 3


def test_speculation_is_counted_as_the_engine_counts_it(serving: Serving) -> None:
    usage = serving.complete([5, 6, 7], max_tokens=8)["usage"]["completion_tokens_details"]
    accepted, rejected = usage["accepted_prediction_tokens"], usage["rejected_prediction_tokens"]
    assert serving.gauge("vllm:spec_decode_num_drafts_total") == 3
    assert serving.gauge("vllm:spec_decode_num_accepted_tokens_total") == accepted
    assert serving.gauge("vllm:spec_decode_num_draft_tokens_total") == accepted + rejected
    text = serving.http.get("/metrics").text
    assert 'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="1"}' in text


def test_steps_without_drafts_are_no_drafts_under_the_well_known_name() -> None:
    stats = EngineStats(num_verify_steps=50, num_proposed=40, num_accepted=30, proposed_per_position=(25, 15))
    text = Metrics("tiny", lambda: stats).render().decode()
    assert _lines(text, "tandem:spec_decode_num_drafts_total") == ["{} 50.0"]
    assert _lines(text, "tandem:spec_decode_num_draft_steps_total") == ["{} 25.0"]
    assert _lines(text, "vllm:spec_decode_num_drafts_total") == ["{} 25.0"]
    assert "vllm:spec_decode_num_draft_steps" not in text
    assert text.count("# TYPE vllm:spec_decode_num_drafts_total counter") == 1
    assert _lines(Metrics("tiny", EngineStats).render().decode(), "vllm:spec_decode_num_drafts_total") == ["{} 0.0"]


def test_finish_reasons_are_counted_apart(serving: Serving) -> None:
    serving.complete([5], max_tokens=1)
    serving.complete([5, 2], max_tokens=9)
    text = serving.http.get("/metrics").text
    for reason in ("stop", "length"):
        line = f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="tiny"}} 1.0'
        assert line in text


def test_gauges_are_0_again_after_an_abort(make_serving) -> None:
    serving = make_serving()
    run_and_leave(serving, stream=True)
    with serving.listening():
        assert serving.gauge("vllm:num_requests_running") == 0
        assert serving.gauge("vllm:num_requests_waiting") == 0
        assert serving.gauge("vllm:kv_cache_usage_perc") == 0
        assert serving.gauge("tandem:num_requests_aborted_total") == 1


def test_only_shared_figures_have_a_second_name(serving: Serving) -> None:
    text = serving.http.get("/metrics").text
    assert "tandem:accept_length" in text
    assert "vllm:accept_length" not in text


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("prefix_cache_requests_hit_total", ["{} 103.0"]),
        (
            "prefix_cache_requests_missed_total",
            ['{reason="no checkpoint"} 104.0', '{reason="too short"} 0.0'],
        ),
        ("prefix_cache_pages", ["{} 105.0"]),
        ("prefix_cache_checkpoints_used", ["{} 106.0"]),
        ("prefix_cache_checkpoints_free", ["{} 107.0"]),
        ("prefix_cache_evicted_pages_total", ["{} 108.0"]),
        ("prefix_cache_evicted_checkpoints_total", ["{} 109.0"]),
        ("prefix_cache_host_bytes_used", ["{} 110.0"]),
        ("prefix_cache_host_hits_total", ["{} 111.0"]),
        ("prefix_cache_host_refused_total", ["{} 112.0"]),
        ("spec_decode_num_draft_tokens_per_pos_total", ['{position="0"} 113.0', '{position="1"} 114.0']),
        (
            "spec_decode_requests_per_depth_total",
            ['{depth="0"} 117.0', '{depth="1"} 118.0', '{depth="2"} 119.0'],
        ),
        ("spec_decode_predicted_gain", ["{} 1.25"]),
        ("spec_decode_measured_gain", ["{} 1.5"]),
        ("request_timeouts_total", ["{} 120.0"]),
        ("engine_faults_total", ['{kind="non_finite"} 121.0', '{kind="divergence"} 0.0']),
    ],
)
def test_what_only_this_engine_knows_has_one_name(name: str, samples: list[str]) -> None:
    text = Metrics("tiny", lambda: STATS).render().decode()
    assert _lines(text, "tandem:" + name) == samples
    assert _lines(text, "vllm:" + name) == []


@pytest.mark.parametrize("prefix", ["tandem:", "vllm:"])
def test_the_prefix_cache_is_counted_in_tokens_under_the_well_known_names(prefix: str) -> None:
    text = Metrics("tiny", lambda: STATS).render().decode()
    assert _lines(text, prefix + "prefix_cache_queries_total") == ["{} 101.0"]
    assert _lines(text, prefix + "prefix_cache_hits_total") == ["{} 102.0"]
    accepted = _lines(text, prefix + "spec_decode_num_accepted_tokens_per_pos_total")
    assert accepted == ['{position="0"} 115.0', '{position="1"} 116.0']


def test_every_figure_of_the_engine_is_shown_before_its_first_word() -> None:
    text = Metrics("tiny", EngineStats).render().decode()
    assert _lines(text, "tandem:spec_decode_predicted_gain") == ["{} 1.0"]
    for name in ("engine_faults", "prefix_cache_requests_missed", "spec_decode_requests_per_depth"):
        assert f"# TYPE tandem:{name}_total counter" in text


def test_timeouts_are_counted_whether_or_not_a_token_came(serving: Serving) -> None:
    assert serving.http.post("/v1/completions", json={"prompt": [5], "timeout": 0.5}).status_code == 408
    serving.complete([5], max_tokens=9, timeout=1)
    assert serving.gauge("tandem:request_timeouts_total") == 2
    assert serving.gauge("tandem:num_requests_aborted_total") == 2


def test_the_parts_of_a_requests_time_add_up(serving: Serving) -> None:
    serving.complete([5, 6], max_tokens=8)
    serving.complete([5, 6], max_tokens=1)
    names = ("queue", "prefill", "decode", "inference")
    parts = {name: serving.gauge(f"vllm:request_{name}_time_seconds_sum") for name in names}
    assert all(serving.gauge(f"vllm:request_{name}_time_seconds_count") == 2 for name in names)
    whole = serving.gauge("vllm:e2e_request_latency_seconds_sum")
    assert parts["queue"] + parts["prefill"] + parts["decode"] == pytest.approx(whole)
    assert parts["queue"] + parts["inference"] == pytest.approx(whole)
    assert serving.gauge("vllm:time_to_first_token_seconds_sum") == pytest.approx(parts["queue"] + parts["prefill"])


def test_the_wait_for_a_row_is_the_engines_word(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 12.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    metrics = Metrics("tiny", EngineStats)
    clock = metrics.start_request(3, SamplingParams())
    clock.count_tokens(1, queue_seconds=0.5)
    clock.count_tokens(4, queue_seconds=0.5)
    clock.end("length")
    text = metrics.render().decode()
    for name, seconds in (("queue", 0.5), ("prefill", 1.5), ("decode", 3.0), ("inference", 4.5)):
        assert _lines(text, f"tandem:request_{name}_time_seconds_sum") == [f"{{}} {seconds}"]
    assert (clock.first_token_seconds, clock.decode_seconds, clock.queue_seconds) == (2.0, 3.0, 0.5)


def test_what_is_told_of_several_steps_counts_from_when_the_first_of_them_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = iter([10.0, 15.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    metrics = Metrics("tiny", EngineStats)
    clock = metrics.start_request(3, SamplingParams())
    clock.count_tokens(5, num_steps=4, age=2.0)
    clock.count_tokens(3, num_steps=3, age=4.0)
    clock.end("length")
    text = metrics.render().decode()
    assert _lines(text, "tandem:time_to_first_token_seconds_sum") == ["{} 3.0"]
    assert _lines(text, "tandem:inter_token_latency_seconds_sum") == [f"{{}} {2 / 4 + 6 / 3}"]
    assert (clock.first_token_seconds, clock.decode_seconds) == (3.0, 8.0)


def test_a_request_that_asks_for_no_token_counts_its_prompt() -> None:
    metrics = Metrics("tiny", EngineStats)
    clock = metrics.start_request(7, SamplingParams(max_tokens=0))
    clock.count_tokens(0)
    assert (clock.first_token_seconds, clock.decode_seconds) == (None, None)
    clock.end("length")
    text = metrics.render().decode()
    assert _lines(text, "vllm:prompt_tokens_total") == ["{} 7.0"]
    assert _lines(text, "vllm:e2e_request_latency_seconds_count") == ["{} 1.0"]


def test_an_aborted_request_counts_no_latency() -> None:
    metrics = Metrics("tiny", EngineStats)
    metrics.start_request(7, SamplingParams()).end("abort")
    text = metrics.render().decode()
    assert _lines(text, "vllm:prompt_tokens_total") == ["{} 0.0"]
    assert _lines(text, "vllm:request_queue_time_seconds_count") == ["{} 0.0"]


def test_tokens_per_step_are_those_computed_and_put_out() -> None:
    metrics = Metrics("tiny", EngineStats)
    metrics.observe_step(EngineStats(num_steps=1, num_prompt_tokens=100, num_cached_tokens=64))
    metrics.observe_step(EngineStats(num_steps=2, num_prompt_tokens=100, num_cached_tokens=64, num_output_tokens=5))
    metrics.observe_step(EngineStats(num_steps=2, num_prompt_tokens=100, num_cached_tokens=64, num_output_tokens=5))
    text = metrics.render().decode()
    assert _lines(text, "vllm:iteration_tokens_total_count") == ["{} 2.0"]
    assert _lines(text, "vllm:iteration_tokens_total_sum") == ["{} 41.0"]


def test_the_sizes_of_the_cache_are_labels() -> None:
    ready = Ready(256, 400, (2,), 1, dtype="bfloat16", page_size=16, num_pages=99, num_checkpoints=0)
    text = Metrics("tiny", EngineStats, ready).render().decode()
    labels = 'block_size="16",cache_dtype="bfloat16",enable_prefix_caching="False",engine="0",model_name="tiny"'
    assert f'vllm:cache_config_info{{{labels},num_gpu_blocks="99"}} 1.0' in text


def test_steps_are_heard_of_while_requests_run(serving: Serving) -> None:
    serving.complete([5, 6, 7], max_tokens=10)
    assert serving.gauge("vllm:iteration_tokens_total_count") == serving.client.stats.num_steps > 0


@pytest.mark.parametrize("num_requests", [1, 5])
def test_counters_rise_by_exactly_what_was_served(serving: Serving, num_requests: int) -> None:
    for _ in range(num_requests):
        serving.complete([5, 6, 7], max_tokens=9)
    assert serving.gauge("vllm:generation_tokens_total") == num_requests * 9
    assert serving.gauge("vllm:prompt_tokens_total") == num_requests * 3
    line = 'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"}'
    assert f"{line} {num_requests}.0" in serving.http.get("/metrics").text


def test_names_that_dashboards_query_are_there(serving: Serving) -> None:
    """As scraped; before the first request, too."""
    text = serving.http.get("/metrics").text
    for name in DASHBOARD_NAMES:
        assert f"\n# TYPE vllm:{name} " in text, name
    assert "\n# TYPE http_requests_total counter" in text
    assert "\n# TYPE process_resident_memory_bytes gauge" in text


def test_the_weights_that_serve_are_told_and_how_drafts_fare_with_them() -> None:
    stats = EngineStats(
        weight_version="8",
        mtp_weight_version="7",
        mtp_stale=True,
        is_paused=True,
        num_weight_updates=3,
        drafts_by_version={"7": ((9, 9), (9, 9)), "8": ((4, 0), (3, 0))},
    )
    text = Metrics("tiny", lambda: stats).render().decode()
    labels = 'engine="0",model_name="tiny"'
    lines = [
        f'tandem:weights_info{{{labels},mtp_weight_version="7",weight_version="8"}} 1.0',
        f"tandem:mtp_stale{{{labels}}} 1.0",
        f"tandem:is_paused{{{labels}}} 1.0",
        f"tandem:weight_updates_total{{{labels}}} 3.0",
        f'tandem:spec_decode_acceptance_per_pos_since_update{{{labels},position="0"}} 0.75',
        f'tandem:spec_decode_acceptance_per_pos_since_update{{{labels},position="1"}} 0.0',
    ]
    assert [line for line in lines if line not in text.splitlines()] == []
    assert text.count("tandem:weights_info{") == 1
    assert not any(f"vllm:{name}" in text for name in ("weights_info", "mtp_stale", "is_paused", "weight_updates"))
