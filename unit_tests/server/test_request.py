"""A request on the host: what it may emit, what ends it, and what it remembers."""

import pytest

from server.messages import Generate, SamplingParams
from server.request import Request


def make_request(prompt_len: int = 4, max_model_len: int = 20, **sampling: object) -> Request:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    return Request.create(Generate("a", list(range(prompt_len)), params), (90, 91), max_model_len)


@pytest.mark.parametrize(("max_tokens", "expected"), [(None, 16), (5, 5), (16, 16), (40, 16)])
def test_the_output_fits_the_context_and_max_tokens(max_tokens: int | None, expected: int) -> None:
    assert make_request(max_tokens=max_tokens).max_output == expected


def test_stop_ids_are_the_requests_and_the_checkpoints_unless_ignored() -> None:
    assert make_request(stop_token_ids=(7, 90)).stop_ids == {7, 90, 91}
    assert make_request(stop_token_ids=(7,), ignore_eos=True).stop_ids == {7}


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


def test_forgetting_the_device_keeps_tokens_and_counts() -> None:
    request = make_request()
    request.emit([7])
    request.row, request.pages, request.num_computed, request.is_decoding = 3, [1, 2], 4, True
    request.num_steps, request.num_proposed, request.num_accepted = 2, 6, 1
    request.forget_device_state()
    assert (request.row, request.pages, request.num_computed, request.is_decoding) == (None, [], 0, False)
    assert request.known_ids(0, 9) == [0, 1, 2, 3, 7]
    assert (request.num_steps, request.num_proposed, request.num_accepted) == (2, 6, 1)


def test_requests_with_equal_fields_are_two() -> None:
    assert make_request(seed=1) != make_request(seed=1)
