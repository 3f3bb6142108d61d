"""Shares, speed, acceptance and differences of answers written by hand."""

from decimal import Decimal

from benchmarks.gsm8k.client import Answer
from benchmarks.gsm8k.problems import Problem
from benchmarks.gsm8k.scores import Run, find_differences, score
from benchmarks.openai_server import describe_speculation


def test_wrong_invalid_and_truncated_answers_are_shares_of_all_questions() -> None:
    answers = [
        Answer("#### 1", "stop", 10, Decimal(1)),
        Answer("2, or", "length", 20, Decimal("2.0")),
        Answer("4", "length", 20, Decimal(4)),
        Answer("hm", "stop", 2, None),
    ]
    questions = [Problem(n, "?", f"#### {n}", Decimal(n)) for n in (1, 2, 3, 4)]
    answered = dict(zip(questions, answers, strict=True))
    result = score(Run("url", "model", answered, 4.0, {}, failures=["question 5: gone"]))
    assert (result["accuracy"], result["invalid"], result["truncated"]) == (0.5, 0.25, 0.5)
    assert (result["questions"], result["failed"]) == (4, 1)
    assert result["right_though_truncated"] == 0.25 and result["stderr"] == 0.25
    assert (result["mean_output_len"], result["output_tok_s"]) == (13.0, 13.0)
    assert result["accept_length"] is None and result["acceptance_per_position"] == []


def test_a_server_without_counts_by_position_is_taken_to_propose_everywhere() -> None:
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    counters = {("vllm:spec_decode_num_drafts_total", ""): 10.0, (name, "0"): 8.0, (name, "10"): 1.0, (name, "2"): 5.0}
    assert describe_speculation(counters)["acceptance_per_position"] == [0.8, 0.5, 0.1]


def test_an_output_differs_from_a_longer_one_where_it_ends() -> None:
    short, long = Answer("#### 5", "stop", 3, Decimal(5)), Answer("#### 5" + "0" * 60, "length", 9, Decimal(50))
    asked, alone = (Problem(number, "?", "#### 5", Decimal(5)) for number in (9, 10))
    (found,) = find_differences(Run("", "", {asked: short, alone: short}, 1.0, {}), Run("", "", {asked: long}, 1.0, {}))
    assert found["question"] == 9 and found["character"] == 6 and found["outputs"] == ["<stop>", "0" * 40]
