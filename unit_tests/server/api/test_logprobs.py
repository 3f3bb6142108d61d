"""The two shapes of log-probabilities, for tokens that are hard to write."""

import pytest

from server.api.generation import Delta
from server.api.logprobs import CompletionLogprobs, chat_logprobs, completion_token, merge_completion_logprobs
from server.messages import TokenLogprobs
from server.tokenizer import Tokenizer

MINUS_INFINITY = float("-inf")


def _delta(token_ids: list[int], entry: TokenLogprobs) -> Delta:
    return Delta(0, "", token_ids, [entry] * len(token_ids), None, None)


def test_parts_of_a_character_stay_apart_as_keys(tokenizer: Tokenizer) -> None:
    parts = [token_id for token_id in tokenizer.encode("🚲🛵") if tokenizer.decode([token_id]) == "\ufffd"]
    keys = {completion_token(tokenizer, token_id) for token_id in parts}
    assert len(keys) == len(set(parts)) > 1
    assert all(key.startswith("bytes:\\x") for key in keys)


def test_offsets_count_characters_over_deltas_and_skip_special_tokens(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("the 中"), 1, *tokenizer.encode("fox")]
    entry = TokenLogprobs(-1.0, [], [])
    for skip in (True, False):
        writer = CompletionLogprobs(tokenizer, skip)
        offsets = merge_completion_logprobs([writer.render(_delta([i], entry)) for i in ids])["text_offset"]
        text = tokenizer.decode(ids, skip)
        assert text[offsets[-1] :] == tokenizer.decode(ids[-1:])
        assert offsets == sorted(offsets)


def test_the_sampled_token_comes_first_even_if_it_is_not_among_the_best(tokenizer: Tokenizer) -> None:
    rendered = CompletionLogprobs(tokenizer, True).render(_delta([70], TokenLogprobs(-5.0, [71, 72], [-0.1, -3.0])))
    (top,) = rendered["top_logprobs"]
    assert list(top.values()) == [-5.0, -0.1, -3.0]


def test_ids_without_a_token_stay_apart_and_the_sampled_tokens_value_wins(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.vocab_size + 1, tokenizer.vocab_size + 2
    delta = _delta([first], TokenLogprobs(-1.0, [second, first, 70], [-0.5, -1.0, -3.0]))
    (top,) = CompletionLogprobs(tokenizer, True).render(delta)["top_logprobs"]
    assert list(top.items()) == [
        (f"token_id:{first}", -1.0),
        (f"token_id:{second}", -0.5),
        (tokenizer.decode([70]), -3.0),
    ]


def test_of_two_tokens_with_the_same_text_the_sampled_ones_value_is_told(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "token_bytes", lambda _: b"same")
    rendered = CompletionLogprobs(tokenizer, True).render(_delta([70], TokenLogprobs(-5.0, [71], [-0.1])))
    assert rendered["top_logprobs"] == [{"same": -5.0}]


def test_minus_infinity_is_a_number_that_json_has(tokenizer: Tokenizer) -> None:
    delta = _delta([70], TokenLogprobs(MINUS_INFINITY, [70, 71], [-0.1, MINUS_INFINITY]))
    (entry,) = chat_logprobs(tokenizer, delta, 2)["content"]
    assert entry["logprob"] == -9999.0
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.1, -9999.0]
    assert CompletionLogprobs(tokenizer, True).render(delta)["token_logprobs"] == [-9999.0]
