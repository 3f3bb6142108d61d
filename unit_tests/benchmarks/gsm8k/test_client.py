"""Prompts are the field's to the letter, and responses are read for what was said and not for what was thought."""

from decimal import Decimal
from typing import Any

import pytest

from benchmarks.gsm8k.client import ask, chat_messages, completion_prompt, read_answer
from benchmarks.gsm8k.problems import Problem
from benchmarks.openai_server import RunFailed
from unit_tests.benchmarks.gsm8k.splits import args_for


def test_examples_stand_before_the_question_as_in_the_fields_scripts() -> None:
    shots = [Problem(1, "How many?", "1+1 = <<1+1=2>>2.\n#### 2", Decimal(2)), Problem(2, "Why?", "#### 3", Decimal(3))]
    asked = Problem(1, "How much?", "#### 4", Decimal(4))
    assert completion_prompt(shots, asked) == (
        "Question: How many?\nAnswer: 1+1 = <<1+1=2>>2.\n#### 2\n\n"
        "Question: Why?\nAnswer: #### 3\n\n"
        "Question: How much?\nAnswer:"
    )
    assert completion_prompt([], asked) == "Question: How much?\nAnswer:"
    assert chat_messages(shots[1:], asked) == [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "#### 3"},
        {"role": "user", "content": "How much?"},
    ]


@pytest.mark.parametrize(
    ("content", "reasoning", "finish_reason", "value"),
    [
        ("Perhaps 4.\n</think>\n\nIt is 5.", None, "stop", 5),
        ("It is 5.", "Perhaps 4.", "stop", 5),
        ("Perhaps 4, or 5", None, "length", None),
        (None, "Perhaps 4, or 5", "length", None),
        ("Perhaps 4.</think>It is", None, "length", None),
        ("No thought: 5.", None, "stop", 5),
    ],
)
def test_a_number_that_was_only_thought_is_no_answer(
    content: str | None, reasoning: str | None, finish_reason: str, value: int | None
) -> None:
    message = {"role": "assistant", "content": content, "reasoning": reasoning}
    choice = {"message": message, "finish_reason": finish_reason}
    answer = read_answer({"choices": [choice], "usage": {"completion_tokens": 7}}, thinks=True)
    assert answer.value == value and answer.num_tokens == 7
    assert answer.is_truncated == (finish_reason == "length")


@pytest.mark.parametrize("response", [{}, {"choices": []}, {"choices": [{"text": "5", "finish_reason": "stop"}]}])
def test_a_response_that_is_not_openais_is_refused(response: dict[str, Any]) -> None:
    with pytest.raises(RunFailed, match="not as OpenAI's are"):
        read_answer(response, thinks=False)


def test_a_question_that_fails_says_which_it_was() -> None:
    class Gone:
        model = "gone"

        def send(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
            raise RunFailed("cannot reach it")

    with pytest.raises(RunFailed, match="question 7: cannot reach it"):
        ask(Gone(), [], Problem(7, "?", "#### 1", Decimal(1)), args_for("x"))  # type: ignore[arg-type]
