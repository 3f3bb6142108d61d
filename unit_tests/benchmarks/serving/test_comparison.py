"""Ratios are of one round, and answers are compared for as long as both servers were asked the same."""

from benchmarks.serving.answer import Answer
from benchmarks.serving.comparison import compare, find_differences
from benchmarks.serving.load import Round
from unit_tests.benchmarks.serving.answers import answered, failed, round_of


def timed(first: float, last: float) -> Round:
    """One answer of five tokens, in a round that ends with it."""
    return round_of(answered((first, 1), (last, 4)), seconds=last)


def test_ratios_are_of_rounds_and_not_of_medians() -> None:
    one, other = (
        [timed(0.5, 1.0), timed(1.0, 2.0), timed(2.0, 4.0)],
        [timed(0.25, 1.0), timed(1.0, 4.0), timed(4.0, 4.0)],
    )
    first, second = compare([one, other])
    assert [entry["metric"] for entry in second] == ["output_tok_s", "ttft_ms", "tpot_ms", "e2e_ms"]
    speed, ttft, tpot, e2e = second
    assert speed["rounds"] == [5.0, 1.25, 1.25] and speed["ratios"] == [1.0, 0.5, 1.0]
    assert (speed["median"], speed["min"], speed["max"]) == (1.25, 1.25, 5.0)
    assert (speed["ratio_median"], speed["ratio_min"], speed["ratio_max"]) == (1.0, 0.5, 1.0)
    assert ttft["rounds"] == [250.0, 1000.0, 4000.0] and ttft["ratios"] == [0.5, 1.0, 2.0]
    assert tpot["rounds"] == [187.5, 750.0, 0.0] and tpot["ratios"] == [1.5, 3.0, 0.0]
    assert e2e["ratios"] == [1.0, 2.0, 1.0]
    assert {ratio for entry in first for ratio in entry["ratios"]} == {1.0}


def test_rounds_that_not_every_server_ended_are_left_out() -> None:
    whole, cut = timed(0.5, 1.0), round_of(answered((0.5, 5)), num_cut=1)
    first, second = compare([[whole, timed(1.0, 2.0), whole], [whole, cut]])
    assert first[0]["rounds"] == second[0]["rounds"] == [5.0]
    assert compare([[whole], []]) == compare([[whole], [cut]]) == []


def test_a_round_without_answers_has_no_ratio() -> None:
    first, second = compare([[timed(0.5, 1.0)], [round_of(failed("timeout", "late"))]])
    assert second[1]["ratios"] == [None] and second[1]["ratio_median"] is second[1]["median"] is None
    assert first[1]["median"] == 500.0


def said(index: int, turn: int, text: str) -> Answer:
    return answered((1.0, 1), index=index, turn=turn, text=text)


def test_a_conversation_is_compared_up_to_where_it_differs() -> None:
    first = [round_of(said(0, 0, "ab"), said(1, 0, "one")), round_of(said(1, 1, "two"), said(1, 2, "three"))]
    other = [round_of(said(1, 1, "twin"), said(1, 2, "x"), said(0, 0, "ab"), said(1, 0, "one"))]
    assert find_differences(first, other) == {
        "compared": 3,
        "different": 1,
        "example": {"conversation": 1, "turn": 1, "character": 2, "answers": ["o", "in"]},
    }


def test_only_what_both_answered_is_compared() -> None:
    first = [round_of(said(0, 0, "a"), said(1, 0, "b"), failed("timeout", "late", index=2))]
    other = [round_of(said(0, 0, "a"), said(2, 0, "c"), said(3, 0, "d"))]
    assert find_differences(first, other) == {"compared": 1, "different": 0, "example": None}


def test_an_answer_that_goes_on_or_ends_otherwise_differs() -> None:
    shorter, cut = said(0, 0, "abc"), said(0, 0, "abcd")
    cut.finish_reason = "length"
    found = find_differences([round_of(shorter)], [round_of(cut)])
    assert found["different"] == 1 and found["example"]["character"] == 3 and found["example"]["answers"] == ["", "d"]
    same_text = said(0, 0, "abc")
    same_text.finish_reason = "length"
    assert find_differences([round_of(shorter)], [round_of(same_text)])["different"] == 1
