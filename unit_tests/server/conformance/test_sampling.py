"""Every field that shapes what is drawn: it has its effect, and gives the same tokens with and without drafts."""

from typing import Any

import openai
import pytest

from unit_tests.server.conformance.answers import CHAT, COMPLETIONS, STRANGE_QUESTION, Choice, ask, prompt_ids, say
from unit_tests.server.conformance.conftest import Pair

pytestmark = pytest.mark.slow
ENDPOINT = pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
LENGTH = 20
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
GREEDY = {"temperature": 0}
SEEDED = {"temperature": 1.4, "seed": 11}
TINY_TOP_P = 1e-6
SHAPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 5},
    "top_k off": {"top_k": -1},
    "min_p": {"min_p": 0.05},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "presence_penalty": {"presence_penalty": 2},
    "frequency_penalty": {"frequency_penalty": 1.5},
    "negative penalties": {"presence_penalty": -1, "frequency_penalty": -2, "repetition_penalty": 0.8},
    "logit_bias": {"logit_bias": {"16": 2.5, "20": -100, "300": 3}},
    "allowed_token_ids": {"allowed_token_ids": list(range(40, 600))},
    "bad_words": {"bad_words": ["4", "apples", "Tom has"]},
    "min_tokens": {"min_tokens": LENGTH},
    "ignore_eos": {"ignore_eos": True},
    "stop_token_ids": {"stop_token_ids": list(range(0, 1000, 37))},
    "skip_special_tokens": {"skip_special_tokens": False, "ignore_eos": True},
    "spaces_between_special_tokens": {"spaces_between_special_tokens": False},
    "speculative": {"speculative": {"max_draft": 0}},
    "card": {"top_p": 0.95, "top_k": 20, "presence_penalty": 1.5},
    "filters": {"top_p": 0.9, "top_k": 30, "min_p": 0.01, "min_tokens": 5, "bad_words": ["has"], "n": 2},
}
SHAPES["everything"] = SHAPES["filters"] | {"repetition_penalty": 1.1, "presence_penalty": 0.5, "logit_bias": {"5": 1}}


def check_best(tops: list[dict[str, float]], choice: Choice, rules: dict[str, float]) -> None:
    """Every token is the best by the rules, of those that were told (which are keyed `token_id:N`)."""
    counts: dict[int, int] = {}
    for token_id, top in zip(choice.token_ids, tops, strict=True):
        scores = {}
        for key, logprob in top.items():
            candidate = int(key.removeprefix("token_id:"))
            score = logprob - rules.get("frequency_penalty", 0) * counts.get(candidate, 0)
            scores[candidate] = score - rules.get("presence_penalty", 0) * (candidate in counts)
        best = max(scores.values())
        assert best >= min(top.values()), "the rules may have preferred a token that was not told"
        assert scores[token_id] == pytest.approx(best, abs=1e-3)
        counts[token_id] = counts.get(token_id, 0) + 1


