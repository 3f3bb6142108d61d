"""Masks of one request against a plain rule for every place of its output, however drafts came and went."""

import json
import random
from typing import Any

import pytest

from server.backend import output_matcher
from server.backend.guidance import Guidance
from server.backend.output_matcher import OutputMatcher
from server.backend.token_masks import TokenMasks
from server.messages import Constraint, SamplingParams
from server.tokenizer import Tokenizer
from unit_tests.checkpoints import END_THINK, ENDOFTEXT, IM_END
from unit_tests.server.backend.walks import VOCAB_SIZE, tokenizer_in

EOS_IDS = (IM_END, ENDOFTEXT)
EVERYTHING = set(range(VOCAB_SIZE))
JSON = Constraint("json_schema", json.dumps({"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 2}))
TEXT = b"[1, 2]"
# Its library cannot follow more than eleven letters.
DEAR = Constraint("regex", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}c")


@pytest.fixture(scope="module")
def guidance(tmp_path_factory: pytest.TempPathFactory) -> Guidance:
    return Guidance(Tokenizer(tokenizer_in(tmp_path_factory.mktemp("matcher"))), VOCAB_SIZE, EOS_IDS)


def make_matcher(guidance: Guidance | None = None, **sampling: Any) -> OutputMatcher:
    params = SamplingParams(**sampling)
    grammar = None
    if params.constraint is not None:
        assert guidance is not None
        grammar = guidance.compile(params.constraint.kind, params.constraint.text)
    return OutputMatcher(params, grammar, EOS_IDS, VOCAB_SIZE)


def rows(matcher: OutputMatcher, output: list[int], drafts: list[int]) -> list[set[int]]:
    """What each row of a window behind an output allows."""
    masks = TokenMasks(len(drafts) + 1, VOCAB_SIZE, "cpu")
    matcher.fill_ahead(masks, 0, output, drafts)
    return [{token for token in EVERYTHING if masks.allows(row, token)} for row in range(len(drafts) + 1)]


def allowed(matcher: OutputMatcher, output: list[int]) -> set[int]:
    """What may follow an output, asked of a new matcher."""
    return rows(matcher, output, [])[0]


def test_masks_ahead_are_those_of_the_very_places(guidance: Guidance) -> None:
    for length in range(len(TEXT)):
        for depth in range(4):
            drafts = list(TEXT[length : length + depth])
            matcher, output = make_matcher(guidance, constraint=JSON), list(TEXT[:length])
            expected = [
                allowed(make_matcher(guidance, constraint=JSON), list(TEXT[: length + i]))
                for i in range(len(drafts) + 1)
            ]
            assert rows(matcher, output, drafts) == expected
            assert rows(matcher, output, drafts) == expected, "and again"


@pytest.mark.parametrize("seed", range(20))
def test_where_a_matcher_has_been_before_does_not_matter(guidance: Guidance, seed: int) -> None:
    """Drafts followed and thrown away, windows that agree with them or not, outputs that grow by several tokens."""
    rng = random.Random(seed)
    sampling: dict[str, Any] = {
        "constraint": Constraint("regex", "(a|b|ab|c)*d", END_THINK if seed % 2 else None),
        "bad_words": ((97, 97), (98, 99)),
        "thinking_budget": 3 if seed % 2 else None,
        "think_end_id": END_THINK,
        "min_tokens": 4,
    }
    letters, output = [97, 98, 99, 100, END_THINK], []
    matcher = make_matcher(guidance, **sampling)
    for _ in range(14):
        drafts = rng.choices(letters, k=rng.randint(0, 4))
        found = rows(matcher, output, drafts)
        history = list(output)
        for row, draft in zip(found, [*drafts, None], strict=True):
            assert row == allowed(make_matcher(guidance, **sampling), history), history
            if draft not in row or draft is None:
                break
            history.append(draft)
        for token in rng.choices(letters, k=rng.randint(1, 3)):
            if token in allowed(make_matcher(guidance, **sampling), output) - set(EOS_IDS):
                output.append(token)
        ahead = rng.choices(letters, k=rng.randint(0, 2))
        is_legal = all(
            token in allowed(make_matcher(guidance, **sampling), [*output, *ahead[:index]])
            for index, token in enumerate(ahead)
        )
        if is_legal:
            assert matcher.go_to(output, ahead)
    assert matcher.failure is None


def test_behind_a_draft_that_may_not_come_nothing_is_masked(guidance: Guidance) -> None:
    matcher = make_matcher(guidance, constraint=JSON)
    found = rows(matcher, [], [ord("["), ord("3"), ord("]")])
    assert found[:2] == [{ord("[")}, {ord("1"), ord("2")}] and found[2:] == [EVERYTHING, EVERYTHING]
    assert rows(matcher, [], [ord("[")]) == found[:2]


def test_where_the_grammar_ends_only_the_end_may_come(guidance: Guidance) -> None:
    matcher = make_matcher(guidance, constraint=JSON, min_tokens=50, stop_token_ids=(ord("]"),))
    assert allowed(matcher, list(TEXT)) == set(EOS_IDS)
    assert rows(matcher, list(TEXT), [IM_END, 5])[1:] == [EVERYTHING, EVERYTHING]
    assert matcher.failure is None
    early = make_matcher(guidance, constraint=Constraint("regex", "[0-9]*"), min_tokens=2, stop_token_ids=(ord("7"),))
    digits = {*b"0123456789"}
    assert [allowed(early, [48] * count) for count in (0, 1, 2)] == [
        digits - {55},
        digits - {55},
        digits | set(EOS_IDS),
    ]


@pytest.mark.parametrize("offset", range(5))
def test_the_grammar_begins_behind_the_end_of_thinking_wherever_that_stands_in_a_window(
    guidance: Guidance, offset: int
) -> None:
    thought = [ord("h"), ord("m"), ord("["), 300 - 1]
    text = [*thought, END_THINK, *TEXT]
    matcher = make_matcher(guidance, constraint=Constraint(JSON.kind, JSON.text, END_THINK))
    start = len(thought) - offset
    free = EVERYTHING - set(EOS_IDS)
    plain = [allowed(make_matcher(guidance, constraint=JSON), list(TEXT[:count])) for count in range(len(TEXT) + 1)]
    window = text[start:]
    expected = [free] * (offset + 1) + plain
    assert rows(matcher, text[:start], window) == expected
    for length in range(start, len(text) + 1):
        assert rows(matcher, text[:length], text[length:]) == expected[length - start :]


def test_a_second_end_of_thinking_is_text(guidance: Guidance) -> None:
    matcher = make_matcher(guidance, constraint=Constraint("regex", "a(</think>)?b", END_THINK))
    assert allowed(matcher, [END_THINK, ord("a"), END_THINK]) == {ord("b")}


def test_thinking_may_end_the_output_where_nothing_need_follow(guidance: Guidance) -> None:
    assert allowed(make_matcher(guidance, constraint=Constraint("regex", "a*", END_THINK)), []) == EVERYTHING
    assert allowed(make_matcher(guidance, constraint=Constraint("regex", "a+", END_THINK)), []) == EVERYTHING - {
        *EOS_IDS
    }


@pytest.mark.parametrize("budget", [0, 1, 3])
@pytest.mark.parametrize("depth", range(4))
def test_the_budget_of_thinking_is_exact_at_every_place_of_a_window(budget: int, depth: int) -> None:
    matcher = make_matcher(thinking_budget=budget, think_end_id=END_THINK)
    for length in range(5):
        output = [9] * min(length, budget) + [END_THINK] * (length > budget) + [9] * max(0, length - budget - 1)
        drafts = ([9] * max(0, budget - length) + [END_THINK] * (length <= budget) + [9] * 9)[:depth]
        places = range(length, length + depth + 1)
        assert rows(matcher, output, drafts) == [{END_THINK} if place == budget else EVERYTHING for place in places]
    early = make_matcher(thinking_budget=2, think_end_id=END_THINK)
    assert rows(early, [], [5, END_THINK, 5, 5]) == [EVERYTHING] * 5


def test_the_budget_ends_thinking_before_the_grammar_begins(guidance: Guidance) -> None:
    constraint = Constraint(JSON.kind, JSON.text, END_THINK)
    matcher = make_matcher(guidance, constraint=constraint, thinking_budget=1, think_end_id=END_THINK)
    assert rows(matcher, [], [ord("x"), END_THINK, ord("[")])[1:3] == [{END_THINK}, {ord("[")}]


def test_allowed_tokens_and_bad_words_narrow_each_other(guidance: Guidance) -> None:
    assert allowed(make_matcher(allowed_token_ids=(3, 4, 5), bad_words=((4,), (9, 9, 5))), [9, 9]) == {3}
    assert allowed(make_matcher(guidance, constraint=JSON, allowed_token_ids=(ord("1"), 4)), [ord("[")]) == {ord("1")}
    # What would leave nothing gives way.
    assert allowed(make_matcher(guidance, constraint=JSON, allowed_token_ids=(3, 4)), [ord("[")]) == {
        ord("1"),
        ord("2"),
    }
    assert allowed(make_matcher(allowed_token_ids=(3,), bad_words=((3,),)), []) == {3}


def test_bad_words_are_found_across_the_seams_of_output_and_drafts() -> None:
    words = ((1, 2, 3), (2, 2), (7,), (3, 1, 2, 3))
    for seed in range(30):
        rng = random.Random(seed)
        matcher, output = make_matcher(bad_words=words), []
        for _ in range(12):
            drafts = [rng.randint(1, 3) for _ in range(rng.randint(0, 4))]
            found = rows(matcher, output, drafts)
            for place, row in enumerate(found):
                history = [*output, *drafts[:place]]
                bad = {word[-1] for word in words if history[len(history) - len(word) + 1 :] == list(word[:-1])}
                if place and drafts[place - 1] not in found[place - 1]:
                    break
                assert row == EVERYTHING - bad, (history, row)
            output += rng.choices(sorted(found[0]), k=1)


def test_an_output_that_cannot_go_on_fails_with_the_field(guidance: Guidance) -> None:
    matcher = make_matcher(guidance, constraint=Constraint("regex", "ab", field="guided_regex"))
    assert rows(matcher, [ord("a"), ord("x")], []) == [EVERYTHING]
    assert matcher.failure is not None and matcher.failure.param == "guided_regex"


def follow(matcher: OutputMatcher, target: list[int], drafts: list[int]) -> list[int]:
    """The output when the target draws these tokens and the same drafts are guessed at every step."""
    output: list[int] = []
    while len(output) < len(target):
        masks = TokenMasks(len(drafts) + 1, VOCAB_SIZE, "cpu")
        count = matcher.fill_ahead(masks, 0, output, drafts)
        if matcher.failure is not None:
            break
        for row in range(count):
            token = target[len(output)]
            assert masks.allows(row, token)
            output.append(token)
            if len(output) == len(target) or row == len(drafts) or token != drafts[row]:
                break
    return output


@pytest.mark.parametrize("letters", [2, 10, 11, 12, 14])
@pytest.mark.parametrize("depth", range(5))
def test_guesses_decide_nothing_about_where_an_output_fails(guidance: Guidance, letters: int, depth: int) -> None:
    matcher, target = make_matcher(guidance, constraint=DEAR), [ord("a")] * letters + [ord("c"), IM_END]
    output = follow(matcher, target, [ord("a")] * depth)
    assert output == (target if letters <= 10 else target[:11])
    assert (matcher.failure is not None) == (letters > 10)


def test_a_draft_that_leads_to_a_limit_ends_the_pass(guidance: Guidance) -> None:
    matcher, masks = make_matcher(guidance, constraint=DEAR), TokenMasks(5, VOCAB_SIZE, "cpu")
    output = follow(matcher, [ord("a")] * 9, [])
    assert matcher.fill_ahead(masks, 0, output, [ord("a")] * 4) == 2 and matcher.failure is None
    assert {token for token in EVERYTHING if masks.allows(1, token)} == {ord("a"), ord("c")}
    assert all(masks.allows(2, token) for token in EVERYTHING)
    assert allowed(matcher, [*output, ord("c")]) == set(EOS_IDS)
    assert not matcher.go_to([*output, ord("c")], []), "it is not followed ahead any more"


def test_another_output_that_has_come_to_a_limit_is_nothing_to_this_one(guidance: Guidance) -> None:
    start = guidance.compile(DEAR.kind, DEAR.text)
    spoilt, matcher = (
        OutputMatcher(SamplingParams(constraint=DEAR), start.copy(), EOS_IDS, VOCAB_SIZE) for _ in range(2)
    )
    output = follow(matcher, [ord("a")] * 3, [])
    follow(spoilt, [ord("a")] * 20, [])
    assert spoilt.failure is not None
    assert allowed(matcher, output) == {ord("a"), ord("c")} and matcher.failure is None
    late = OutputMatcher(
        SamplingParams(constraint=Constraint(DEAR.kind, DEAR.text, END_THINK)), start.copy(), EOS_IDS, VOCAB_SIZE
    )
    assert rows(late, [], [END_THINK]) == [EVERYTHING - set(EOS_IDS), {ord("a")}]


def test_the_time_of_guesses_ends_guessing_alone(guidance: Guidance, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 0.0, *range(0, 10_000, 3)])  # the first row costs nothing
    monkeypatch.setattr(output_matcher.time, "perf_counter", lambda: float(next(seconds)))
    matcher, masks = make_matcher(guidance, constraint=JSON), TokenMasks(4, VOCAB_SIZE, "cpu")
    assert matcher.fill_ahead(masks, 0, [], list(TEXT[:3])) == 2
    assert matcher.failure is None and not matcher.go_to([], TEXT[:1])


def test_an_output_that_takes_too_long_to_follow_again_fails(
    guidance: Guidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = make_matcher(guidance, constraint=DEAR)
    output = follow(matcher, [ord("a")] * 9, [])
    rows(matcher, output, [ord("a")] * 4)
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(output_matcher.time, "perf_counter", lambda: float(next(clock)))
    rows(matcher, [*output, ord("c")], [])
    assert matcher.failure is not None and "too long to follow it again" in matcher.failure.message


def test_a_grammar_that_takes_too_long_fails(guidance: Guidance, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(output_matcher.time, "perf_counter", lambda: float(next(clock)))
    matcher = make_matcher(guidance, constraint=JSON)
    rows(matcher, [], [])
    assert matcher.failure is not None and "takes too long" in matcher.failure.message
