"""One choice, output by output."""

import pytest

from server.api.generation import Choice, Delta, Generation, Job, StepSpec
from server.api.metrics import Metrics
from server.api.terms import Terms
from server.messages import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_STOP,
    EngineStats,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from server.tokenizer import Detokenizer, Tokenizer


@pytest.fixture
def metrics() -> Metrics:
    """Metrics of an idle engine."""
    return Metrics("tiny", EngineStats)


def _choice(tokenizer: Tokenizer, metrics: Metrics, sampling: SamplingParams) -> Choice:
    return Choice(3, Detokenizer(tokenizer, sampling), metrics.start_request(5, sampling))


def test_the_first_token_was_there_as_long_ago_as_the_engine_says(tokenizer: Tokenizer, metrics: Metrics) -> None:
    choice = _choice(tokenizer, metrics, SamplingParams())
    choice.take(TokenOutput("r", [5, 6, 7], num_steps=2, age=5.0))
    assert choice.clock.decode_seconds is not None
    choice.take(TokenOutput("r", [8], num_steps=3))
    assert 5.0 <= choice.clock.decode_seconds < 6.0


def test_an_output_becomes_a_delta_with_its_text(tokenizer: Tokenizer, metrics: Metrics) -> None:
    ids = tokenizer.encode("the fox")
    delta = _choice(tokenizer, metrics, SamplingParams()).take(TokenOutput("r", ids))
    assert delta == Delta(3, "the fox", ids, [], None, None, [], StepSpec(0, 0, "p" * len(ids)))


def test_text_held_back_comes_with_the_end(tokenizer: Tokenizer, metrics: Metrics) -> None:
    choice = _choice(tokenizer, metrics, SamplingParams(stop=("fox!",)))
    assert choice.take(TokenOutput("r", tokenizer.encode("the fox"))).text == "the "
    last = choice.take(TokenOutput("r", [], finish_reason=FINISH_LENGTH))
    assert (last.text, last.finish_reason) == ("fox", FINISH_LENGTH)


def test_an_unfinished_character_comes_with_the_end(tokenizer: Tokenizer, metrics: Metrics) -> None:
    ids = tokenizer.encode("😀")[:-1]
    choice = _choice(tokenizer, metrics, SamplingParams())
    assert choice.take(TokenOutput("r", ids)).text == ""
    assert choice.take(TokenOutput("r", [], finish_reason=FINISH_LENGTH)).text == tokenizer.decode(ids)


def test_a_stop_string_wins_over_the_engines_reason_and_cuts_the_tokens(tokenizer: Tokenizer, metrics: Metrics) -> None:
    ids = tokenizer.encode("the quick brown fox")
    choice = _choice(tokenizer, metrics, SamplingParams(stop=("quick",)))
    delta = choice.take(TokenOutput("r", ids, finish_reason=FINISH_LENGTH, num_proposed=9, num_accepted=4))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("the ", FINISH_STOP, "quick")
    assert delta.token_ids == ids[: choice.num_tokens] != ids


def test_drafts_after_a_stop_string_do_not_count(tokenizer: Tokenizer, metrics: Metrics) -> None:
    first, *others = tokenizer.encode("the quick brown fox")
    for num_used in range(1, 6):
        stop = tokenizer.decode(others[:num_used])
        choice = _choice(tokenizer, metrics, SamplingParams(stop=(stop,)))
        choice.take(TokenOutput("r", [first]))
        choice.take(TokenOutput("r", others[:6], num_steps=1, num_proposed=8, num_accepted=5))
        assert choice.finish_reason == FINISH_STOP
        assert choice.num_tokens == 1 + num_used
        assert (choice.num_proposed, choice.num_accepted) == (num_used, min(num_used, 5))


def test_drafts_of_earlier_steps_count_whole_when_a_stop_string_cuts_a_later_one(
    tokenizer: Tokenizer, metrics: Metrics
) -> None:
    ids = tokenizer.encode("the quick brown fox")
    choice = _choice(tokenizer, metrics, SamplingParams(stop=(tokenizer.decode(ids[3:4]),)))
    choice.take(TokenOutput("r", ids[:2], num_proposed=4, num_accepted=1))
    choice.take(TokenOutput("r", ids[2:6], num_proposed=8, num_accepted=4))
    assert choice.num_tokens == 4
    assert (choice.num_proposed, choice.num_accepted) == (6, 3)


def test_an_end_without_tokens_leaves_all_counts_as_they_are(tokenizer: Tokenizer, metrics: Metrics) -> None:
    choice = _choice(tokenizer, metrics, SamplingParams(stop=("never",), logprobs=1))
    choice.take(TokenOutput("r", [5], num_proposed=4, num_accepted=1, num_cached=3))
    last = choice.take(TokenOutput("r", [], [], FINISH_ABORT, num_proposed=4, num_accepted=1, num_cached=3))
    assert (last.token_ids, last.logprobs, last.finish_reason) == ([], [], FINISH_ABORT)
    assert (choice.num_tokens, choice.num_proposed, choice.num_accepted, choice.num_cached) == (1, 4, 1, 3)
    choice.close()
    assert b'tandem:num_requests_aborted_total{engine="0",model_name="tiny"} 1.0' in metrics.render()


