"""What an answer says of its speed and its drafts."""

import pytest

from server.api.generation import Choice, StepSpec
from server.api.metrics import RequestClock
from server.api.speculation_report import report_metrics, report_spec, report_timings
from server.messages import FINISH_LENGTH, SamplingParams, TokenOutput
from server.tokenizer import Detokenizer, Tokenizer


class FixedClock(RequestClock):
    """A request that waited a quarter of a second, had its first token after one and its last after three."""

    first_token_seconds = 1.0
    decode_seconds = 2.0
    num_tokens = 9
    queue_seconds = 0.25

    def __init__(self) -> None:
        pass

    def count_tokens(self, num_tokens: int, queue_seconds: float = 0.0, num_steps: int = 0, age: float = 0.0) -> None:
        """Nothing."""

    def end(self, finish_reason: str) -> None:
        """Nothing."""


class UnusedClock(FixedClock):
    """A request without a token."""

    first_token_seconds = decode_seconds = queue_seconds = None  # type: ignore[assignment]
    num_tokens = 0


@pytest.fixture
def choice(tokenizer: Tokenizer) -> Choice:
    """A prefill, a step with two of three drafts, one with none of two, one without drafts, one with all three."""
    choice = Choice(0, Detokenizer(tokenizer, SamplingParams()), FixedClock())
    for num_tokens, *counts in ((1, 0, 0, 0), (3, 1, 3, 2), (1, 2, 5, 2), (1, 3, 5, 2), (3, 4, 8, 5)):
        choice.take(
            TokenOutput("r", [70] * num_tokens, [], FINISH_LENGTH if counts[0] == 4 else None, None, *counts, 4)
        )
    return choice


def test_times_are_in_milliseconds_and_throughput_counts_from_the_first_row(choice: Choice) -> None:
    metrics = report_metrics(choice, 3, is_detailed=False)
    assert metrics["time_to_first_token_ms"] == 1000
    assert metrics["generation_time_ms"] == 2000
    assert metrics["queue_time_ms"] == 250
    assert metrics["mean_itl_ms"] == 250
    assert metrics["tokens_per_second"] == pytest.approx(9 / 2.75)


def test_acceptance_counts_the_steps_that_had_drafts(choice: Choice) -> None:
    found = report_metrics(choice, 3, is_detailed=False)["speculative_decoding"]
    assert found == {
        "mean_acceptance_length": pytest.approx(1 + 5 / 3),
        "draft_acceptance_rate": 5 / 8,
        "acceptance_histogram": [1, 0, 1, 1],
        "num_spec_steps": 3,
        "num_accepted_draft_tokens": 5,
        "num_draft_tokens": 8,
        "num_spec_tokens": 3,
    }
    detailed = report_metrics(choice, 3, is_detailed=True)["speculative_decoding"]
    assert detailed == {**found, "per_step_accepted": [2, 0, 3], "per_step_drafted": [3, 2, 3]}


def test_without_a_draft_head_there_is_no_acceptance(choice: Choice) -> None:
    assert report_metrics(choice, 0, is_detailed=True)["speculative_decoding"] is None


def test_timings_count_what_was_computed_of_the_prompt(choice: Choice) -> None:
    assert report_timings(choice, 10) == {
        "prompt_n": 6,
        "prompt_ms": 750,
        "predicted_n": 9,
        "predicted_ms": 2000,
        "predicted_per_second": 4.0,
        "draft_n": 8,
        "draft_n_accepted": 5,
    }


def test_a_request_without_tokens_has_no_times(tokenizer: Tokenizer) -> None:
    choice = Choice(0, Detokenizer(tokenizer, SamplingParams()), UnusedClock())
    metrics = report_metrics(choice, 2, is_detailed=False)
    acceptance = metrics.pop("speculative_decoding")
    assert set(metrics.values()) == {None}
    assert (acceptance["mean_acceptance_length"], acceptance["draft_acceptance_rate"]) == (1, 0)
    timings = report_timings(choice, 3)
    assert timings.pop("prompt_n") == 3
    assert set(timings.values()) == {0}


def test_the_origins_of_steps_are_joined() -> None:
    steps = [StepSpec(0, 0, "p"), StepSpec(2, 3, "ddt"), StepSpec(0, 3, "t")]
    assert report_spec(steps) == {"accepted": 2, "proposed": 6, "origins": "pddtt"}
