"""Constraints -> matchers, beside the steps of the engine: one thread, and a memory of what was asked for last."""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from server.backend.guidance import NOTHING_FOLLOWS, Guidance
from server.backend.matcher import EitherMatcher, Matcher
from server.backend.token_masks import TokenMasks
from server.backend.xgrammar_process import XgrammarProcess
from server.errors import CheckpointError, GrammarUnavailable, InvalidRequest
from server.messages import Constraint
from server.tokenizer import Tokenizer

# Compiled grammars take up to some hundred times as much memory as their texts.
_MAX_REMEMBERED, _MAX_REMEMBERED_CHARS = 256, 2**20
_XGRAMMAR_KINDS = ("grammar", "structural_tag")


class GrammarCompiler:
    """For the tokenizer in `directory`, which is not read before the first constraint; `stop_ids` end outputs."""

    def __init__(self, directory: str | Path, vocab_size: int, stop_ids: Sequence[int]):
        self._directory, self._vocab_size, self._stop_ids = directory, vocab_size, stop_ids
        self._known: OrderedDict[tuple[tuple[str, str], ...], Future[Matcher]] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tandem-grammars")
        self._xgrammar = XgrammarProcess(directory, vocab_size, stop_ids)
        self._guidance: Guidance | None = None

    def compile(self, constraint: Constraint) -> "Future[Matcher]":
        """A matcher to copy, at the start of an output; InvalidRequest for what cannot be served."""
        first = constraint.kind, constraint.text
        key = (first,) if constraint.alternative is None else (first, constraint.alternative)
        if key not in self._known or self._is_spent(self._known[key]):
            self._known[key] = self._pool.submit(self._compile, key)
            self._forget()
        self._known.move_to_end(key)
        return self._known[key]

    def _forget(self) -> None:
        """The last ones stay, as many as fit, and always the newest."""
        total = sum(map(_count_chars, self._known))
        while len(self._known) > 1 and (len(self._known) > _MAX_REMEMBERED or total > _MAX_REMEMBERED_CHARS):
            key, _ = self._known.popitem(last=False)
            total -= _count_chars(key)

    def _compile(self, forms: Sequence[tuple[str, str]]) -> Matcher:
        if not self._stop_ids:
            raise InvalidRequest("this checkpoint names no token that ends an output, so none can be constrained")
        try:
            matchers = [self._start(kind, text) for kind, text in forms]
        except CheckpointError as error:
            raise GrammarUnavailable(f"this checkpoint's tokenizer cannot be read: {error.message}") from error
        for matcher in matchers:
            if why := self._refuse_start(matcher):
                raise InvalidRequest(f"no text can begin with it: {why}")
        return matchers[0] if len(matchers) == 1 else EitherMatcher(matchers)

    def _refuse_start(self, matcher: Matcher) -> str:
        """Why nothing can be the first token; empty if something can."""
        masks, first = TokenMasks(1, self._vocab_size, "cpu"), matcher.copy()
        first.fill(masks, 0)
        return first.error() or ("" if masks.array.any() else NOTHING_FOLLOWS)

    def _is_spent(self, future: "Future[Matcher]") -> bool:
        """What came of it says nothing of the text any more: something else failed, or an output has since come to the
        limits of what its copies share."""
        if not future.done():
            return False
        error = future.exception()
        if error is not None:
            return isinstance(error, GrammarUnavailable) or not isinstance(error, InvalidRequest)
        return bool(self._refuse_start(future.result()))

    def _start(self, kind: str, text: str) -> Matcher:
        if kind in _XGRAMMAR_KINDS:
            return self._xgrammar.compile(kind, text)
        if self._guidance is None:
            self._guidance = Guidance(Tokenizer(self._directory), self._vocab_size, self._stop_ids)
        return self._guidance.compile(kind, text)


def _count_chars(forms: Sequence[tuple[str, str]]) -> int:
    return sum(len(text) for _, text in forms)
