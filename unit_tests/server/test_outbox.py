"""What is told at once, what later, and that nothing is lost or told twice."""

import pytest

from server.messages import FINISH_LENGTH, Abort, Failed, Generate, SamplingParams, TokenLogprobs, TokenOutput
from server.outbox import KEEP_SECONDS, Outbox


class Clock:
    """A clock that stands still."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_outbox(*request_ids: str, told_whole: bool = True) -> tuple[Outbox, Clock]:
    clock = Clock()
    outbox = Outbox(clock)
    for request_id in request_ids:
        outbox.note(Generate(request_id, [1], SamplingParams(), told_whole=told_whole))
    return outbox, clock


def say(request_id: str, *token_ids: int, steps: int = 0, ends: bool = False) -> TokenOutput:
    logprobs = [TokenLogprobs(-1.0, [token_id], [-1.0]) for token_id in token_ids]
    counts = {"num_steps": steps, "num_proposed": 3 * steps, "num_accepted": 2 * steps}
    return TokenOutput(request_id, [*token_ids], logprobs, FINISH_LENGTH if ends else None, **counts)


def test_a_stream_is_told_everything_at_once() -> None:
    outbox, _ = make_outbox("a", told_whole=False)
    for output in (say("a", 1), say("a", 2, steps=1), say("a", 3, steps=2, ends=True), say("unknown", 4)):
        assert outbox.collect([output], []) == [output]


def test_an_answer_that_is_told_whole_comes_now_and_then_and_at_its_end() -> None:
    outbox, clock = make_outbox("a", "b")
    assert outbox.collect([say("a", 1)], []) == []
    clock.now += KEEP_SECONDS / 2
    assert outbox.collect([say("a", 2, 3, steps=1), say("b", 9)], []) == []
    assert not outbox.is_due
    clock.now += KEEP_SECONDS / 2
    kept, other = outbox.collect([say("a", 4, steps=2)], [])
    assert kept.token_ids == [1, 2, 3, 4] and [one.top_ids for one in kept.logprobs] == [[1], [2], [3], [4]]
    assert (kept.num_steps, kept.num_proposed, kept.drafted_steps) == (2, 6, [(3, 2), (3, 2)])
    assert (kept.age, other.age, other.token_ids) == (KEEP_SECONDS, KEEP_SECONDS / 2, [9])
    clock.now += KEEP_SECONDS
    assert outbox.collect([], []) == []
    outbox.collect([say("a", 5, steps=3)], [])
    clock.now += KEEP_SECONDS / 4
    (last,) = outbox.collect([say("a", 6, steps=4, ends=True)], [])
    assert (last.token_ids, last.finish_reason, last.drafted_steps) == ([5, 6], FINISH_LENGTH, [(3, 2), (3, 2)])
    assert last.age == pytest.approx(KEEP_SECONDS / 4)


def test_what_has_failed_or_was_aborted_is_forgotten() -> None:
    outbox, clock = make_outbox("a", "b")
    outbox.collect([say("a", 1), say("b", 1)], [])
    outbox.note(Abort("a"))
    assert outbox.collect([], [Failed("b", "ModelFailure", "no")]) == []
    clock.now += KEEP_SECONDS
    assert outbox.collect([], []) == []


def test_an_answer_of_one_step_is_told_once() -> None:
    outbox, clock = make_outbox("a")
    assert outbox.collect([say("a", 1, ends=True)], []) == [say("a", 1, ends=True)]
    clock.now += KEEP_SECONDS
    assert outbox.collect([], []) == []


def test_nothing_is_kept_back_where_all_is_to_be_told() -> None:
    outbox, _ = make_outbox("a", "b")
    assert outbox.collect([say("a", 2, steps=1)], []) == []
    told = outbox.collect([say("b", 5, steps=1)], [], tells_all=True)
    assert [(output.request_id, output.token_ids) for output in told] == [("a", [2]), ("b", [5])]
    assert outbox.collect([], [], tells_all=True) == []
