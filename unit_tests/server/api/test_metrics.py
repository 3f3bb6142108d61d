"""Counts are exact, and the well-known names are there."""

from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_transport import run_and_leave


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


def test_speculation_is_counted_as_the_engine_counts_it(serving: Serving) -> None:
    usage = serving.complete([5, 6, 7], max_tokens=8)["usage"]["completion_tokens_details"]
    accepted, rejected = usage["accepted_prediction_tokens"], usage["rejected_prediction_tokens"]
    assert serving.gauge("vllm:spec_decode_num_drafts_total") == 3
    assert serving.gauge("vllm:spec_decode_num_accepted_tokens_total") == accepted
    assert serving.gauge("vllm:spec_decode_num_draft_tokens_total") == accepted + rejected
    text = serving.http.get("/metrics").text
    assert 'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="1"}' in text


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
