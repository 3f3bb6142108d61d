"""Where an output stands in its grammar, or in one of two."""

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np

from server.backend.token_masks import TokenMasks


class Matcher(Protocol):
    """Where an output stands in its grammar: see GuidanceMatcher."""

    def copy(self) -> Self: ...
    def renew(self) -> Self: ...
    def fill(self, masks: TokenMasks, row: int) -> None: ...
    def accept(self, token_id: int) -> bool: ...
    def rollback(self, count: int) -> None: ...
    def error(self) -> str: ...


class EitherMatcher:
    """An output that follows any of several grammars: all of them, until a token leaves some behind."""

    def __init__(self, matchers: Sequence[Matcher]):
        """The matchers stand at the start of an output."""
        self._matchers = list(matchers)
        self._num_tokens = 0
        self._followed: list[int | None] = [None] * len(matchers)  # tokens before it was left; None: it was not

    def copy(self) -> "EitherMatcher":
        """Another one in the same place."""
        other = EitherMatcher([matcher.copy() for matcher in self._matchers])
        other._num_tokens, other._followed = self._num_tokens, list(self._followed)
        return other

    def renew(self) -> "EitherMatcher":
        """One at the start that shares nothing with this one."""
        return EitherMatcher([matcher.renew() for matcher in self._matchers])

    def fill(self, masks: TokenMasks, row: int) -> None:
        """Allow in `row` what may come next by any of those that are followed."""
        words = np.zeros_like(masks.array[row])
        for matcher in self._live:
            masks.array[row] = -1
            matcher.fill(masks, row)
            words |= masks.array[row]
        masks.array[row] = words

    def accept(self, token_id: int) -> bool:
        """Go on by a token; False, and nothing changes, for one that may not come by any."""
        is_live = [followed is None for followed in self._followed]
        accepts = [live and matcher.accept(token_id) for live, matcher in zip(is_live, self._matchers, strict=True)]
        if not any(accepts):
            return False
        for index, accepted in enumerate(accepts):
            if is_live[index] and not accepted:
                self._followed[index] = self._num_tokens
        self._num_tokens += 1
        return True

    def rollback(self, count: int) -> None:
        """Take the last tokens back."""
        before, self._num_tokens = self._num_tokens, self._num_tokens - count
        for index, (matcher, followed) in enumerate(zip(self._matchers, self._followed, strict=True)):
            num_lost = (before if followed is None else followed) - self._num_tokens
            if num_lost > 0:
                matcher.rollback(num_lost)
            if num_lost >= 0:
                self._followed[index] = None

    def error(self) -> str:
        """Why there is no going on; empty while there is."""
        return next((error for matcher in self._live if (error := matcher.error())), "")

    @property
    def _live(self) -> list[Matcher]:
        return [each for each, followed in zip(self._matchers, self._followed, strict=True) if followed is None]
