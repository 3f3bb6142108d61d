"""Prompts in all their forms, several in one request, and cut ones."""

from typing import Any

import openai
import pytest

from unit_tests.server.conformance.answers import CHAT, COMPLETIONS, QUESTION, ask, prompt_ids, say
from unit_tests.server.conformance.conftest import Pair

pytestmark = pytest.mark.slow
TEXTS = ["Question: Ann has 5 pens. How many?\nAnswer:", "naïve 中文 😀", "x"]
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_its_ids_and_lists_of_them_are_the_same_prompt(pair: Pair, text: str) -> None:
    ids = prompt_ids(pair.plain, COMPLETIONS, prompt=text)
    expected = pair.ask(COMPLETIONS, prompt=text, **GREEDY)
    for prompt in ([text], ids, [ids]):
        answer = pair.ask(COMPLETIONS, prompt=prompt, **GREEDY)
        assert (answer.first, answer.usage[:2]) == (expected.first, expected.usage[:2])


@pytest.mark.parametrize("law", [{"temperature": 0}, {"temperature": 1.5, "seed": 4}], ids=["greedy", "seeded"])
def test_choices_of_several_prompts_are_in_order(pair: Pair, law: dict[str, Any]) -> None:
    fields = {"max_tokens": 8, "ignore_eos": True, "echo": True, "n": 2, **law}
    answer = pair.ask(COMPLETIONS, prompt=TEXTS, **fields)
    assert len(answer.choices) == 6
    alone = [pair.ask(COMPLETIONS, prompt=text, **fields) for text in TEXTS]
    for index, choice in enumerate(answer.choices):
        assert choice.text == alone[index // 2].choices[index % 2].text
        assert (choice.text or "").startswith(TEXTS[index // 2])
    assert answer.usage[0] == sum(one.usage[0] for one in alone) and answer.num_tokens == 48


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 63, 64, 65, 128, 129, 600])
def test_prompts_of_any_length(pair: Pair, length: int) -> None:
    ids = [(7 * i) % 900 for i in range(length)]
    answer = pair.ask(COMPLETIONS, prompt=ids, temperature=0, max_tokens=6, ignore_eos=True)
    assert answer.usage[:2] == [length, 6]


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_an_echo_is_the_prompt_before_its_continuation(pair: Pair, max_tokens: int) -> None:
    for text in TEXTS:
        answer = pair.ask(COMPLETIONS, prompt=text, echo=True, temperature=0, max_tokens=max_tokens, ignore_eos=True)
        free = pair.ask(COMPLETIONS, prompt=text, temperature=0, max_tokens=max(1, max_tokens), ignore_eos=True)
        assert answer.first.text == text + ((free.first.text or "") if max_tokens else "")
        assert (answer.num_tokens, answer.first.finish_reason) == (max_tokens, "length")


def test_a_prompt_is_cut_from_the_left_or_the_right(client: openai.OpenAI) -> None:
    ids = prompt_ids(client, COMPLETIONS, prompt=TEXTS[0])
    assert prompt_ids(client, COMPLETIONS, prompt=TEXTS[0], truncate_prompt_tokens=5) == ids[-5:]
    assert (
        prompt_ids(client, COMPLETIONS, prompt=TEXTS[0], truncate_prompt_tokens=5, truncation_side="right") == ids[:5]
    )
    assert prompt_ids(client, COMPLETIONS, prompt=TEXTS[0], truncate_prompt_tokens=4000) == ids
    assert 0 < len(prompt_ids(client, COMPLETIONS, prompt="1 " * 5000, truncate_prompt_tokens=-1)) < 4096
    assert ask(client, CHAT, truncate_prompt_tokens=7, max_tokens=1).usage[0] == 7


def test_parts_of_text_are_one_text(pair: Pair) -> None:
    expected = pair.ask(CHAT, **GREEDY)
    parts = [{"type": "text", "text": QUESTION[:9]}, {"type": "text", "text": QUESTION[9:]}]
    assert pair.ask(CHAT, messages=[{"role": "user", "content": parts}], **GREEDY).first == expected.first


def test_a_developer_is_the_system(pair: Pair) -> None:
    users = say(CHAT)["messages"]
    found = [
        pair.ask(CHAT, messages=[{"role": role, "content": "Be brief."}, *users], **GREEDY)
        for role in ("system", "developer")
    ]
    assert found[0].first == found[1].first and found[0].usage == found[1].usage


def test_what_was_computed_is_reused_unless_the_salt_differs(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int:
        extra = {"cache_salt": salt}
        answer = client.completions.create(model="", prompt=[3] * 200, max_tokens=1, temperature=0, extra_body=extra)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    counts = [cached(salt) for salt in ("one", "one", "one", "another")]
    assert (counts[0], counts[3]) == (0, 0)
    assert 100 < counts[2] < 200  # by the second time the server knew that the prompt comes again
