"""Log-probabilities, of the output and of the prompt: their forms, and the same numbers with and without drafts."""

import math
from typing import Any

import openai
import pytest

from unit_tests.server.conformance.answers import CHAT, COMPLETIONS, STRANGE_QUESTION, ask, create, prompt_ids, say
from unit_tests.server.conformance.conftest import Pair

pytestmark = pytest.mark.slow
LENGTH = 12
LAW = pytest.mark.parametrize("law", [{"temperature": 0}, {"temperature": 1.5, "seed": 6}], ids=["greedy", "seeded"])
PROMPT = "Anna had 5 naïve 😀 cats."
# Of the prompt, and one more for alternatives: vLLM tells 1..k+1.
ECHO_LENGTHS = [0, 1, LENGTH]


def is_logprob(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and -9999.0 <= value <= 0


@LAW
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_a_chat_tells_exactly_so_many_best_first(pair: Pair, law: dict[str, Any], num_top: int) -> None:
    fields = {**say(CHAT, STRANGE_QUESTION), "max_tokens": LENGTH, "logprobs": True, "top_logprobs": num_top, **law}
    answer = pair.ask(CHAT, **fields)
    entries = (answer.first.logprobs or {})["content"]
    assert len(entries) == answer.num_tokens
    for entry in entries:
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(values) == num_top and values == sorted(values, reverse=True)
        assert all(is_logprob(value) for value in [entry["logprob"], *values])
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
        assert entry["logprob"] <= (values[0] if values else 0)
    told = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert told.decode(errors="replace").startswith(answer.first.text or "")


def test_a_chat_without_logprobs_has_none(pair: Pair) -> None:
    for fields in ({}, {"logprobs": False}, {"logprobs": None, "top_logprobs": None}, {"top_logprobs": 0}):
        assert pair.ask(CHAT, max_tokens=4, temperature=0, **fields).first.logprobs is None


@LAW
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_a_completion_tells_the_sampled_token_and_the_best(pair: Pair, law: dict[str, Any], num_top: int) -> None:
    fields = {**say(COMPLETIONS, STRANGE_QUESTION), "max_tokens": LENGTH, "logprobs": num_top, **law}
    answer = pair.ask(COMPLETIONS, **fields)
    logprobs = answer.first.logprobs or {}
    assert {len(values) for values in logprobs.values()} == {answer.num_tokens}
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert next(iter(top)) == token and top[token] == logprob
        assert max(1, num_top - 1) <= len(top) <= num_top + 1  # two ids may have one text
        assert all(is_logprob(value) for value in top.values())
    assert logprobs["text_offset"][0] == 0 and logprobs["text_offset"] == sorted(logprobs["text_offset"])


@LAW
@pytest.mark.parametrize("max_tokens", ECHO_LENGTHS)
def test_a_prompt_is_scored_with_echo(pair: Pair, law: dict[str, Any], max_tokens: int) -> None:
    fields = {"prompt": PROMPT, "echo": True, "max_tokens": max_tokens, "logprobs": 3, "ignore_eos": True, **law}
    answer = pair.ask(COMPLETIONS, **fields)
    logprobs, (num_prompt, num_output, *_) = answer.first.logprobs or {}, answer.usage
    assert num_output == max_tokens and (answer.first.text or "").startswith(PROMPT)
    assert {len(values) for values in logprobs.values()} == {num_prompt + max_tokens}
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert all(map(is_logprob, logprobs["token_logprobs"][1:]))
    assert logprobs["text_offset"][0] == 0 and logprobs["text_offset"] == sorted(logprobs["text_offset"])


def test_the_score_of_an_output_is_that_of_the_same_prompt(pair: Pair) -> None:
    """What drafts and single steps computed is what one prefill computes."""
    fields = {"max_tokens": LENGTH, "logprobs": 0, "ignore_eos": True}
    written = pair.ask(COMPLETIONS, **say(COMPLETIONS, STRANGE_QUESTION), temperature=1.5, seed=2, **fields)
    ids = prompt_ids(pair.plain, COMPLETIONS, **say(COMPLETIONS, STRANGE_QUESTION))
    scored = pair.ask(COMPLETIONS, prompt=ids + written.first.token_ids, echo=True, max_tokens=0, logprobs=0)
    values = (scored.first.logprobs or {})["token_logprobs"][len(ids) :]
    assert values == pytest.approx((written.first.logprobs or {})["token_logprobs"], abs=5e-3)


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("num_top", [0, 3])
def test_prompt_logprobs_are_vllms(pair: Pair, endpoint: str, num_top: int) -> None:
    found = []
    for client in (pair.plain, pair.drafting):
        fields = {"prompt_logprobs": num_top, "return_token_ids": True, "max_tokens": 2, "temperature": 0}
        answer = create(client, endpoint, **fields).model_dump()
        holder = answer if endpoint == CHAT else answer["choices"][0]
        ids, entries = holder["prompt_token_ids"], holder["prompt_logprobs"]
        assert len(entries) == len(ids) == answer["usage"]["prompt_tokens"] and entries[0] is None
        for token_id, entry in zip(ids[1:], entries[1:], strict=True):
            assert is_logprob(entry[str(token_id)]["logprob"]) and len(entry) in (max(1, num_top), num_top + 1)
            ranks = sorted(value["rank"] for value in entry.values())
            assert ranks[:num_top] == list(range(1, num_top + 1))
        found.append([entry[str(i)]["logprob"] for i, entry in zip(ids[1:], entries[1:], strict=True)])
    assert found[0] == pytest.approx(found[1], abs=2e-3)


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_tokens_may_be_told_as_ids(client: openai.OpenAI, endpoint: str) -> None:
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if endpoint == CHAT else {"logprobs": 2}
    choice = ask(client, endpoint, max_tokens=LENGTH, temperature=0, return_tokens_as_token_ids=True, **wanted).first
    logprobs = choice.logprobs or {}
    tokens = [entry["token"] for entry in logprobs["content"]] if endpoint == CHAT else logprobs["tokens"]
    assert tokens == [f"token_id:{token_id}" for token_id in choice.token_ids]


@LAW
def test_log_probabilities_are_raw(client: openai.OpenAI, law: dict[str, Any]) -> None:
    """What shapes a draw does not change what is told of it."""
    fields = {"max_tokens": 1, "logprobs": 5, **law}
    plain = (ask(client, COMPLETIONS, **fields).first.logprobs or {})["top_logprobs"][0]
    shaped = ask(client, COMPLETIONS, **fields, presence_penalty=2, top_k=1, logit_bias={"70": 100}).first
    found = (shaped.logprobs or {})["top_logprobs"][0]
    assert shaped.token_ids == [70]
    best = sorted(plain.values(), reverse=True)[:4]
    assert sorted(found.values(), reverse=True)[:4] == pytest.approx(best, abs=1e-3)
