"""A request on the host: what it may emit, what ends it, and what it remembers."""

import dataclasses
import math
import random

import pytest

from server.messages import Constraint, Generate, SamplingParams, TokenLogprobs
from server.request import Batch, Request, Work


def make_request(prompt_len: int = 4, max_model_len: int = 20, **sampling: object) -> Request:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    return Request.create(Generate("a", list(range(prompt_len)), params), (90, 91), max_model_len)


@pytest.mark.parametrize(("max_tokens", "expected"), [(None, 16), (5, 5), (16, 16), (40, 16)])
def test_the_output_fits_the_context_and_max_tokens(max_tokens: int | None, expected: int) -> None:
    assert make_request(max_tokens=max_tokens).max_output == expected


def test_stop_ids_are_the_requests_and_the_checkpoints_unless_ignored() -> None:
    assert make_request(stop_token_ids=(7, 90)).stop_ids == {7, 90, 91}
    assert make_request(stop_token_ids=(7,), ignore_eos=True).stop_ids == {7}
    assert make_request(ignore_eos=True, constraint=Constraint("regex", "a")).stop_ids == {90, 91}


def test_a_seed_is_kept_and_an_unseeded_request_gets_a_fresh_one() -> None:
    assert make_request(seed=0).seed == 0
    assert make_request(seed=-5).seed == -5
    seeds = {make_request().seed for _ in range(50)}
    assert len(seeds) == 50 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5], ([5], None)),
        ([5, 6], ([5, 6], None)),
        ([5, 6, 5], ([5, 6, 5], "length")),
        ([5, 6, 5, 6], ([5, 6, 5], "length")),
        ([90, 5], ([90], "stop")),
        ([5, 91, 90], ([5, 91], "stop")),
        ([5, 6, 90, 5], ([5, 6, 90], "stop")),
        ([5, 6, 5, 90], ([5, 6, 5], "length")),
    ],
)
def test_tokens_are_emitted_up_to_the_one_that_ends_the_request(
    tokens: list[int], expected: tuple[list[int], str | None]
) -> None:
    request = make_request(max_tokens=3)
    assert request.emit(tokens) == expected
    assert request.output_ids == expected[0]


def test_a_request_for_no_tokens_emits_none() -> None:
    request = make_request(max_tokens=0)
    assert request.emit([5, 90]) == ([], "length")
    assert request.output_ids == [] and request.surely_ends


def test_scores_are_wanted_of_the_prompt_alone_and_told_once() -> None:
    request = make_request(prompt_len=6, prompt_logprobs=1)
    scores = [TokenLogprobs(-float(position), [], []) for position in range(5)]
    assert [request.count_scored(*span) for span in ((0, 4), (4, 6), (5, 6), (4, 9))] == [4, 1, 0, 1]
    request.keep_scores(0, scores[:4])
    request.keep_scores(2, scores[2:5])  # computed again, in other chunks
    request.emit([7])
    assert request.make_output(None, 0.0).prompt_logprobs == scores
    assert not request.wants_scores and request.count_scored(0, 6) == 0
    assert request.make_output("abort", 0.0).prompt_logprobs == []
    assert make_request(prompt_len=6).count_scored(0, 6) == 0


def test_the_time_in_the_queue_ends_with_the_first_row() -> None:
    request = make_request()
    request.added_at = 5.0
    request.enter_row(1, num_computed=0, now=7.5)
    request.leave_row()
    request.enter_row(1, num_computed=0, now=9.0)
    assert request.make_output(None, 9.5).queue_seconds == 2.5


def test_what_is_kept_back_is_told_once_with_its_age_and_the_drafts_of_each_step() -> None:
    request, entries = make_request(), [TokenLogprobs(-float(i), [i], []) for i in range(4)]
    for moment, count in ((1.0, 1), (1.5, 2)):
        emitted, _ = request.emit([5, 6][:count])
        request.logprobs += entries[: len(emitted)]
        request.drafted_steps += [(2, 1)] if count > 1 else []
        request.keep_back(moment)
    assert request.has_untold
    told = request.make_output(None, 3.0)
    assert (told.token_ids, told.logprobs) == ([5, 5, 6], [entries[0], *entries[:2]])
    assert (told.age, told.drafted_steps, request.has_untold) == (2.0, [(2, 1)], False)
    request.emit([90])
    last = request.make_output("stop", 4.0)
    assert (last.token_ids, last.logprobs, last.age, last.drafted_steps) == ([90], [], 0.0, [])
    assert request.output_ids == [5, 5, 6, 90]


def test_the_length_limit_counts_over_all_steps() -> None:
    request = make_request(max_tokens=5)
    assert [request.emit([1, 2])[1] for _ in range(3)] == [None, None, "length"]
    assert request.output_ids == [1, 2, 1, 2, 1]


def test_known_ids_are_slices_of_prompt_and_output() -> None:
    request = make_request(prompt_len=3)
    request.emit([7, 8])
    whole = [0, 1, 2, 7, 8]
    assert request.num_known == 5
    for start in range(6):
        for end in range(start, 8):
            assert request.known_ids(start, end) == whole[start:end]


