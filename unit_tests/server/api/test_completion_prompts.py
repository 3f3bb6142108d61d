"""What /v1/completions says of prompts: echo, scores, cuts; and how many choices it makes of them."""

from itertools import chain
from typing import Any

import pytest

from server.tokenizer import Tokenizer
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error
from unit_tests.server.fake_engine import MAX_MODEL_LEN

PATH = "/v1/completions"
PROMPT = "the quick naïve café 中文字符 😀"
STREAM = pytest.mark.parametrize("stream", [True, False])


def complete(serving: Serving, stream: bool, index: int = 0, **fields: Any) -> dict[str, Any]:
    """One choice, put together from its chunks in a stream; its log-probabilities joined."""
    if not stream:
        return serving.complete(**fields)["choices"][index]
    chunks = [c for event in serving.events(PATH, **fields) for c in event["choices"] if c["index"] == index]
    parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    joined = {name: [*chain(*(part[name] for part in parts))] for name in parts[0]} if parts else None
    return {**chunks[-1], "text": "".join(chunk["text"] for chunk in chunks), "logprobs": joined}


@STREAM
def test_an_echo_is_the_prompt_and_its_continuation(serving: Serving, stream: bool) -> None:
    alone = complete(serving, stream, prompt=PROMPT, max_tokens=5)
    choice = complete(serving, stream, prompt=PROMPT, max_tokens=5, echo=True)
    assert choice["text"] == PROMPT + alone["text"]
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "length"


@STREAM
def test_an_echo_alone_needs_no_output_token(serving: Serving, stream: bool) -> None:
    choice = complete(serving, stream, prompt=PROMPT, max_tokens=0, echo=True)
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == (PROMPT, "length", None)
    usage = serving.complete(PROMPT, max_tokens=0, echo=True)["usage"]
    assert (usage["completion_tokens"], usage["prompt_tokens"]) == (0, len(serving.tokenizer.encode(PROMPT)))


@STREAM
@pytest.mark.parametrize("max_tokens", [0, 1, 9])
@pytest.mark.parametrize("as_ids", [True, False])
def test_log_probabilities_cover_prompt_and_output(
    serving: Serving, stream: bool, max_tokens: int, as_ids: bool
) -> None:
    ids = serving.tokenizer.encode(PROMPT)
    prompt: Any = ids if as_ids else PROMPT
    choice = complete(serving, stream, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=2)
    found = choice["logprobs"]
    assert {len(values) for values in found.values()} == {len(ids) + max_tokens}
    assert found["token_logprobs"] == [None] + [-0.5] * (len(ids) + max_tokens - 1)
    assert found["top_logprobs"][0] is None
    assert all(len(top) == 2 for top in found["top_logprobs"][1:])
    assert found["text_offset"][0] == 0 and found["text_offset"] == sorted(found["text_offset"])
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
    if max_tokens:
        assert found["text_offset"][len(ids)] == len(PROMPT)


