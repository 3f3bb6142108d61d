"""Where an answer ends: tokens, stop strings, stop tokens, the end of the context; exact inside of steps, too."""

from typing import Any

import openai
import pytest

from unit_tests.server.conformance.answers import CHAT, COMPLETIONS, STRANGE_QUESTION, Answer, ask, create, say
from unit_tests.server.conformance.conftest import Pair

pytestmark = pytest.mark.slow
ENDPOINT = pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
LAWS = [{"temperature": 0}, {"temperature": 1.5, "seed": 3}]
LAW = pytest.mark.parametrize("law", LAWS, ids=["greedy", "seeded"])
END_OF_TURN = "<|im_end|>"


def ask_freely(pair: Pair, endpoint: str, law: dict[str, Any]) -> Answer:
    """An answer that something is to be cut off from."""
    prompt = say(endpoint, STRANGE_QUESTION) if law is LAWS[1] else {}
    return pair.ask(endpoint, max_tokens=30, **prompt, **law)


@ENDPOINT
@LAW
def test_max_tokens_is_exact_at_every_place_of_a_step(pair: Pair, endpoint: str, law: dict[str, Any]) -> None:
    whole = pair.ask(endpoint, max_tokens=12, ignore_eos=True, **law).first.token_ids
    for max_tokens in range(1, 10):
        answer = pair.ask(endpoint, max_tokens=max_tokens, ignore_eos=True, **law)
        assert answer.first.token_ids == whole[:max_tokens]
        assert (answer.num_tokens, answer.first.finish_reason) == (max_tokens, "length")


@ENDPOINT
@LAW
def test_a_stop_string_cuts_wherever_it_stands(pair: Pair, endpoint: str, law: dict[str, Any]) -> None:
    prompt = say(endpoint, STRANGE_QUESTION) if law is LAWS[1] else {}
    text = ask_freely(pair, endpoint, law).first.text or ""
    for start in range(2, min(len(text) - 4, 20), 5):
        stop = text[start : start + 3]
        fields = {"max_tokens": 30, "stop": [stop, "never to be seen"], **prompt, **law}
        choice = pair.ask(endpoint, **fields).first
        assert choice.text == text[: text.index(stop)]
        assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
        kept = pair.ask(endpoint, **fields, include_stop_str_in_output=True).first
        assert kept.text == text[: text.index(stop)] + stop and kept.token_ids == choice.token_ids


@ENDPOINT
def test_one_stop_string_needs_no_list_and_the_first_to_come_counts(pair: Pair, endpoint: str) -> None:
    text = ask_freely(pair, endpoint, LAWS[0]).first.text or ""
    early, late = text[3:5], text[8:11]
    assert pair.ask(endpoint, max_tokens=30, temperature=0, stop=early).first.stop_reason == early
    assert pair.ask(endpoint, max_tokens=30, temperature=0, stop=[late, early]).first.stop_reason == early


@ENDPOINT
@LAW
def test_a_stop_token_ends_and_is_named(pair: Pair, endpoint: str, law: dict[str, Any]) -> None:
    prompt = say(endpoint, STRANGE_QUESTION) if law is LAWS[1] else {}
    free = ask_freely(pair, endpoint, law).first.token_ids
    for place in (0, 3, 6):
        ids = free[: free.index(free[place]) + 1]
        choice = pair.ask(endpoint, max_tokens=30, stop_token_ids=[free[place]], **prompt, **law).first
        assert choice.token_ids == ids
        assert (choice.finish_reason, choice.stop_reason) == ("stop", free[place])


@ENDPOINT
def test_the_end_of_the_turn_is_counted_and_not_told_unless_asked_for(pair: Pair, endpoint: str) -> None:
    answer = pair.ask(endpoint, temperature=0, max_tokens=100)
    choice, end = answer.first, answer.first.token_ids[-1]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", None)
    assert answer.num_tokens == len(choice.token_ids) < 100
    fields = {"temperature": 0, "max_tokens": answer.num_tokens + 4}
    longer = pair.ask(endpoint, ignore_eos=True, **fields)
    assert (longer.num_tokens, longer.first.finish_reason) == (answer.num_tokens + 4, "length")
    assert longer.first.token_ids[: answer.num_tokens] == choice.token_ids
    shown = pair.ask(endpoint, ignore_eos=True, skip_special_tokens=False, **fields).first.text or ""
    hidden = longer.first.text or ""
    assert shown.startswith(choice.text or "") and "<|" in shown and "<|" not in hidden
    delayed = pair.ask(endpoint, min_tokens=answer.num_tokens + 2, **fields)
    assert end not in delayed.first.token_ids[: answer.num_tokens + 1]


@ENDPOINT
def test_stop_strings_wait_for_min_tokens_as_tokens_do(client: openai.OpenAI, endpoint: str) -> None:
    free = ask(client, endpoint, max_tokens=20, temperature=0, ignore_eos=True)
    token_id = free.first.token_ids[2]
    fields = {"max_tokens": 20, "temperature": 0, "min_tokens": 10, "stop_token_ids": [token_id]}
    assert token_id not in ask(client, endpoint, **fields).first.token_ids[:9]


@ENDPOINT
def test_the_context_ends_an_answer(client: openai.OpenAI, endpoint: str) -> None:
    context = client.models.list().data[0].model_dump()["max_model_len"]
    fields = {**say(endpoint, "1 " * (context // 2 - 40)), "temperature": 0, "ignore_eos": True}
    wanted = {} if endpoint == CHAT else {"max_tokens": 150}  # a chat has the rest of the context anyway
    answer = ask(client, endpoint, **wanted, **fields)
    assert (sum(answer.usage[:2]), answer.first.finish_reason) == (context, "length")


def test_a_completion_has_sixteen_tokens_unless_more_are_asked_for(client: openai.OpenAI) -> None:
    assert ask(client, COMPLETIONS, temperature=0, ignore_eos=True).num_tokens == 16


def test_max_completion_tokens_goes_before_max_tokens(pair: Pair) -> None:
    fields = {"temperature": 0, "ignore_eos": True}
    assert pair.ask(CHAT, max_completion_tokens=5, max_tokens=9, **fields).num_tokens == 5
    assert pair.ask(CHAT, max_completion_tokens=5, **fields).num_tokens == 5


@ENDPOINT
@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_over_the_context_says_so_as_clients_expect(
    client: openai.OpenAI, endpoint: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, endpoint, stream=stream, **say(endpoint, "1 " * 5000))
    body: Any = caught.value.body
    assert body["message"].startswith("This model's maximum context length is 4096 tokens")
    assert body["param"] == ("messages" if endpoint == CHAT else "prompt")
