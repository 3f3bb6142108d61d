"""Every figure of rounds with known times is exact."""

import pytest

from benchmarks.serving.summary import describe_failures, meets, summarize
from unit_tests.benchmarks.serving.answers import answered, failed, round_of, speculation

# 1, 2 and 1 tokens half a second and a quarter apart; 3 tokens at once; one token.
LONG, BURST, SHORT = answered((0.5, 1), (1.0, 2), (1.25, 1)), answered((0.25, 3)), answered((2.0, 1))


def test_latencies_are_in_milliseconds_and_percentiles_are_values_that_occurred() -> None:
    summary = summarize([round_of(LONG, BURST), round_of(SHORT)], {})
    assert summary["ttft_ms"] == {"mean": 2750 / 3, "p50": 500.0, "p90": 2000.0, "p99": 2000.0}
    assert summary["e2e_ms"] == {"mean": 3500 / 3, "p50": 1250.0, "p90": 2000.0, "p99": 2000.0}
    assert summary["tpot_ms"] == {"mean": 125.0, "p50": 0.0, "p90": 250.0, "p99": 250.0}
    assert summary["itl_event_ms"] == {"mean": 375.0, "p50": 250.0, "p90": 500.0, "p99": 500.0}
    assert summary["itl_token_ms"] == {"mean": 250.0, "p50": 250.0, "p90": 250.0, "p99": 250.0}
    assert summary["tokens_per_event"] == 8 / 5


def test_speeds_are_over_the_seconds_of_all_rounds() -> None:
    summary = summarize([round_of(LONG, BURST, seconds=3.0), round_of(SHORT, seconds=1.0)], {})
    assert (summary["requests"], summary["seconds"], summary["requests_s"]) == (3, 4.0, 0.75)
    assert (summary["output_tokens"], summary["output_tok_s"]) == (8, 2.0)
    assert (summary["input_tokens"], summary["cached_tokens"], summary["total_tok_s"]) == (30, 12, 9.5)
    assert summary["client_cpu"] == 0.25 and summary["goodput_requests_s"] is None


def test_what_a_server_does_not_tell_is_not_guessed() -> None:
    by_events = answered((0.5, 1), (1.0, 1))
    by_events.events = [event._replace(num_so_far=None) for event in by_events.events]
    summary = summarize([round_of(by_events, LONG, answered((1.0, 1), prompt=None))], {})
    assert summary["itl_token_ms"] is None and summary["itl_event_ms"]["p50"] == 500.0
    assert summary["input_tokens"] is summary["cached_tokens"] is summary["total_tok_s"] is None
    assert summary["event_tokens_counted_by"] == "continuous usage, events"
    assert summary["accept_length"] is summary["tokens_of_others"] is None


@pytest.mark.parametrize(
    ("goals", "good"),
    [({"ttft": 500}, 2), ({"ttft": 499}, 1), ({"tpot": 249}, 2), ({"ttft": 2000, "e2e": 1250}, 2), ({"e2e": 1}, 0)],
)
def test_goodput_counts_requests_that_meet_every_goal(goals: dict[str, float], good: int) -> None:
    summary = summarize([round_of(LONG, BURST, SHORT, failed("timeout", "x"), seconds=2.0)], goals)
    assert summary["goodput_requests_s"] == good / 2
    assert sum(meets(answer, goals) for answer in (LONG, BURST, SHORT)) == good


def test_failures_are_counted_by_reason_with_the_first_example_of_each() -> None:
    answers = [failed("HTTP 429", "full"), failed("timeout", "late"), failed("HTTP 429", "full again"), LONG]
    assert describe_failures(answers) == {
        "HTTP 429": {"count": 2, "example": "full"},
        "timeout": {"count": 1, "example": "late"},
    }
    summary = summarize([round_of(*answers, num_cut=2)], {})
    assert (summary["requests"], summary["failed"], summary["cut"], summary["output_tokens"]) == (1, 3, 2, 4)


def test_a_server_that_answered_nothing_has_no_latencies() -> None:
    summary = summarize([round_of(failed("timeout", "late"))], {"ttft": 100})
    assert summary["ttft_ms"] is summary["tpot_ms"] is summary["itl_token_ms"] is summary["tokens_per_event"] is None
    assert summary["output_tok_s"] == summary["goodput_requests_s"] == 0


def test_acceptance_is_that_of_all_rounds_together() -> None:
    first = round_of(LONG, counters=speculation(10, 20, [8, 4], 4))
    second = round_of(BURST, counters=speculation(30, 60, [24, 6], 9))
    summary = summarize([first, second], {})
    assert (summary["accept_length"], summary["acceptance"], summary["drafts_per_step"]) == (1 + 42 / 40, 42 / 80, 2.0)
    assert summary["acceptance_per_position"] == [32 / 40, 10 / 40] and summary["tokens_of_others"] == 6
    assert summarize([first, round_of(BURST, num_cut=1, counters=second.counters)], {})["tokens_of_others"] is None
