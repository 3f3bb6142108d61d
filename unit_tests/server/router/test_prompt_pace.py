"""Prompts get the share of the time that they may have, in chunks that are worth their fixed cost."""

import math
import random
from collections.abc import Callable

import pytest

from server.router.prompt_pace import MIN_CHUNK, PassCosts, PromptPace

MOST = 512


def drive(
    pace: PromptPace,
    fixed: float,
    per_token: float,
    decode: float,
    ahead: int = 0,
    num_steps: int = 400,
    num_decoding: int = 1,
    num_waiting: int = 1,
) -> tuple[list[int], float]:
    """Steps that all decode, with prompts without end; results are known `ahead` steps late. Chunks, 0 where there was
    none, and the steps' time over that of decoding alone, both of the second half."""
    chunks: list[int] = []
    for number in range(num_steps + ahead):
        if number < num_steps:
            chunks.append(pace.budget([1] * num_decoding, num_waiting, MOST))
            pace.plan(chunks[-1], True)
        if number >= ahead:
            size = chunks[number - ahead]
            pace.collect(size, fixed + per_token * size if size else 0.0, num_decoding, decode)
    late = chunks[num_steps // 2 :]
    prefill = sum(fixed + per_token * size for size in late if size)
    return late, 1 + prefill / (decode * len(late))


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("slowdown", [1.5, 2.0, 4.0])
@pytest.mark.parametrize(
    ("fixed", "per_token", "decode"), [(0.04, 0.002, 0.05), (0.016, 9e-5, 0.02), (0.0, 0.001, 0.05)]
)
def test_decoding_is_slowed_down_as_asked_for_on_average(
    fixed: float, per_token: float, decode: float, slowdown: float, ahead: int
) -> None:
    chunks, measured = drive(PromptPace(slowdown), fixed, per_token, decode, ahead)
    assert measured == pytest.approx(slowdown, rel=0.1)
    sizes = {size for size in chunks if size}
    assert all(fixed + per_token * size >= 2.7 * fixed for size in sizes) or sizes == {512}


@pytest.mark.parametrize(
    ("num_decoding", "num_waiting", "expected"), [(15, 1, 1.5), (4, 4, 1.5), (2, 6, 2.5), (1, 15, 3.0)]
)
def test_where_more_wait_than_decode_prompts_get_as_much_more_in_chunks_of_two_decode_passes(
    num_decoding: int, num_waiting: int, expected: float
) -> None:
    counts = {"num_decoding": num_decoding, "num_waiting": num_waiting}
    _, measured = drive(PromptPace(1.5), 0.01, 0.002, 0.05, ahead=1, **counts)
    assert measured == pytest.approx(expected, rel=0.1)


def test_without_a_fixed_cost_every_step_has_a_chunk() -> None:
    chunks, _ = drive(PromptPace(2.0), 0.0, 0.001, 0.05)
    assert set(chunks) <= {49, 50, 51}


def test_where_launching_is_all_that_costs_a_chunk_is_as_long_as_it_may_be() -> None:
    """Eight milliseconds whatever is in it, beside decode passes of one: seldom, but whole."""
    chunks, measured = drive(PromptPace(2.0), 0.008, 1e-6, 0.001)
    assert set(chunks) == {0, 512} and measured == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("num_before", [0, 3, 30])
@pytest.mark.parametrize(
    ("fixed", "per_token", "decode"), [(0.0127, 0.6e-6, 0.0022), (0.0181, 9.5e-6, 0.0055), (0.0309, 1.49e-5, 0.018)]
)
def test_a_long_pass_that_was_slow_for_once_leaves_no_tiny_chunks(
    fixed: float, per_token: float, decode: float, num_before: int
) -> None:
    """As if its kernels had been compiled in the middle of it. Costs of 0.8B, 4B and 35B-A3B on a GPU."""
    pace = PromptPace(2.0)
    for number in range(num_before):
        length = (100, 1500, 700)[number % 3]
        pace.collect(length, fixed + per_token * length, 0, 0.0)
    pace.collect(1500, fixed + per_token * 1500 + 2.0, 0, 0.0)
    chunks, measured = drive(pace, fixed, per_token, decode, ahead=1)
    assert min(size for size in chunks if size) > 400 and measured == pytest.approx(2.0, rel=0.1)


def test_costs_follow_when_passes_take_longer_for_good() -> None:
    costs = PassCosts()
    for _ in range(50):
        costs.record(100, 0.01)
    for _ in range(4):
        costs.record(100, 0.3)
    assert costs.seconds(100) < 0.03
    for _ in range(100):
        costs.record(100, 0.3)
    assert costs.seconds(100) > 0.2


def drive_jointly(
    pace: PromptPace,
    per_token: float,
    counts: list[tuple[int, int]],
    ahead: int = 0,
    noise: Callable[[], float] = lambda: 1.0,
) -> tuple[list[int], list[float]]:
    """Steps of (decoding, waiting) requests, whose decode passes take 20 ms and 2 more for each request, and chunks
    that share them `per_token` seconds a token: chunks, and the steps' times over those of decoding alone."""
    steps: list[tuple[int, bool, int]] = []
    for number in range(len(counts) + ahead):
        if number < len(counts):
            num_decoding, num_waiting = counts[number]
            size = pace.budget([1] * num_decoding, num_waiting, MOST)
            pace.plan(size, num_decoding > 0)
            steps.append((size, pace.is_joint, num_decoding))
        if number >= ahead:
            size, is_joint, num_decoding = steps[number - ahead]
            seconds = noise() * decode_seconds(num_decoding)
            if is_joint:
                pace.collect_joint(size, num_decoding, seconds + per_token * size)
            else:
                pace.collect(size, 0.03 + per_token * size if size else 0.0, num_decoding, seconds)
    chunks, times = [size for size, *_ in steps], []
    for size, is_joint, count in steps:
        fixed = 0.03 if size and not is_joint else 0.0
        times.append(1 + (fixed + per_token * size) / decode_seconds(count) if count else 0.0)
    return chunks, times


def decode_seconds(num_decoding: int) -> float:
    return 0.02 + 0.002 * num_decoding if num_decoding else 0.0


def begin(slowdown: float, max_joint_tokens: int = 100) -> PromptPace:
    """A pace that has seen one prompt."""
    pace = PromptPace(slowdown, max_joint_tokens)
    pace.collect(100, 0.13, 0, 0.0)
    return pace


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(("slowdown", "size"), [(1.5, 20), (2.0, 40), (3.0, 80)])
def test_chunks_that_share_the_decode_pass_come_in_every_step_but_those_that_tell_what_it_takes_alone(
    slowdown: float, size: int, ahead: int
) -> None:
    chunks, times = drive_jointly(begin(slowdown), 0.001, [(10, 1)] * 400, ahead)
    assert sum(times[200:]) / 200 == pytest.approx(slowdown, rel=0.05)
    assert set(chunks[300:]) <= {0, *range(size - 2, size + 2)} and chunks[300:].count(0) in (2, 3, 4)


@pytest.mark.parametrize(
    "counts",
    [
        [(1 + number % 2, 1) for number in range(300)],
        [(count, 1) for count in (1, 16, 5, 9, 2, 16) for _ in range(50)],
        [(2, 1), (2, 1), (0, 1)] * 100,
        [(random.Random(1).randint(1, 16), 3) for _ in range(300)],
    ],
    ids=["one comes and goes", "batches grow and shrink", "nobody in between", "any number"],
)
def test_what_decode_passes_of_any_size_take_is_known_from_those_that_ran_alone(counts: list[tuple[int, int]]) -> None:
    pace = begin(2.0)
    drive_jointly(pace, 0.001, [(1 + number % 16, 0) for number in range(32)])
    chunks, times = drive_jointly(pace, 0.001, counts)
    found = [one for (count, _), one in zip(counts, times, strict=True) if count][-100:]
    assert 1.8 < sum(found) / len(found) < 2.6 and max(found) < 3.1
    assert chunks[100:].count(0) <= 10


def test_a_first_decode_pass_that_was_slow_for_once_is_forgotten() -> None:
    pace = begin(2.0)
    pace.collect(0, 0.0, 10, 3 * decode_seconds(10))
    _, times = drive_jointly(pace, 0.001, [(10, 1)] * 300)
    assert max(times) <= 4.1 and sum(times[30:130]) / 100 < 2.5 and sum(times[200:]) / 100 < 2.25


def test_passes_that_scatter_do_not_let_chunks_grow() -> None:
    rng = random.Random(0)
    _, times = drive_jointly(begin(2.0), 0.001, [(10, 1)] * 600, ahead=1, noise=lambda: rng.uniform(0.8, 1.2))
    assert sum(times[200:]) / 400 == pytest.approx(2.0, rel=0.1) and max(times[200:]) < 2.7


def test_what_is_a_little_too_long_to_share_a_pass_is_cut_to_what_may() -> None:
    """Beside decode passes of 40 ms: 120 tokens are wanted at 4 times of that, 440 at 12 times."""
    little, _ = drive_jointly(begin(4.0), 0.001, [(10, 1)] * 300)
    assert set(little[100:]) == {0, 100}
    much, _ = drive_jointly(begin(12.0), 0.001, [(10, 1)] * 300)
    assert min(set(much[100:]) - {0}) > 150, "a pass of its own"


def test_the_seconds_due_to_those_who_decode_are_told() -> None:
    pace = begin(2.0)
    drive_jointly(pace, 0.001, [(10, 1)] * 200)
    assert pace.collect_joint(40, 10, 0.08) == pytest.approx(0.04, rel=0.05)
    assert pace.collect_joint(40, 10, 0.10) == pytest.approx(0.06, rel=0.05), "a slow decode pass, perhaps of drafts"


def test_without_a_limit_decode_passes_run_alone_now_and_then_too() -> None:
    chunks, _ = drive_jointly(PromptPace(math.inf, MOST), 0.001, [(10, 1)] * 200)
    assert set(chunks) == {0, MOST} and 5 <= chunks.count(0) <= 16


def test_a_chunk_too_long_to_share_a_pass_is_none_of_it() -> None:
    pace = PromptPace(2.0, max_joint_tokens=100)
    pace.plan(100, True)
    assert pace.is_joint
    for num_tokens, has_decode in ((101, True), (100, False), (0, True)):
        pace.plan(num_tokens, has_decode)
        assert not pace.is_joint


def test_prompts_do_not_starve_where_nothing_may_be_slowed_down() -> None:
    chunks, measured = drive(PromptPace(1.0), 0.04, 0.002, 0.05, num_steps=4000)
    assert 1.0 < measured < 1.1 and any(chunks)


def test_an_infinite_slowdown_and_steps_without_decoding_take_whole_chunks() -> None:
    assert drive(PromptPace(math.inf), 0.04, 0.002, 0.05)[0] == [512] * 200
    pace = PromptPace(2.0)
    for _ in range(5):
        assert pace.budget([], 1, MOST) == 512
        pace.plan(512, False)
        pace.collect(512, 1.0, 0, 0.0)


def test_what_was_owed_is_forgotten_once_nobody_decodes() -> None:
    pace = PromptPace(2.0)
    pace.plan(512, True)
    pace.collect(512, 1.0, 1, 0.05)
    assert pace.budget([1], 1, MOST) == 0
    pace.plan(300, False)
    pace.collect(300, 0.5, 0, 0.0)
    assert pace.budget([1], 1, MOST) >= MIN_CHUNK


def test_a_pass_that_was_slow_for_once_keeps_prompts_waiting_for_64_steps_at_most() -> None:
    pace = PromptPace(2.0)
    pace.plan(512, True)
    pace.collect(512, 30.0, 1, 0.02)
    waits = 0
    while not pace.budget([1], 1, MOST):
        pace.plan(0, True)
        pace.collect(0, 0.0, 1, 0.02)
        waits += 1
    assert waits == 64


def test_a_clock_that_does_not_tick_stops_nobody() -> None:
    pace = PromptPace(2.0)
    for _ in range(6):
        size = pace.budget([1], 1, MOST)
        pace.plan(size, True)
        pace.collect(size, 0.0, 1, 0.0)
        assert size > 0
    pace, sizes = PromptPace(2.0, max_joint_tokens=MOST), []
    for _ in range(70):
        sizes.append(pace.budget([1], 1, MOST))
        pace.plan(sizes[-1], True)
        if pace.is_joint:
            pace.collect_joint(sizes[-1], 1, 0.0)
        else:
            pace.collect(sizes[-1], 0.0, 1, 0.0)
    assert sizes.count(0) < 10


def test_a_chunk_is_at_most_twice_as_long_as_the_one_before_however_many_come_to_wait() -> None:
    pace = PromptPace(1.5)
    chunks, _ = drive(pace, 0.0, 0.001, 0.05)
    assert set(chunks) == {25}
    assert pace.budget([1], 15, MOST) == 50, "two decode passes are worth 100"


def test_no_chunk_is_longer_than_the_scheduler_allows() -> None:
    pace = PromptPace(2.0)
    pace.plan(8, True)
    pace.collect(8, 0.001, 1, 0.5)
    assert pace.budget([1], 1, 8) == 8


def test_a_line_through_passes_of_several_lengths_tells_fixed_from_growing_cost() -> None:
    costs = PassCosts()
    for size in (512, 100, 300, 40):
        costs.record(size, 0.03 + 0.001 * size)
    assert costs.split(0.2) == pytest.approx((0.03, 0.001))


def test_what_passes_of_several_lengths_told_is_remembered() -> None:
    costs = PassCosts()
    for size in (512, 100, *[120] * 100):
        costs.record(size, 0.03 + 0.001 * size)
        fixed, per_token = costs.split(0.2)
    assert (fixed, per_token) == pytest.approx((0.03, 0.001))


def test_passes_whose_times_scatter_by_a_third_do_not_make_up_a_fixed_cost() -> None:
    costs, rng, found = PassCosts(), random.Random(0), []
    for number in range(600):
        size = rng.randint(16, 48)
        costs.record(size, 0.0001 * size * rng.uniform(0.7, 1.3))
        if number >= 200:
            found.append(costs.split(0.002)[0])
    assert max(found) < 0.0005, "a pass takes 0.0032 on average"


def test_passes_of_one_length_are_split_by_what_a_decode_pass_costs() -> None:
    costs = PassCosts()
    costs.record(100, 0.15)
    assert costs.split(0.05) == pytest.approx((0.05, 0.001))
    assert costs.split(0.5) == pytest.approx((0.15, 0.0))
    assert costs.seconds(200) == pytest.approx(0.3)
