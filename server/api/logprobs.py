"""Log-probabilities as the endpoints write them. JSON has no infinity, so -inf is sent as -9999."""

import codecs
from collections.abc import Sequence
from functools import cache
from typing import Any

from server.api.generation import Delta
from server.messages import TokenLogprobs
from server.tokenizer import Tokenizer

_LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, delta: Delta, num_top: int, tokens_as_ids: bool = False) -> dict[str, Any]:
    """The chat form: {"content": [{token, logprob, bytes, top_logprobs}]}, exactly `num_top` alternatives each."""
    return {
        "content": [
            {
                **_chat_token(tokenizer, token_id, entry.logprob, tokens_as_ids),
                "top_logprobs": [
                    _chat_token(tokenizer, top_id, logprob, tokens_as_ids)
                    for top_id, logprob in list(zip(entry.top_ids, entry.top_logprobs, strict=True))[:num_top]
                ],
            }
            for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=True)
        ]
    }


def prompt_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], scores: Sequence[TokenLogprobs], num_top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's form for a prompt: null for its first token, then for each a mapping of ids to {logprob, rank,
    decoded_token}: the token's own, and the `num_top` best."""
    entries: list[dict[str, dict[str, Any]] | None] = [None]
    for token_id, score in zip(prompt[1:], scores, strict=True):
        best = list(zip(score.top_ids, score.top_logprobs, strict=True))[:num_top]
        ranked = [(token_id, score.logprob, score.rank)]
        ranked += [(top_id, logprob, rank) for rank, (top_id, logprob) in enumerate(best, 1) if top_id != token_id]
        entries.append(
            {
                str(each): {"logprob": finite(logprob), "rank": rank, "decoded_token": _text(tokenizer, each)}
                for each, logprob, rank in ranked
            }
        )
    return entries


class CompletionLogprobs:
    """The completions form for one choice: parallel lists, and where in the text each token starts.

    `num_top` alternatives per token. `prompt_text` stands before the choice's own text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool,
        num_top: int,
        prompt_text: str = "",
        tokens_as_ids: bool = False,
    ):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._num_top = num_top
        self._name = "token_id:{}".format if tokens_as_ids else _names(tokenizer).__getitem__
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = len(prompt_text)

    def render(self, delta: Delta) -> dict[str, Any]:
        """{tokens, token_logprobs, top_logprobs, text_offset} of one delta; offsets count characters of the choice."""
        return {
            "tokens": list(map(self._name, delta.token_ids)),
            "token_logprobs": [finite(entry.logprob) for entry in delta.logprobs],
            "top_logprobs": [self._top(*pair) for pair in zip(delta.token_ids, delta.logprobs, strict=True)],
            "text_offset": list(map(self._next_offset, delta.token_ids)),
        }

    def render_prompt(self, prompt: Sequence[int], scores: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The same of the prompt, which is shown with its special tokens; nothing can be said of its first token."""
        entries = list(zip(prompt[1:], scores, strict=True))
        utf8, offsets, offset = codecs.getincrementaldecoder("utf-8")(errors="replace"), [], 0
        for token_id in prompt:
            offsets.append(offset)
            offset += len(utf8.decode(self._tokenizer.token_bytes(token_id)))
        return {
            "tokens": [self._name(token_id) for token_id in prompt],
            "token_logprobs": [None, *(finite(entry.logprob) for _, entry in entries)],
            "top_logprobs": [None, *(self._top(token_id, entry) for token_id, entry in entries)],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, entry: TokenLogprobs) -> dict[str, float]:
        """The sampled token first, then the best ones: one entry more than asked for if it is not among them.

        Two ids may have the same text; the sampled one's value is the one that counts then.
        """
        ids, logprobs = [token_id, *entry.top_ids[: self._num_top]], [0.0, *entry.top_logprobs]
        if not logprobs[-1] > _LOWEST:
            logprobs = list(map(finite, logprobs))
        told = dict(zip(map(self._name, ids), logprobs, strict=False))
        told[self._name(token_id)] = finite(entry.logprob)
        return told

    def _next_offset(self, token_id: int) -> int:
        start = self._offset
        if token_id not in self._skipped:
            self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(token_id)))
        return start


def merge_completion_logprobs(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lists of all deltas of a choice, joined."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [value for part in parts for value in part[name]] for name in names}


class _Names(dict[int, str]):
    """Of tokens, as far as they were needed: of each token that is told there are those of all its alternatives."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str:
        name = self[token_id] = completion_token(self._tokenizer, token_id)
        return name


_names = cache(_Names)


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
    return logprob if logprob > _LOWEST else _LOWEST


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float, as_id: bool) -> dict[str, Any]:
    token = f"token_id:{token_id}" if as_id else _text(tokenizer, token_id)
    return {"token": token, "logprob": finite(logprob), "bytes": list(tokenizer.token_bytes(token_id))}


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