def test_tokens_can_be_spelt_as_ids(serving: Serving) -> None:
    ids = serving.tokenizer.encode(PROMPT)
    fields = {"max_tokens": 2, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
    found = complete(serving, False, prompt=PROMPT, **fields)["logprobs"]
    names = [f"token_id:{token_id}" for token_id in [*ids, *ids[:2]]]
    assert found["tokens"] == names
    assert [list(top) for top in found["top_logprobs"][1:]] == [[name] for name in names[1:]]
    assert (
        found["text_offset"]
        == complete(serving, False, prompt=PROMPT, **{**fields, "return_tokens_as_token_ids": False})["logprobs"][
            "text_offset"
        ]
    )
    chat = serving.chat("hi", max_tokens=1, logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)
    (entry,) = chat["choices"][0]["logprobs"]["content"]
    first = serving.channel.sent[-1].prompt_token_ids[0]
    assert entry["token"] == entry["top_logprobs"][0]["token"] == f"token_id:{first}"
    assert bytes(entry["bytes"]) == serving.tokenizer.token_bytes(first)


@STREAM
def test_every_choice_of_every_prompt_has_its_own_echo(serving: Serving, stream: bool) -> None:
    prompts = ["the fox", "12 + 30"]
    for index in range(4):
        fields = {"prompt": prompts, "n": 2, "max_tokens": 2, "echo": True, "logprobs": 0}
        choice = complete(serving, stream, index, **fields)
        prompt = prompts[index // 2]
        assert choice["text"].startswith(prompt)
        assert len(choice["logprobs"]["tokens"]) == len(serving.tokenizer.encode(prompt)) + 2


def test_an_echo_shows_the_prompts_special_tokens(serving: Serving, tokenizer: Tokenizer) -> None:
    text = "<|im_start|>the fox"
    ids = tokenizer.encode(text)
    for prompt in (text, ids, [text], [ids]):
        choice = complete(serving, False, prompt=prompt, max_tokens=1, echo=True, logprobs=0)
        assert choice["text"] == text
        assert choice["logprobs"]["tokens"][:2] == ["<|im_start|>", tokenizer.decode(ids[1:2])]
        assert choice["logprobs"]["text_offset"][:2] == [0, len("<|im_start|>")]


def test_an_echo_is_what_the_client_wrote(serving: Serving) -> None:
    decomposed = "cafe\u0301"
    assert complete(serving, False, prompt=decomposed, max_tokens=0, echo=True)["text"] == decomposed
    assert complete(serving, False, prompt=[decomposed], max_tokens=0, echo=True)["text"] == decomposed


def test_a_prompt_is_scored_once_for_echo_and_prompt_logprobs(serving: Serving) -> None:
    ids = serving.tokenizer.encode(PROMPT)
    for logprobs, prompt_logprobs in ((1, 3), (3, 1), (0, 0)):
        fields = {"prompt": PROMPT, "max_tokens": 0, "echo": True}
        choice = complete(serving, False, **fields, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        sampling = serving.channel.sent[-1].sampling
        assert (sampling.prompt_logprobs, sampling.logprobs) == (max(logprobs, prompt_logprobs), logprobs)
        assert all(len(top) == max(1, logprobs) for top in choice["logprobs"]["top_logprobs"][1:])
        assert all(len(entry) == max(1, prompt_logprobs) for entry in choice["prompt_logprobs"][1:])
        assert len(choice["prompt_logprobs"]) == len(ids)


def test_no_output_token_is_asked_for_only_where_the_prompt_is_told_or_scored(serving: Serving) -> None:
    body = {"prompt": PROMPT, "max_tokens": 0}
    check_error(serving.http.post(PATH, json=body), 400, "max_tokens", f"1..{MAX_MODEL_LEN}")
    choice = complete(serving, False, **body, prompt_logprobs=0)
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    assert len(choice["prompt_logprobs"]) == len(serving.tokenizer.encode(PROMPT))
    check_error(serving.http.post(PATH, json={**body, "echo": True, "min_tokens": 1}), 400, "min_tokens", "max_tokens")


def test_long_prompts_are_cut_when_asked_for(serving: Serving) -> None:
    ids = list(range(10, 310))
    check_error(serving.http.post(PATH, json={"prompt": ids}), 400, "prompt", "maximum context length is 256 tokens")
    for fields, kept in (
        ({"truncate_prompt_tokens": 5}, ids[-5:]),
        ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, ids[:5]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 56}, ids[-200:]),
        ({"truncate_prompt_tokens": MAX_MODEL_LEN}, ids[-255:]),
    ):
        serving.complete(ids, **{"max_tokens": 1, **fields})
        assert serving.channel.sent[-1].prompt_token_ids == kept
    text = "the fox " * 1000
    choice = complete(serving, False, prompt=text, truncate_prompt_tokens=6, max_tokens=0, echo=True)
    cut = serving.channel.sent[-1].prompt_token_ids
    assert cut == serving.tokenizer.encode(text)[-6:]
    assert choice["text"] == serving.tokenizer.decode(cut)


def test_the_same_cut_holds_for_chats(serving: Serving) -> None:
    for asked, fields, kept in (
        (7, {"max_tokens": 1}, 7),
        (-1, {"max_tokens": 50, "max_completion_tokens": 56}, MAX_MODEL_LEN - 56),
        (-1, {}, MAX_MODEL_LEN - 1),
    ):
        serving.chat("the fox " * 1000, truncate_prompt_tokens=asked, **fields)
        assert len(serving.channel.sent[-1].prompt_token_ids) == kept


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("echo", 1, "true or false"),
        ("logprobs", 21, "0..20"),
        ("logprobs", -1, "--max-logprobs"),
        ("logprobs", True, "an integer"),
        ("prompt_logprobs", 1.5, "an integer"),
        ("best_of", 0, "1..128"),
        ("best_of", 129, "1..128"),
        ("truncate_prompt_tokens", 0, "1..256"),
        ("truncation_side", "top", "left or right"),
        ("add_special_tokens", "yes", "true or false"),
        ("spaces_between_special_tokens", 1, "true or false"),
        ("return_token_ids", "yes", "true or false"),
        ("return_spec", 1, "true or false"),
        ("return_tokens_as_token_ids", 0, "true or false"),
        ("suffix", "the end", "not served"),
        ("use_beam_search", True, "not served"),
    ],
)
def test_a_wrong_value_is_named_with_its_limit(serving: Serving, field: str, value: Any, limit: str) -> None:
    check_error(serving.http.post(PATH, json={"prompt": "hi", field: value}), 400, field, field, limit)
    assert serving.channel.sent == []


def test_the_best_of_as_many_choices_as_are_told_are_all(serving: Serving) -> None:
    for stream in (True, False):
        answer = serving.http.post(PATH, json={"prompt": "hi", "n": 2, "best_of": 2, "stream": stream})
        assert answer.status_code == 200
    assert len(serving.channel.sent) == 4
    assert {message.sampling.logprobs for message in serving.channel.sent} == {None}


def test_the_best_of_more_choices_are_not_known_before_the_end(serving: Serving) -> None:
    body = {"prompt": "hi", "best_of": 3, "stream": True}
    check_error(serving.http.post(PATH, json=body), 400, "best_of", "leave stream out")
    check_error(serving.http.post(PATH, json={"prompt": ["a"] * 100, "best_of": 11}), 400, "n", "best_of = 11", "1024")


def test_greedy_choices_are_alike(serving: Serving) -> None:
    answer = serving.complete(PROMPT, n=3, best_of=5, temperature=0, max_tokens=4)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in answer["choices"]}) == 1
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 20
