"""An output that may follow several grammars follows those that its tokens leave, back and forth."""

import random

import pytest

from server.backend.guidance import Guidance
from server.backend.matcher import EitherMatcher, Matcher
from server.tokenizer import Tokenizer
from unit_tests.checkpoints import IM_END
from unit_tests.server.backend.walks import STOP_IDS, VOCAB_SIZE, allowed_ids, matches, tokenizer_in

PATTERNS = ["ab*c", "a(bd|c)+", "[a-c]{2}x?"]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> list[Matcher]:
    guidance = Guidance(Tokenizer(tokenizer_in(tmp_path_factory.mktemp("either"))), VOCAB_SIZE, STOP_IDS)
    return [guidance.compile("regex", pattern) for pattern in PATTERNS]


def expected_ids(starts: list[Matcher], output: list[int]) -> set[int]:
    """What may follow by those that let the output through."""
    copies = [start.copy() for start in starts]
    return {
        token_id
        for copy in copies
        if all(token_id in allowed_ids(copy) and copy.accept(token_id) for token_id in output)
        for token_id in allowed_ids(copy)
    }


@pytest.mark.parametrize("seed", range(20))
def test_what_may_come_is_what_any_of_them_lets_come_after_any_steps_back(starts: list[Matcher], seed: int) -> None:
    rng, output = random.Random(seed), list[int]()
    either = EitherMatcher([start.copy() for start in starts])
    for _ in range(40):
        allowed = set(allowed_ids(either))
        assert allowed == expected_ids(starts, output) and not either.error()
        refused = rng.choice([token_id for token_id in b"abcdx!" if token_id not in allowed])
        assert not either.accept(refused) and set(allowed_ids(either)) == allowed
        going_on = [token_id for token_id in allowed if token_id != IM_END]
        if rng.random() < 0.3 or not going_on:
            count = rng.randint(0, len(output))
            either.rollback(count)
            del output[len(output) - count :]
        else:
            output.append(rng.choice(going_on))
            assert either.accept(output[-1])
        if rng.random() < 0.2:
            copy, either = either, either.copy()
            copy.rollback(len(output))


def test_whole_outputs_are_those_of_each(starts: list[Matcher]) -> None:
    either = EitherMatcher([start.copy() for start in starts])
    texts = {"ac": 3, "abbc": 1, "abdbd": 1, "bcx": 1, "abc": 1, "abd": 1, "acx": 1, "acc": 1}
    for text, least in texts.items():
        assert matches(either, text) and sum(matches(start, text) for start in starts) >= least, text
    assert not any(matches(either, text) for text in ("a", "abbdc", "bcxx", "abdx", ""))
    assert allowed_ids(either.renew()) == allowed_ids(either)


class Broken:
    """A matcher that has come to its limits."""

    def __init__(self, matcher: Matcher):
        self.copy, self.renew, self.fill, self.rollback = matcher.copy, matcher.renew, matcher.fill, matcher.rollback

    def accept(self, _: int) -> bool:
        return False

    def error(self) -> str:
        return "too much"


def test_limits_of_one_that_is_followed_are_told_and_of_one_that_was_left_are_not(starts: list[Matcher]) -> None:
    either = EitherMatcher([starts[0].copy(), Broken(starts[1].copy())])
    assert either.error() == "too much"
    assert either.accept(ord("a")) and not either.error()
