"""The evaluation: greedy whatever the guess, drafts counted as decoding would meet them."""

import torch
import torch.nn.functional as F

from models.training.demo_evaluation import (
    Score,
    ask_in_chat,
    ask_plainly,
    decode_greedily,
    draft_tokens,
    draw_held_out,
    draw_tool_questions,
    walk_drafts,
)
from models.training.demo_tokenizer import END_OF_TEXT, END_OF_TURN
from models.training.word_problems import is_held_out

STOP = 9


class Counter:
    """A fake target over ten tokens: after token t comes t + 1, so that hidden states are one-hot tokens."""

    def forward_sequence(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.one_hot((token_ids + 1) % 10, 10).float()

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class CounterDraft:
    """A fake draft: right unless the newest token is 5."""

    def forward_sequence(self, next_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        assert torch.equal(hidden.argmax(-1), next_ids)
        return F.one_hot(torch.where(next_ids == 5, 0, (next_ids + 1) % 10), 10).float()


def test_greedy_answers_do_not_depend_on_the_guess():
    prompts, expected = [[1, 2, 3], [6]], [[4, 5, 6, 7, 8, STOP], [7, 8, STOP]]
    for guesses in (expected, [[], []], [[4, 5, 0, 7, 0, 0, 0, 0], [STOP]], [[4] * 20, [7, 8, STOP, 1, 2]]):
        assert decode_greedily(Counter(), prompts, guesses, {STOP}) == expected


def test_answers_that_never_stop_are_cut():
    (answer,) = decode_greedily(Counter(), [[0]], [[]], {77})
    assert len(answer) == 200


def test_draft_rows_are_two_tokens_ahead():
    assert draft_tokens(Counter(), CounterDraft(), [3, 4, 5, 6]) == [5, 0, 7]


def test_an_accepted_draft_skips_a_step_and_a_rejected_one_does_not():
    prompt, answer = [2, 3], [4, 5, 6, 7, 8, STOP]
    drafts = draft_tokens(Counter(), CounterDraft(), prompt + answer)
    # 4 from the prefill; draft 5 accepted (6 is the bonus); draft 7 accepted (8); draft 9 accepted.
    assert walk_drafts(drafts, prompt, answer) == (3, 3)
    # 3 from the prefill; draft 4 accepted (5); draft of 6 rejected; draft 7 accepted (8); draft 9 accepted.
    assert walk_drafts(draft_tokens(Counter(), CounterDraft(), [2, *range(3, 10)]), [2], list(range(3, 10))) == (4, 3)


def test_a_score_gives_shares():
    score = Score(num_problems=4, num_solved=3, num_drafts=10, num_accepted=9)
    assert (score.solved, score.acceptance) == (0.75, 0.9)
    assert "3 of 4" in str(score)


def test_held_out_problems_have_as_many_steps_as_asked_for():
    problems = draw_held_out(5, 50, min_steps=2)
    assert {problem.num_steps for problem in problems} == {2, 3}
    assert all(is_held_out(problem.question) for problem in problems)


def test_an_answer_is_right_when_its_result_is():
    (problem,) = draw_held_out(6, 1)
    for question in (ask_in_chat(problem), ask_in_chat(problem, thinks=True), ask_plainly(problem)):
        right = question.text.completion.removesuffix(END_OF_TURN).removesuffix(END_OF_TEXT)
        assert question.is_right(right)
        assert not question.is_right(right + "1")
    assert "</think>" in ask_in_chat(problem, thinks=True).text.completion


def test_a_tool_call_is_right_when_it_is_the_very_one():
    for question in draw_tool_questions(7, 20):
        call = question.text.completion.removesuffix(END_OF_TURN)
        assert question.is_right(call)
        assert not question.is_right(call + "\n")
        assert not question.is_right(call.replace("<parameter=", "<parameter=x"))