@ENDPOINT
@pytest.mark.parametrize("law", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_drafts_change_no_token(pair: Pair, endpoint: str, law: dict[str, Any], shape: str) -> None:
    prompt = say(endpoint, STRANGE_QUESTION) if law is SEEDED else {}
    answer = pair.ask(endpoint, max_tokens=LENGTH, **prompt, **SHAPES[shape] | law)
    assert answer.num_tokens == sum(len(choice.token_ids) for choice in answer.choices) > 0


@ENDPOINT
def test_sampled_drafts_are_accepted_and_rejected(pair: Pair, endpoint: str) -> None:
    fields = {"temperature": 1.4, "max_tokens": 60, "ignore_eos": True, "n": 3, "seed": 2}
    accepted, rejected = ask(pair.drafting, endpoint, **fields).usage[3:]
    assert accepted > 0 and rejected > 0
    assert ask(pair.plain, endpoint, **fields).usage[3:] == [0, 0]


@ENDPOINT
@pytest.mark.parametrize(
    "narrow",
    [{"temperature": 0}, {"temperature": 1e-6}, {"top_k": 1}, {"top_p": TINY_TOP_P}, {"min_p": 1}],
    ids=lambda narrow: next(iter(narrow)),
)
def test_the_narrowest_law_takes_the_best_token(client: openai.OpenAI, endpoint: str, narrow: dict[str, float]) -> None:
    best = ask(client, endpoint, max_tokens=LENGTH, temperature=0).first
    found = ask(client, endpoint, max_tokens=LENGTH, **{"temperature": 2, "seed": 4} | narrow).first
    assert found.token_ids == best.token_ids


@ENDPOINT
@pytest.mark.parametrize("rules", [{"presence_penalty": 1.5}, {"frequency_penalty": 1.1}, {}], ids=str)
def test_greedy_tokens_are_the_best_after_the_penalties(
    client: openai.OpenAI, endpoint: str, rules: dict[str, float]
) -> None:
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": 20} if endpoint == CHAT else {"logprobs": 20}
    fields = {"max_tokens": LENGTH, "ignore_eos": True, "return_tokens_as_token_ids": True}
    choice = ask(client, endpoint, temperature=0, **fields, **wanted, **rules).first
    assert choice.logprobs is not None
    if endpoint == CHAT:
        entries = choice.logprobs["content"]
        tops = [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries]
    else:
        tops = choice.logprobs["top_logprobs"]
    check_best(tops, choice, rules)


@ENDPOINT
def test_a_repetition_penalty_counts_the_prompt(client: openai.OpenAI, endpoint: str) -> None:
    seen = prompt_ids(client, endpoint)[8]
    unseen = next(token_id for token_id in range(40, 1000) if token_id not in prompt_ids(client, endpoint))
    fields = {"temperature": 0, "max_tokens": 1, "logit_bias": {str(seen): 100, str(unseen): 60}}
    assert ask(client, endpoint, **fields).first.token_ids == [seen]
    assert ask(client, endpoint, **fields, repetition_penalty=100).first.token_ids == [unseen]


@ENDPOINT
def test_a_bias_decides_up_to_its_limits(client: openai.OpenAI, endpoint: str) -> None:
    fields = {"temperature": 1, "seed": 1, "max_tokens": 4, "ignore_eos": True}
    assert ask(client, endpoint, **fields, logit_bias={"70": 100}).first.token_ids == [70] * 4
    bounded = ask(client, endpoint, **fields, logit_bias={"70": 100, "71": 100}).first.token_ids
    assert ask(client, endpoint, **fields, logit_bias={"70": 100, "71": 1e6}).first.token_ids == bounded
    first = ask(client, endpoint, temperature=0, max_tokens=1).first.token_ids[0]
    assert ask(client, endpoint, temperature=0, max_tokens=1, logit_bias={str(first): -100}).first.token_ids != [first]


@ENDPOINT
def test_only_allowed_tokens_come(pair: Pair, endpoint: str) -> None:
    fields = {"allowed_token_ids": [64, 65, 66, 300], "temperature": 1.5, "seed": 5, "max_tokens": LENGTH}
    choice = pair.ask(endpoint, **fields, n=2).choices[1]
    assert set(choice.token_ids) <= {64, 65, 66, 300} and len(choice.token_ids) == LENGTH


@ENDPOINT
def test_a_bad_word_never_comes(pair: Pair, endpoint: str) -> None:
    free = pair.ask(endpoint, temperature=0, max_tokens=LENGTH).first.text or ""
    word = free.split()[1]
    assert word not in (pair.ask(endpoint, temperature=0, max_tokens=LENGTH, bad_words=[word]).first.text or "")


@ENDPOINT
@pytest.mark.parametrize("seed", [0, 5, INT64_MIN, INT64_MAX])
def test_a_seed_is_a_promise(client: openai.OpenAI, endpoint: str, seed: int) -> None:
    fields = {"temperature": 2, "max_tokens": LENGTH, "ignore_eos": True, **say(endpoint, STRANGE_QUESTION)}
    first, again = (ask(client, endpoint, seed=seed, **fields).first.token_ids for _ in range(2))
    assert first == again
    others = [ask(client, endpoint, **fields).first.token_ids for _ in range(2)]
    assert others[0] != others[1]


@ENDPOINT
def test_choices_differ_and_none_is_that_of_the_next_seed(pair: Pair, endpoint: str) -> None:
    fields = {"temperature": 2, "max_tokens": 12, "ignore_eos": True, "n": 3, **say(endpoint, STRANGE_QUESTION)}
    answers = [pair.ask(endpoint, seed=seed, **fields) for seed in (8, 9)]
    drawn = [tuple(choice.token_ids) for answer in answers for choice in answer.choices]
    assert len(set(drawn)) == len(drawn)
    assert answers[0].num_tokens == 36


@ENDPOINT
def test_greedy_choices_are_alike(pair: Pair, endpoint: str) -> None:
    answer = pair.ask(endpoint, temperature=0, n=3, max_tokens=8)
    assert len({tuple(choice.token_ids) for choice in answer.choices}) == 1 and len(answer.choices) == 3


@pytest.mark.parametrize("law", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_the_best_of_several_are_told(pair: Pair, law: dict[str, Any]) -> None:
    fields = {"max_tokens": 10, "ignore_eos": True, "logprobs": 0, **law}
    every = pair.ask(COMPLETIONS, n=5, **fields).choices
    answer = pair.ask(COMPLETIONS, is_streamed=False, n=2, best_of=5, **fields)
    means = sorted(-sum((choice.logprobs or {})["token_logprobs"]) for choice in every)
    found = [-sum((choice.logprobs or {})["token_logprobs"]) for choice in answer.choices]
    assert found == pytest.approx(means[:2], abs=1e-2)
    assert answer.num_tokens == 50


@ENDPOINT
def test_a_request_may_draft_less_or_nothing(pair: Pair, endpoint: str) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True}
    for speculative in ({"enabled": False}, {"max_draft": 0}):
        assert ask(pair.drafting, endpoint, speculative=speculative, **fields).usage[3:] == [0, 0]
    assert sum(ask(pair.drafting, endpoint, speculative={"max_draft": 1}, **fields).usage[3:]) > 0
    pair.ask(endpoint, speculative={"enabled": True}, **fields)
