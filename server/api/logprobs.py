"""Log-probabilities as the two endpoints write them. JSON has no infinity, so -inf is sent as -9999."""

import codecs
from collections.abc import Sequence
from typing import Any

from server.api.generation import Delta
from server.messages import TokenLogprobs
from server.tokenizer import Tokenizer

_LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, delta: Delta, num_top: int) -> dict[str, Any]:
    """The chat form: {"content": [{token, logprob, bytes, top_logprobs}]}, exactly `num_top` alternatives each."""
    return {
        "content": [
            {
                **_chat_token(tokenizer, token_id, entry.logprob),
                "top_logprobs": [
                    _chat_token(tokenizer, top_id, logprob)
                    for top_id, logprob in list(zip(entry.top_ids, entry.top_logprobs, strict=True))[:num_top]
                ],
            }
            for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=True)
        ]
    }


class CompletionLogprobs:
    """The completions form for one choice: parallel lists, and where in the text each token starts."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def render(self, delta: Delta) -> dict[str, Any]:
        """{tokens, token_logprobs, top_logprobs, text_offset} of one delta; offsets count characters of the choice."""
        entries = list(zip(delta.token_ids, delta.logprobs, strict=True))
        return {
            "tokens": [completion_token(self._tokenizer, token_id) for token_id, _ in entries],
            "token_logprobs": [finite(entry.logprob) for _, entry in entries],
            "top_logprobs": [self._top(token_id, entry) for token_id, entry in entries],
            "text_offset": [self._next_offset(token_id) for token_id in delta.token_ids],
        }

    def _top(self, token_id: int, entry: TokenLogprobs) -> dict[str, float]:
        """The sampled token first, then the best ones: one entry more than asked for if it is not among them.

        Two ids may have the same text; the sampled one's value is the one that counts then.
        """
        sampled = {completion_token(self._tokenizer, token_id): finite(entry.logprob)}
        entries = zip(entry.top_ids, entry.top_logprobs, strict=True)
        best = {completion_token(self._tokenizer, i): finite(logprob) for i, logprob in entries}
        return sampled | best | sampled

    def _next_offset(self, token_id: int) -> int:
        start = self._offset
        if token_id not in self._skipped:
            self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(token_id)))
        return start


def merge_completion_logprobs(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lists of all deltas of a choice, joined."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [value for part in parts for value in part[name]] for name in names}


def completion_token(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as a dictionary key, so that tokens stay apart.

    Its text; `bytes:\\x..` for a part of a character; `token_id:N` for an id without a token.
    """
    data = tokenizer.token_bytes(token_id)
    if not data:
        return f"token_id:{token_id}"
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    """`logprob`, at least -9999."""
    return max(logprob, _LOWEST)


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode("utf-8", errors="replace"), "logprob": finite(logprob), "bytes": list(data)}
