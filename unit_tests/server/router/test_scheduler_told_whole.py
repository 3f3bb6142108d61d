"""Answers that nobody reads before their end."""

import math
from dataclasses import replace

from server.messages import Generate, SamplingParams, TokenLogprobs, TokenOutput
from server.request import Request
from unit_tests.server.router.test_scheduler import EOS, answer, make_scheduler, play


def test_answers_that_are_told_whole_are_kept_back_until_they_end_or_somebody_asks() -> None:
    scheduler = make_scheduler(mtp_step=2)
    prompts = {"whole": True, "stream": False}
    for name, told_whole in prompts.items():
        message = Generate(name, [1, 2, 3], SamplingParams(max_tokens=8), told_whole=told_whole)
        scheduler.add(Request.create(message, (EOS,), max_model_len=64))

    def step() -> dict[str, TokenOutput]:
        planned = scheduler.schedule()
        assert planned is not None
        outputs = scheduler.collect(planned, [answer(batch, 2) for batch in planned.batches])
        return {output.request_id: output for output in outputs if isinstance(output, TokenOutput)}

    assert [list(step()) for _ in range(3)] == [["stream"]] * 3
    (told,) = scheduler.tell()
    assert (told.request_id, told.token_ids, told.finish_reason) == ("whole", [1] * 5, None)
    assert told.drafted_steps == [(2, 1), (2, 1)] and (told.num_proposed, told.num_accepted) == (4, 2)
    assert told.age > 0 and scheduler.tell() == []
    assert list(step()) == ["stream"]
    ends = step()
    assert {name: (len(output.token_ids), output.finish_reason) for name, output in ends.items()} == {
        "whole": (3, "length"),
        "stream": (1, "length"),
    }
    assert [len(ends[name].drafted_steps) for name in prompts] == [2, 0] and scheduler.tell() == []


def test_what_was_kept_back_is_told_by_whatever_ends_a_request_here() -> None:
    scheduler = make_scheduler()
    now = scheduler.clock()
    for name, deadline in (("late", now + 1), ("ended", math.inf)):
        message = Generate(name, [1, 2], SamplingParams(max_tokens=8), told_whole=True)
        scheduler.add(Request.create(message, (EOS,), max_model_len=64, deadline=deadline))
    play(scheduler)
    scheduler.clock = lambda: now + 2
    scheduler.end_late_requests()
    scheduler.end_all()
    notices = scheduler.take_notices()
    assert [(one.request_id, one.token_ids) for one in notices if isinstance(one, TokenOutput)] == [
        ("late", [1]),
        ("ended", [1]),
    ]


def test_scores_of_a_prompt_are_told_with_the_first_token() -> None:
    scheduler = make_scheduler()
    sampling = SamplingParams(max_tokens=8, prompt_logprobs=0)
    message = Generate("scored", [1, 2, 3], sampling, told_whole=True)
    scheduler.add(Request.create(message, (EOS,), max_model_len=64))
    planned = scheduler.schedule()
    assert planned is not None
    scores = [TokenLogprobs(-1.0, [2], [-1.0]), TokenLogprobs(-2.0, [3], [-2.0])]
    outcomes = [replace(answer(batch, 1), prompt_logprobs=[scores]) for batch in planned.batches]
    (told,) = scheduler.collect(planned, outcomes)
    assert isinstance(told, TokenOutput) and (told.token_ids, told.prompt_logprobs) == ([1], scores)
    play(scheduler)
    assert [output.token_ids for output in scheduler.tell()] == [[1]]
