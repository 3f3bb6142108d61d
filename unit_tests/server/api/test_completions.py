"""POST /v1/completions, whole and streamed."""

from typing import Any

import pytest

from unit_tests.server.api.conftest import Serving
from unit_tests.server.fake_engine import EOS_ID

PATH = "/v1/completions"
PROMPT = "the quick naïve café 中文字符 😀"


def _join(events: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for event in events for c in event["choices"] if c["index"] == index)


def test_a_text_is_completed_with_16_tokens_by_default(serving: Serving) -> None:
    ids = serving.tokenizer.encode(PROMPT)
    answer = serving.complete(PROMPT)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "text": serving.tokenizer.decode((ids * 16)[:16]),
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
            "prompt_token_ids": None,
            "prompt_logprobs": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 16,
        "total_tokens": len(ids) + 16,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 10,
            "rejected_prediction_tokens": 0,
            "reasoning_tokens": 0,
        },
    }


def test_the_sum_of_the_deltas_is_the_whole_text(serving: Serving) -> None:
    for max_tokens in range(1, 40):
        whole = serving.complete(PROMPT, max_tokens=max_tokens)["choices"][0]["text"]
        events = serving.events(PATH, prompt=PROMPT, max_tokens=max_tokens)
        assert _join(events) == whole
        assert [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]] == ["length"]
        assert all("usage" not in event for event in events)
        assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1


def test_usage_comes_last_with_no_choices_when_asked_for(serving: Serving) -> None:
    events = serving.events(PATH, prompt=PROMPT, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == serving.complete(PROMPT)["usage"]
    assert all(event["usage"] is None for event in events[:-1])


def test_continuous_usage_never_falls(serving: Serving) -> None:
    events = serving.events(PATH, prompt=PROMPT, stream_options={"continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 16


@pytest.mark.parametrize("stream", [True, False])
def test_prompts_and_choices_are_told_apart_by_index(serving: Serving, stream: bool) -> None:
    prompts = [[10, 11], [20, 21], [30, 31]]
    expected = [serving.tokenizer.decode((prompt * 4)[:4]) for prompt in prompts for _ in range(2)]
    if stream:
        events = serving.events(PATH, prompt=prompts, n=2, max_tokens=4, stream_options={"include_usage": True})
        texts, usage = [_join(events, i) for i in range(6)], events[-1]["usage"]
    else:
        answer = serving.complete(prompts, n=2, max_tokens=4)
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        texts, usage = [choice["text"] for choice in answer["choices"]], answer["usage"]
    assert texts == expected
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, 24)


def test_a_list_of_texts_is_a_batch(serving: Serving) -> None:
    answer = serving.complete(["the fox", "12 + 30"], max_tokens=2)
    assert len(answer["choices"]) == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_cuts_inside_a_step_and_the_engine_is_told(serving: Serving, stream: bool) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 200, "stop": ["ïve"]}
    if stream:
        events = serving.events(PATH, **fields, stream_options={"include_usage": True})
        text, last, usage = _join(events), events[-2]["choices"][0], events[-1]["usage"]
    else:
        answer = serving.complete(**fields)
        last, usage = answer["choices"][0], answer["usage"]
        text = last["text"]
    assert text == "the quick na"
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "ïve")
    ids = serving.tokenizer.encode(PROMPT)
    used = usage["completion_tokens"]
    assert "ïve" in serving.tokenizer.decode(ids[:used])
    assert "ïve" not in serving.tokenizer.decode(ids[: used - 1])
    assert len(serving.engine.aborted) == 1


def test_a_stop_string_in_the_last_output_is_a_stop_and_not_a_length(serving: Serving) -> None:
    ids = serving.tokenizer.encode(PROMPT)
    choice = serving.complete(PROMPT, max_tokens=len(ids), stop="😀")["choices"][0]
    assert choice["finish_reason"] == "stop"


def test_min_tokens_delays_stop_strings(serving: Serving) -> None:
    length = len(serving.tokenizer.encode("the fox"))
    text = serving.complete("the fox", stop="the", min_tokens=1, max_tokens=50)["choices"][0]["text"]
    assert text == "the fox"
    text = serving.complete("the fox", stop="the", min_tokens=2 * length, max_tokens=50)["choices"][0]["text"]
    assert text == "the foxthe fox"


def test_eos_ends_silently_and_counts_as_a_token(serving: Serving) -> None:
    answer = serving.complete([10, 11, 12, EOS_ID], max_tokens=50)
    choice = answer["choices"][0]
    assert choice["text"] == serving.tokenizer.decode([10, 11, 12])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert answer["usage"]["completion_tokens"] == 4


