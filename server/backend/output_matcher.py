"""What may come next in the output of one request: its grammar, allowed tokens, bad words, budget of thinking.

It belongs to the request, not to its row: it knows the output so far and can go a few drafts ahead and back. Only the
output itself may fail: where a guess leads to what the grammar cannot be followed through, the pass ends before it.
"""

import time
from collections.abc import Sequence

import numpy as np

from server.backend.guidance import NOTHING_FOLLOWS
from server.backend.matcher import Matcher
from server.backend.token_masks import TokenMasks, pack
from server.errors import InvalidRequest
from server.messages import SamplingParams

# Some grammars cost more with every token, while all streams wait. A request ends when its own has taken so many
# seconds and so many more per token, which is hundreds of times as much as usual. Guesses may cost as much again, then
# there are no more.
_MAX_SECONDS, _MAX_SECONDS_PER_TOKEN = 2.0, 0.02


class OutputMatcher:
    """Begins before the first token. `grammar` is at its start, or None; `eos_ids` end an output.

    Where a rule would leave nothing of what those before it allow, it gives way. While the grammar lies ahead, behind
    `after_token_id`, the output may end only if the grammar lets it be empty. `failure` is why there is no going on.
    """

    def __init__(self, sampling: SamplingParams, grammar: Matcher | None, eos_ids: Sequence[int], vocab_size: int):
        self._sampling, self._grammar, self._vocab_size = sampling, grammar, vocab_size
        self._tokens: list[int] = []  # the output, and drafts behind it
        self._num_known = 0  # of these are the output's
        self._num_output = 0  # so many the output has
        self._rows: dict[int, np.ndarray] = {}  # what may come behind so many of them
        self._eos_ids = frozenset(eos_ids)
        self._after = _First(sampling.constraint.after_token_id if sampling.constraint else None)
        self._think_end = _First(sampling.think_end_id)
        allowed = sampling.allowed_token_ids
        self._allowed = pack(allowed, vocab_size) if allowed else None
        self._not_eos = ~pack(eos_ids, vocab_size)
        self._not_stop = ~pack([*eos_ids, *sampling.stop_token_ids], vocab_size)
        self._seconds = self._guess_seconds = 0.0
        self._is_renewed, self._may_guess = False, True
        self._may_be_empty = grammar is not None and _allows_any(grammar, eos_ids, vocab_size)
        if grammar is not None and grammar.error():  # another output has come to the limits of what copies share
            self._grammar = grammar.renew()
            self._may_be_empty = _allows_any(self._grammar, eos_ids, vocab_size)
        self.failure: InvalidRequest | None = None

    def go_to(self, output_ids: Sequence[int], ahead: Sequence[int] = ()) -> bool:
        """Stand behind the request's output and tokens `ahead` of it; False if these may not come, then as far as they
        may."""
        if not self._may_guess:
            return False
        self._go_back(output_ids, ahead)
        num_ahead = len(self._tokens) - len(output_ids)
        rest = (*output_ids[len(self._tokens) :], *ahead[max(0, num_ahead) :])
        return all(self.push(token_id) for token_id in rest)

    def fill_ahead(self, masks: TokenMasks, first: int, output_ids: Sequence[int], drafts: Sequence[int]) -> int:
        """Fill a row for the token behind the output and one behind each draft, from row `first` on, as far as drafts
        may come and can be followed: how many these are. No token may be emitted from those behind them."""
        self._go_back(output_ids, drafts)
        why = self._fill_known(masks, first, output_ids)
        if why and not self._is_renewed:
            why = self._start_again(output_ids) or self._fill_known(masks, first, output_ids)
        if not why and self._seconds > self._limit:
            why = f"it takes too long to follow, {self._seconds:.1f} seconds for {len(output_ids)} tokens"
        if why:
            self._fail(why)
            return 1
        for row, draft in enumerate(drafts, start=first):
            place = len(output_ids) + row - first
            if not self._may_guess or not masks.allows(row, draft):
                return row - first + 1
            if len(self._tokens) == place and not self.push(draft):
                return row - first + 1
            if self._copy_row(masks, row + 1, place + 1):
                return row - first + 1
        return len(drafts) + 1

    def fill(self, masks: TokenMasks, row: int) -> None:
        """Leave in `row`, which allows everything, what may come next, as far as that can be told."""
        self._copy_row(masks, row, len(self._tokens))

    def push(self, token_id: int) -> bool:
        """Go on by a token; False, and nothing changes, if the grammar ends there or does not allow it."""
        if self._grammar is not None and self._is_constrained:
            start = time.perf_counter()
            if token_id in self._eos_ids or not self._grammar.accept(token_id):
                return False
            self._count_time(start, len(self._tokens) < self._num_output)
        for first in (self._after, self._think_end):
            first.push(token_id, len(self._tokens))
        self._tokens.append(token_id)
        return True

    def _fill_known(self, masks: TokenMasks, row: int, output_ids: Sequence[int]) -> str:
        """The row behind the output. Why that cannot be; empty if it can, as with others that give a string."""
        return self._follow(output_ids[len(self._tokens) :]) or self._copy_row(masks, row, len(output_ids))

    def _follow(self, token_ids: Sequence[int]) -> str:
        for token_id in token_ids:
            if not self.push(token_id):
                assert self._grammar is not None
                return self._grammar.error() or "the output has left it"
        return ""

    def _start_again(self, output_ids: Sequence[int]) -> str:
        """Follow the output anew, just as without drafts and with nobody else: where a guess, or another output, comes
        to the library's limits, all copies of a grammar end. From now on there are no guesses."""
        assert self._grammar is not None
        self._pop(len(self._tokens))
        self._rows.clear()
        self._num_known, self._seconds = 0, 0.0
        self._grammar, self._is_renewed, self._may_guess = self._grammar.renew(), True, False
        masks = TokenMasks(1, self._vocab_size, "cpu")
        for token_id in output_ids:
            masks.array[:] = -1
            why = self._fill_grammar(self._grammar, masks, 0) or self._follow((token_id,))
            if why or self._seconds > _MAX_SECONDS:  # all streams wait meanwhile
                return why or "it takes too long to follow it again"
        return ""

    def _go_back(self, output_ids: Sequence[int], ahead: Sequence[int]) -> None:
        """To where the way here and the way there part."""
        place, self._num_output = self._num_known, len(output_ids)
        for token_id in (*output_ids[place:], *ahead):
            if place == len(self._tokens) or self._tokens[place] != token_id:
                break
            place += 1
        self._pop(len(self._tokens) - place)
        self._num_known = min(len(output_ids), place)
        self._rows = {place: row for place, row in self._rows.items() if place >= self._num_known}

    def _pop(self, count: int) -> None:
        if count == 0:
            return
        length = len(self._tokens)
        del self._tokens[length - count :]
        if self._grammar is not None:
            num_free = 0 if self._after.token_id is None else self._after.count(length)
            self._grammar.rollback(min(count, length - num_free))
        for first in (self._after, self._think_end):
            first.cut(length - count)
        self._rows = {place: row for place, row in self._rows.items() if place <= length - count}

    def _copy_row(self, masks: TokenMasks, row: int, place: int) -> str:
        """Of `place`, which is not ahead of where it stands. Why that cannot be: then the row allows everything."""
        if place not in self._rows:
            self._pop(len(self._tokens) - place)
            why = self._fill_row(masks, row)
            if why:
                masks.array[row] = -1
                return why
            self._rows[place] = masks.array[row].copy()
        masks.array[row] = self._rows[place]
        return ""

    def _fill_row(self, masks: TokenMasks, row: int) -> str:
        why = "" if self._grammar is None else self._fill_grammar(self._grammar, masks, row)
        if why:
            return why
        sampling, length = self._sampling, len(self._tokens)
        budget = sampling.thinking_budget
        if budget is not None and length >= budget and self._think_end.place is None:
            assert sampling.think_end_id is not None
            masks.narrow(row, pack([sampling.think_end_id], self._vocab_size))
        if self._allowed is not None:
            masks.narrow(row, self._allowed)
        bad_ids = [word[-1] for word in sampling.bad_words if self._ends_with(word[:-1])]
        if bad_ids:
            masks.narrow(row, ~pack(bad_ids, self._vocab_size))
        if length < sampling.min_tokens:
            masks.narrow(row, self._not_stop)
        return ""

    @property
    def _is_constrained(self) -> bool:
        """The next token is the grammar's."""
        return self._after.token_id is None or self._after.place is not None

    def _fill_grammar(self, grammar: Matcher, masks: TokenMasks, row: int) -> str:
        if not self._is_constrained:
            if not self._may_be_empty:
                masks.narrow(row, self._not_eos)
            return ""
        start = time.perf_counter()
        grammar.fill(masks, row)
        self._count_time(start, len(self._tokens) <= self._num_output)
        return grammar.error() or ("" if masks.array[row].any() else NOTHING_FOLLOWS)

    @property
    def _limit(self) -> float:
        return _MAX_SECONDS + _MAX_SECONDS_PER_TOKEN * self._num_output

    def _count_time(self, start: float, is_known: bool) -> None:
        """Of the output, or of a guess."""
        seconds = time.perf_counter() - start
        if is_known:
            self._seconds += seconds
        else:
            self._guess_seconds += seconds
            self._may_guess &= self._guess_seconds <= self._limit

    def _ends_with(self, token_ids: Sequence[int]) -> bool:
        start = len(self._tokens) - len(token_ids)
        return start >= 0 and self._tokens[start:] == list(token_ids)

    def _fail(self, why: str) -> None:
        constraint = self._sampling.constraint
        assert constraint is not None
        message = f"{constraint.field} cannot be followed any further: {why}; make it simpler"
        self.failure = InvalidRequest(message, constraint.field)


def _allows_any(grammar: Matcher, token_ids: Sequence[int], vocab_size: int) -> bool:
    masks = TokenMasks(1, vocab_size, "cpu")
    grammar.fill(masks, 0)
    return any(masks.allows(0, token_id) for token_id in token_ids)


class _First:
    """The place where a token first stands in the output; None while it does not."""

    def __init__(self, token_id: int | None):
        self.token_id = token_id
        self.place: int | None = None

    def push(self, token_id: int, place: int) -> None:
        if self.place is None and token_id == self.token_id:
            self.place = place

    def count(self, length: int) -> int:
        """How many of the output's `length` tokens stand up to that place."""
        return length if self.place is None else self.place + 1

    def cut(self, length: int) -> None:
        """The output is `length` tokens long now."""
        if self.place is not None and self.place >= length:
            self.place = None