def test_leaving_a_row_keeps_tokens_and_counts_and_forgets_the_device() -> None:
    request = make_request()
    request.emit([7])
    request.enter_row(3, num_computed=2, now=0.0)
    request.num_computed, request.num_pages_sent, request.num_behind, request.is_decoding = 4, 2, 5, True
    request.num_steps, request.num_proposed, request.num_accepted = 2, 6, 1
    request.leave_row()
    assert (request.row, request.num_computed, request.num_pages_sent, request.num_behind) == (None, 0, 0, 0)
    assert not request.is_decoding
    assert request.known_ids(0, 9) == [0, 1, 2, 3, 7]
    assert (request.num_steps, request.num_proposed, request.num_accepted) == (2, 6, 1)
    assert (request.epoch, request.num_cached) == (1, 2)


def test_every_row_that_a_request_leaves_ends_an_epoch_and_only_the_first_counts_as_cached() -> None:
    request = make_request()
    assert (request.row, request.epoch, request.num_cached) == (None, 0, None)
    request.enter_row(5, num_computed=0, now=0.0)
    assert (request.row, request.num_computed, request.epoch, request.num_cached) == (5, 0, 0, 0)
    request.leave_row()
    request.enter_row(2, num_computed=3, now=0.0)
    assert (request.row, request.num_computed, request.epoch, request.num_cached) == (2, 3, 1, 0)


def test_the_longest_length_counts_every_row_in_flight_up_to_the_requests_end() -> None:
    request = make_request(prompt_len=4, max_tokens=6)
    request.num_computed = 4
    assert request.longest_len == 4
    request.widths_in_flight.append(0)  # the end of the prefill: a token, but no row of the cache
    assert request.longest_len == 4
    request.widths_in_flight += [1, 3]
    assert request.longest_len == 8
    request.widths_in_flight.append(4)
    assert request.longest_len == 10  # 4 + 6, not 12


def test_no_lengths_that_come_true_exceed_the_longest_one() -> None:
    """Plans two steps ahead of the results, as the engine does, with every width and any number of accepted tokens."""
    rng = random.Random(0)
    for _ in range(200):
        request = make_request(prompt_len=3, max_tokens=rng.randint(1, 12))
        request.num_computed = 3
        request.widths_in_flight.append(0)
        has_ended = False
        while not has_ended:
            if not request.surely_ends:
                request.widths_in_flight.append(rng.randint(1, 4))
            bound = request.longest_len
            width = request.widths_in_flight.pop(0)
            emitted, reason = request.emit([5] * rng.randint(1, max(1, width)))
            request.num_computed += len(emitted) if width else 0
            has_ended = reason is not None
            assert request.num_computed <= bound <= 3 + request.max_output
        assert len(request.output_ids) == request.max_output


@pytest.mark.parametrize(
    ("num_output", "num_flying", "expected"), [(0, 4, False), (0, 5, True), (3, 1, False), (3, 2, True)]
)
def test_a_request_surely_ends_when_one_token_per_pass_in_flight_is_enough(
    num_output: int, num_flying: int, expected: bool
) -> None:
    request = make_request(max_tokens=5)
    request.emit([7] * num_output)
    request.widths_in_flight += [4] * num_flying
    assert request.surely_ends is expected


def test_prompt_tokens_are_counted_once_however_often_they_are_computed() -> None:
    request = make_request(prompt_len=10)
    counts = []
    for num_computed in (4, 4, 10, 12):
        request.num_computed = num_computed
        counts.append(request.count_prompt())
    request.leave_row()
    for num_computed in (0, 6, 10):
        request.num_computed = num_computed
        counts.append(request.count_prompt())
    assert counts == [4, 0, 6, 0, 0, 0, 0]


def test_a_message_hands_over_priority_salt_and_deadline() -> None:
    message = Generate("a", [1, 2], SamplingParams(), priority=-3, cache_salt="tenant")
    request = Request.create(message, (), 20, deadline=7.5)
    assert (request.priority, request.cache_salt, request.deadline) == (-3, "tenant", 7.5)
    assert Request.create(message, (), 20).deadline == math.inf


def test_a_pass_reaches_its_requests_settings_and_knows_whether_anyone_gets_a_token() -> None:
    request = make_request(temperature=0.25)
    inside, ending = (Work(request=request, row=1, num_tokens=2, ends_prompt=ends) for ends in (False, True))
    assert inside.sampling is request.sampling
    assert not Batch([inside, inside], is_verify=False).ends_any_prompt
    assert Batch([inside, ending], is_verify=False).ends_any_prompt


def test_what_happens_to_a_request_later_does_not_reach_its_planned_work() -> None:
    request = make_request()
    request.enter_row(3, num_computed=0, now=0.0)
    work = Work(request=request, row=3, num_tokens=1, epoch=request.epoch, num_behind=request.num_behind)
    request.num_behind = 9
    request.leave_row()
    request.enter_row(1, num_computed=0, now=0.0)
    assert (work.row, work.epoch, work.num_behind) == (3, 0, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        work.row = 1  # type: ignore[misc]


def test_requests_with_equal_fields_are_two() -> None:
    assert make_request(seed=1) != make_request(seed=1)