def test_no_more_cached_tokens_are_counted_than_the_prompts_have(make_serving) -> None:
    services = make_serving().services
    job = Job(prompts=[[5, 6], [7] * 9], sampling=SamplingParams(), n=2, terms=Terms(), stream=False)
    generation = Generation(job, services.tokenizer, services.client, services.metrics)
    for choice, num_cached in zip(generation.choices, (50, 1, 4, 8), strict=True):
        choice.take(TokenOutput("r", [5], num_cached=num_cached))
    assert generation.usage()["prompt_tokens_details"] == {"cached_tokens": 2 + 4}


def test_a_choice_closed_before_its_end_counts_as_aborted(tokenizer: Tokenizer, metrics: Metrics) -> None:
    ended, left = (_choice(tokenizer, metrics, SamplingParams()) for _ in range(2))
    ended.take(TokenOutput("r", [5], finish_reason=FINISH_LENGTH))
    for choice in (ended, left):
        choice.close()
    assert b'tandem:num_requests_aborted_total{engine="0",model_name="tiny"} 1.0' in metrics.render()


def test_spans_of_versions_join_and_leave_nothing_out(tokenizer: Tokenizer, metrics: Metrics) -> None:
    choice = _choice(tokenizer, metrics, SamplingParams())
    assert choice.version_spans() == []
    told = [("a", 1), ("a", 2), ("b", 0), ("a", 1), ("c", 0), ("d", 3)]
    for version, count in told:
        if choice.weight_version != version:
            choice.begin_version(version)
        choice.take(TokenOutput("r", [5] * count))
    expected = [{"version": "a", "start": 0, "end": 4}, {"version": "d", "start": 4, "end": 7}]
    assert choice.version_spans() == expected
    choice.begin_version("e")
    assert choice.version_spans() == expected and choice.weight_version == "e"


def test_a_span_ends_where_a_stop_string_cuts(tokenizer: Tokenizer, metrics: Metrics) -> None:
    first, *others = tokenizer.encode("the quick brown fox")
    choice = _choice(tokenizer, metrics, SamplingParams(stop=(tokenizer.decode(others[:2]),)))
    for version, ids in (("a", [first]), ("b", others[:6])):
        choice.begin_version(version)
        choice.take(TokenOutput("r", ids))
    assert [(span["start"], span["end"]) for span in choice.version_spans()] == [(0, 1), (1, 3)]


def test_every_token_of_a_step_has_an_origin(tokenizer: Tokenizer, metrics: Metrics) -> None:
    choice = _choice(tokenizer, metrics, SamplingParams())
    specs = [
        choice.take(TokenOutput("r", ids, [], None, None, *counts)).spec
        for ids, counts in (([5], (0, 0, 0)), ([5] * 3, (1, 3, 2)), ([5], (2, 3, 2)), ([5] * 2, (3, 6, 4)))
    ]
    assert specs == [StepSpec(0, 0, "p"), StepSpec(2, 3, "ddt"), StepSpec(0, 0, "t"), StepSpec(2, 3, "dd")]
    assert choice.drafted_steps == [(3, 2), (3, 2)]


def test_origins_end_where_a_stop_string_cuts(tokenizer: Tokenizer, metrics: Metrics) -> None:
    first, *others = tokenizer.encode("the quick brown fox")
    choice = _choice(tokenizer, metrics, SamplingParams(stop=(tokenizer.decode(others[:2]),)))
    choice.take(TokenOutput("r", [first]))
    delta = choice.take(TokenOutput("r", others[:6], num_steps=1, num_proposed=8, num_accepted=5))
    assert delta.spec == StepSpec(2, 2, "dd")


def test_the_first_delta_has_the_prompts_log_probabilities(tokenizer: Tokenizer, metrics: Metrics) -> None:
    choice = _choice(tokenizer, metrics, SamplingParams(prompt_logprobs=1))
    scores = [TokenLogprobs(-1.0, [7], [-0.5], 2)]
    assert choice.take(TokenOutput("r", [5], prompt_logprobs=scores)).prompt_logprobs == scores
    assert choice.take(TokenOutput("r", [5])).prompt_logprobs == []


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_text_that_is_complete_ends_the_choice_at_its_token(tokenizer: Tokenizer, metrics: Metrics, cut: int) -> None:
    ids = tokenizer.encode("the quick brown fox")
    seen: list[str] = []

    def is_complete(text: str) -> bool:
        seen.append(text)
        return len(seen) == cut

    choice = Choice(
        0, Detokenizer(tokenizer, SamplingParams()), metrics.start_request(5, SamplingParams()), is_complete
    )
    deltas = [choice.take(TokenOutput("r", ids[:2], num_proposed=0))] if cut > 2 else []
    start = len(seen)
    deltas.append(choice.take(TokenOutput("r", ids[start:], num_steps=1, num_proposed=7, num_accepted=6)))
    assert [token_id for delta in deltas for token_id in delta.token_ids] == ids[:cut]
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(ids[:cut])
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason, choice.num_tokens) == (FINISH_STOP, None, cut)
    assert choice.num_proposed == min(7, cut - start)
