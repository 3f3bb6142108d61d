"""Load is what was asked for: so many at a time, or beginnings with gaps of the right mean and spread."""

import asyncio
import itertools
import math
import statistics
from collections.abc import Iterator

import pytest

from benchmarks.serving.answer import Answer
from benchmarks.serving.datasets import COMPLETIONS, Conversation, Prompt, Turn
from benchmarks.serving.load import Load, LoadRun, Round
from unit_tests.benchmarks.serving.virtual_time import run_virtually


class Sleeper:
    """Answers after a time of its own; notes when it was asked what."""

    def __init__(self, seconds: float = 1.0, failing: tuple[int, ...] = ()):
        self.seconds, self.failing = seconds, failing
        self.asked: list[tuple[float, int, int, str]] = []
        self.num_open = self.most_open = 0

    async def ask(self, index: int, turn: int, prompt: Prompt) -> Answer:
        now = asyncio.get_running_loop().time()
        self.asked.append((now, index, turn, prompt.content["prompt"]))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        await asyncio.sleep(self.seconds)
        self.num_open -= 1
        return Answer(index, turn, now, text=f"!{index}", failure="failed" if index in self.failing else "")


def conversations(count: int | None, num_turns: int = 1) -> Iterator[tuple[int, Conversation]]:
    numbers = itertools.count() if count is None else iter(range(count))
    return ((n, Conversation(COMPLETIONS, [Turn(f"?{n}.{turn}", 4) for turn in range(num_turns)])) for n in numbers)


def run(
    sleeper: Sleeper,
    load: Load,
    asked: Iterator[tuple[int, Conversation]],
    duration: float | None = None,
    stop_after: float | None = None,
) -> tuple[Round, int]:
    """The round, and how many conversations were said to have ended."""
    ended: list[None] = []

    async def running() -> Round:
        stop = asyncio.Event()
        if stop_after is not None:
            asyncio.get_running_loop().call_later(stop_after, stop.set)
        return await LoadRun(sleeper, asked, load, duration, "seed", lambda: ended.append(None)).run(stop)

    return run_virtually(running()), len(ended)


@pytest.mark.parametrize(("concurrency", "seconds"), [(1, 10.0), (4, 3.0), (16, 1.0)])
def test_closed_load_keeps_so_many_requests_open(concurrency: int, seconds: float) -> None:
    sleeper = Sleeper()
    one, num_ended = run(sleeper, Load("concurrency", concurrency), conversations(10))
    assert sleeper.most_open == min(concurrency, 10) and one.seconds == seconds
    assert num_ended == len(one.answers) == 10 and one.num_cut == 0
    assert [asked[1] for asked in sleeper.asked] == list(range(10))


def test_open_load_does_not_wait_for_answers() -> None:
    sleeper, load = Sleeper(seconds=1024.0), Load("request_rate", 2.0)
    one, _ = run(sleeper, load, conversations(6))
    due = [0.0, *itertools.accumulate(itertools.islice(load.gaps("seed"), 5))]
    assert [asked[0] for asked in sleeper.asked] == pytest.approx(due)
    assert one.seconds == pytest.approx(due[-1] + 1024.0) and sleeper.most_open == 6


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness: float) -> None:
    gaps = list(itertools.islice(Load("request_rate", 4.0, burstiness).gaps("x"), 20_000))
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.25 / math.sqrt(burstiness), rel=0.05)
    if burstiness == 1.0:
        assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), rel=0.05)


def test_gaps_are_the_same_for_the_same_seed_only() -> None:
    first, again, other = (list(itertools.islice(Load("request_rate", 4.0).gaps(seed), 5)) for seed in "aab")
    assert first == again != other


def test_an_infinite_rate_begins_all_at_once() -> None:
    sleeper = Sleeper()
    one, _ = run(sleeper, Load("request_rate", math.inf), conversations(50))
    assert {asked[0] for asked in sleeper.asked} == {0.0} and one.seconds == 1.0


@pytest.mark.parametrize("load", [Load("concurrency", 2), Load("request_rate", 2.0)])
def test_nothing_begins_after_the_duration_and_what_has_begun_ends(load: Load) -> None:
    sleeper = Sleeper()
    one, _ = run(sleeper, load, conversations(None), duration=4.5)
    assert max(asked[0] for asked in sleeper.asked) < 4.5 < one.seconds <= 5.5
    assert one.num_started == len(one.answers) > 4 and one.num_cut == 0


@pytest.mark.parametrize("load", [Load("concurrency", 2), Load("request_rate", math.inf)])
def test_what_was_answered_before_a_stop_is_kept(load: Load) -> None:
    one, _ = run(Sleeper(), load, conversations(20, num_turns=4), stop_after=2.5)
    assert one.seconds == 2.5
    per_client = 2
    num_clients = 2 if load.kind == "concurrency" else 20
    assert len(one.answers) == per_client * num_clients and one.num_cut == num_clients


def test_each_turn_has_the_answers_before_it_and_a_failure_ends_a_conversation() -> None:
    sleeper = Sleeper(failing=(1,))
    one, num_ended = run(sleeper, Load("concurrency", 1), conversations(2, num_turns=3))
    prompts = ["?0.0", "?0.0!0\n?0.1", "?0.0!0\n?0.1!0\n?0.2", "?1.0"]
    assert [asked[3] for asked in sleeper.asked] == prompts
    assert [(answer.index, answer.turn) for answer in one.answers] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert num_ended == 2


def test_a_mistake_of_ours_is_not_swallowed() -> None:
    class Broken:
        async def ask(self, index: int, turn: int, prompt: Prompt) -> Answer:
            raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as raised:
        run(Broken(), Load("concurrency", 2), conversations(3))  # type: ignore[arg-type]
    assert raised.group_contains(ZeroDivisionError)