def test_a_stop_token_is_named(serving: Serving) -> None:
    choice = serving.complete([10, 11, 12, 13], max_tokens=50, stop_token_ids=[12])["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == (serving.tokenizer.decode([10, 11]), 12)


def test_special_tokens_are_shown_when_asked_for(serving: Serving) -> None:
    text = serving.complete([10, EOS_ID], max_tokens=3, ignore_eos=True, skip_special_tokens=False)
    assert text["choices"][0]["text"] == serving.tokenizer.decode([10, EOS_ID, 10], skip_special_tokens=False)


def test_max_tokens_is_cut_to_the_context(serving: Serving) -> None:
    answer = serving.complete([10] * 250, max_tokens=100)
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_timeout_after_the_first_token_ends_the_text_with_abort(
    serving: Serving, stream: bool, logprobs: int | None
) -> None:
    ids = serving.tokenizer.encode("the fox")
    fields = {"prompt": "the fox", "max_tokens": 99, "timeout": 2, "stop": "!", "logprobs": logprobs}
    if stream:
        events = serving.events(PATH, **fields, stream_options={"include_usage": True})
        text, last, usage = _join(events), events[-2]["choices"][0], events[-1]["usage"]
        assert last["logprobs"] is None
    else:
        answer = serving.complete(**fields)
        last, usage = answer["choices"][0], answer["usage"]
        text = last["text"]
        assert logprobs is None or len(last["logprobs"]["tokens"]) == 4
    assert text == serving.tokenizer.decode((ids * 4)[:4])
    assert (last["finish_reason"], last["stop_reason"]) == ("abort", None)
    assert usage["completion_tokens"] == 4
    assert usage["completion_tokens_details"]["accepted_prediction_tokens"] == 2
    assert serving.gauge("tandem:num_requests_aborted_total") == 1


def test_text_held_back_comes_with_the_abort(serving: Serving) -> None:
    choice = serving.complete("the fox", timeout=1, stop=serving.tokenizer.decode([5]) + "!", max_tokens=9)["choices"][
        0
    ]
    first = serving.tokenizer.encode("the fox")[0]
    assert (choice["text"], choice["finish_reason"]) == (serving.tokenizer.decode([first]), "abort")


@pytest.mark.parametrize("stream", [True, False])
def test_reused_tokens_of_every_prompt_are_counted_once(serving: Serving, stream: bool) -> None:
    for second_len, num_cached in ((5, 0), (6, 2 + 0), (5, 2 + 4)):
        prompts = [[10, 11, 12], [20] * second_len]
        fields = {"n": 3, "max_tokens": 2, "cache_salt": "mine"}
        if stream:
            usage = serving.events(PATH, prompt=prompts, **fields, stream_options={"include_usage": True})[-1]["usage"]
        else:
            usage = serving.complete(prompts, **fields)["usage"]
        assert usage["prompt_tokens"] == sum(map(len, prompts))
        assert usage["prompt_tokens_details"] == {"cached_tokens": num_cached}


def test_prompts_under_different_salts_share_nothing(serving: Serving) -> None:
    for salt, num_cached in (("mine", 0), ("yours", 0), ("mine", 2), (None, 0)):
        usage = serving.complete([10, 11, 12], max_tokens=2, cache_salt=salt)["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": num_cached}


@pytest.mark.parametrize(("asked", "entries"), [(0, 1), (1, 1), (3, 3)])
@pytest.mark.parametrize("stream", [True, False])
def test_logprobs_have_one_entry_per_token_and_finite_numbers(
    serving: Serving, asked: int, entries: int, stream: bool
) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 11, "logprobs": asked}
    if stream:
        parts = [c["logprobs"] for e in serving.events(PATH, **fields) for c in e["choices"] if c["logprobs"]]
        found = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    else:
        found = serving.complete(**fields)["choices"][0]["logprobs"]
    assert {len(values) for values in found.values()} == {11}
    assert all(len(top) == entries for top in found["top_logprobs"])
    assert all(next(iter(top)) == token for top, token in zip(found["top_logprobs"], found["tokens"], strict=True))
    assert found["token_logprobs"] == [-0.5] * 11
    assert all(value in (-0.5, -9999.0) for top in found["top_logprobs"] for value in top.values())
    text = serving.complete(PROMPT, max_tokens=11)["choices"][0]["text"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)


def test_logprobs_of_a_text_cut_by_a_stop_string_cover_the_used_tokens_only(serving: Serving) -> None:
    answer = serving.complete(PROMPT, max_tokens=200, stop="ïve", logprobs=1)
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"]


def test_choices_of_a_seeded_request_get_seeds_of_their_own(serving: Serving) -> None:
    for seed in (5, 6):
        serving.complete([10], n=3, seed=seed, max_tokens=1)
    seeds = [message.sampling.seed for message in serving.channel.sent]
    assert (seeds[0], seeds[3]) == (5, 6)
    assert len(set(seeds)) == 6
    again = seeds[:3]
    serving.complete([10], n=3, seed=5, max_tokens=1)
    assert [message.sampling.seed for message in serving.channel.sent][6:] == again
