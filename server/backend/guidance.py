"""JSON, regular expressions and choices as masks, by llguidance. It bounds what a grammar may cost by itself."""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import llguidance
from llguidance import LLMatcher

from server.backend.json_schemas import close_objects, parse_schema
from server.backend.token_masks import TokenMasks
from server.errors import InvalidRequest
from server.tokenizer import Tokenizer

# Between items and after keys as Python writes JSON; anywhere else there is no whitespace.
_ITEM_SEPARATOR, _KEY_SEPARATOR = ", ", ": "
# Rows of an enum or object with as many alternatives.
_LIMITS = llguidance.LLParserLimits(max_items_in_row=20_000)
_ERROR = re.compile(r"^error: (.*)$", re.MULTILINE)
_SHOWN_CHARS = 200
_MAX_REMEMBERED, _MAX_FORCED_CHARS = 4096, 256
NOTHING_FOLLOWS = "nothing may follow"


class GuidanceMatcher:
    """Where an output stands in its grammar; `make` gives a new one of the library's. Copies share their lexer: where
    one of them has come to its limits, no other can go on either."""

    def __init__(self, matcher: LLMatcher, make: Callable[[], LLMatcher]):
        self._matcher, self._make = matcher, make

    def copy(self) -> "GuidanceMatcher":
        """Another one in the same place."""
        return GuidanceMatcher(self._matcher.deep_copy(), self._make)

    def renew(self) -> "GuidanceMatcher":
        """One at the start that shares nothing with this one."""
        return GuidanceMatcher(self._make(), self._make)

    def fill(self, masks: TokenMasks, row: int) -> None:
        """Allow in `row` what may come next; ids that end a request where the output may end."""
        words = masks.packed[row]
        self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.nbytes)

    def accept(self, token_id: int) -> bool:
        """Go on by a token; False, and nothing changes, for one that may not come."""
        return self._matcher.try_consume_tokens([token_id]) == 1

    def rollback(self, count: int) -> None:
        """Take the last tokens back."""
        self._matcher.rollback(count)

    def error(self) -> str:
        """Why there is no going on; empty while there is."""
        return describe(self._matcher.get_error()) if self._matcher.is_error() else ""


class Guidance:
    """Compiles for one tokenizer. Ids without a token, and special tokens but `stop_ids`, are never allowed."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]):
        vocabulary = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, stop_ids[0]))
        self._tokenizer = llguidance.LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=list(stop_ids))

    def compile(self, kind: str, text: str) -> GuidanceMatcher:
        """At the start of an output. Raises InvalidRequest."""
        if kind in ("regex", "choice"):
            pattern = text if kind == "regex" else "|".join(map(re.escape, _read_choices(text)))
            return self._start(LLMatcher.grammar_from_regex, pattern)
        schema = parse_schema(text or '{"type": "object"}')
        try:
            return self._start(_grammar_of_schema, close_objects(schema))
        except InvalidRequest:
            return self._start(_grammar_of_schema, schema)

    def _start(self, make_grammar: Callable[[Any], str], source: Any) -> GuidanceMatcher:
        try:
            make = functools.partial(LLMatcher, self._tokenizer, make_grammar(source), log_level=0, limits=_LIMITS)
            matcher = GuidanceMatcher(make(), make)
        except ValueError as error:
            raise InvalidRequest(describe(str(error))) from error
        if matcher.error():
            raise InvalidRequest(matcher.error())
        return matcher


def _grammar_of_schema(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(
        schema,
        overrides={
            "whitespace_flexible": False,
            "item_separator": _ITEM_SEPARATOR,
            "key_separator": _KEY_SEPARATOR,
            "coerce_one_of": True,
        },
    )


class _Vocabulary:
    """What the library asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int):
        self._remember = functools.lru_cache(maxsize=_MAX_REMEMBERED)(tokenizer.encode)
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = sorted(token_id for token_id in tokenizer.special_ids if token_id < vocab_size)

    def __call__(self, text: str) -> list[int]:
        """Asked at every token of a text that the grammar leaves no choice in, such as a key: for the rest of it. Only
        the first token is looked at, so that a long rest need not be tokenised again and again."""
        return self._remember(text[:_MAX_FORCED_CHARS])


def _read_choices(text: str) -> list[str]:
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"it is not valid JSON: {error}") from error
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise InvalidRequest("it must be a list of at least one string")
    return choices


def describe(message: str) -> str:
    """The library's message without its picture of the grammar and the parser's state."""
    if message.startswith("NoExtension"):
        return NOTHING_FOLLOWS
    found = _ERROR.findall(message)
    return " ".join((found[-1] if found else message.partition("<state>")[0]).split())[:_SHOWN_CHARS]
