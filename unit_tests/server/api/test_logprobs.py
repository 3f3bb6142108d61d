"""The two shapes of log-probabilities, for tokens that are hard to write."""

import copy

import pytest

from server.api.generation import Delta
from server.api.logprobs import (
    CompletionLogprobs,
    chat_logprobs,
    completion_token,
    merge_completion_logprobs,
    prompt_logprobs,
)
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
        writer = CompletionLogprobs(tokenizer, skip, 0)
        offsets = merge_completion_logprobs([writer.render(_delta([i], entry)) for i in ids])["text_offset"]
        text = tokenizer.decode(ids, skip)
        assert text[offsets[-1] :] == tokenizer.decode(ids[-1:])
        assert offsets == sorted(offsets)


def test_the_sampled_token_comes_first_even_if_it_is_not_among_the_best(tokenizer: Tokenizer) -> None:
    rendered = CompletionLogprobs(tokenizer, True, 3).render(_delta([70], TokenLogprobs(-5.0, [71, 72], [-0.1, -3.0])))
    (top,) = rendered["top_logprobs"]
    assert list(top.values()) == [-5.0, -0.1, -3.0]


def test_ids_without_a_token_stay_apart_and_the_sampled_tokens_value_wins(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.vocab_size + 1, tokenizer.vocab_size + 2
    delta = _delta([first], TokenLogprobs(-1.0, [second, first, 70], [-0.5, -1.0, -3.0]))
    (top,) = CompletionLogprobs(tokenizer, True, 3).render(delta)["top_logprobs"]
    assert list(top.items()) == [
        (f"token_id:{first}", -1.0),
        (f"token_id:{second}", -0.5),
        (tokenizer.decode([70]), -3.0),
    ]


def test_of_two_tokens_with_the_same_text_the_sampled_ones_value_is_told(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy.copy(tokenizer)  # names are remembered by tokenizer
    monkeypatch.setattr(other, "token_bytes", lambda _: b"same")
    rendered = CompletionLogprobs(other, True, 3).render(_delta([70], TokenLogprobs(-5.0, [71], [-0.1])))
    assert rendered["top_logprobs"] == [{"same": -5.0}]


def test_minus_infinity_is_a_number_that_json_has(tokenizer: Tokenizer) -> None:
    delta = _delta([70], TokenLogprobs(MINUS_INFINITY, [70, 71], [-0.1, MINUS_INFINITY]))
    (entry,) = chat_logprobs(tokenizer, delta, 2)["content"]
    assert entry["logprob"] == -9999.0
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.1, -9999.0]
    assert CompletionLogprobs(tokenizer, True, 3).render(delta)["token_logprobs"] == [-9999.0]


def test_prompt_tokens_are_told_by_id_with_their_ranks(tokenizer: Tokenizer) -> None:
    scores = [TokenLogprobs(-3.0, [80, 81], [-0.5, -1.0], 7), TokenLogprobs(MINUS_INFINITY, [82, 72], [-0.1, -9.0], 2)]
    first, second, third = prompt_logprobs(tokenizer, [70, 71, 72], scores, 2)
    assert first is None and second is not None and third is not None
    assert list(second) == ["71", "80", "81"]
    assert [entry["rank"] for entry in second.values()] == [7, 1, 2]
    assert second["71"] == {"logprob": -3.0, "rank": 7, "decoded_token": tokenizer.decode([71])}
    assert list(third) == ["72", "82"]
    assert third["72"]["logprob"] == -9999.0
    assert [list(entry) for entry in prompt_logprobs(tokenizer, [70, 71], scores[:1], 0)[1:] if entry] == [["71"]]
    assert prompt_logprobs(tokenizer, [70], [], 2) == [None]


def test_a_prompt_shows_its_special_tokens_and_the_output_goes_on_behind_it(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>naïve 😀"
    prompt, scores = tokenizer.encode(text), [TokenLogprobs(-1.0, [70, 71, 72], [-0.5, -0.6, -0.7])]
    writer = CompletionLogprobs(tokenizer, True, 2, text)
    rendered = writer.render_prompt(prompt, scores * (len(prompt) - 1))
    assert rendered["token_logprobs"] == [None] + [-1.0] * (len(prompt) - 1)
    assert rendered["top_logprobs"][0] is None
    assert all(list(top.values()) == [-1.0, -0.5, -0.6] for top in rendered["top_logprobs"][1:])
    for token, offset in zip(rendered["tokens"], rendered["text_offset"], strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)
    assert writer.render(_delta([80, 81], scores[0]))["text_offset"] == [len(text), len(text) + 1]


def test_tokens_can_be_spelt_as_ids(tokenizer: Tokenizer) -> None:
    entry = TokenLogprobs(-1.0, [71], [-0.5])
    rendered = CompletionLogprobs(tokenizer, True, 1, tokens_as_ids=True).render(_delta([70], entry))
    assert rendered["tokens"] == ["token_id:70"]
    assert rendered["top_logprobs"] == [{"token_id:70": -1.0, "token_id:71": -0.5}]
    (content,) = chat_logprobs(tokenizer, _delta([70], entry), 1, tokens_as_ids=True)["content"]
    assert (content["token"], content["top_logprobs"][0]["token"]) == ("token_id:70", "token_id:71")
    assert bytes(content["bytes"]) == tokenizer.token_bytes(70)
