"""POST /inference/v1/generate: token ids in and out, whole and streamed, and what is refused."""

from typing import Any

import pytest

from server.messages import Constraint
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error
from unit_tests.server.fake_engine import MAX_MODEL_LEN, VOCAB_SIZE

PATH = "/inference/v1/generate"


def ask(serving: Serving, params: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """An answer that must succeed."""
    answer = serving.http.post(PATH, json={"token_ids": [70, 71], "sampling_params": params or {}, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_ids_go_in_and_out(serving: Serving) -> None:
    answer = ask(serving, {"max_tokens": 3}, request_id="mine")
    assert answer["id"] == "mine"
    (choice,) = answer["choices"]
    assert (choice["token_ids"], choice["finish_reason"], choice["logprobs"]) == ([70, 71, 70], "length", None)
    assert answer["usage"]["completion_tokens"] == 3
    assert len(ask(serving)["choices"][0]["token_ids"]) == 16


def test_settings_are_those_of_completions(serving: Serving) -> None:
    params = {"temperature": 0.5, "seed": 3, "n": 2, "logprobs": 1, "prompt_logprobs": 0, "regex": "a+"}
    answer = ask(serving, {**params, "max_tokens": 2}, priority=4, cache_salt="s")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    entries = answer["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [1, 1]
    assert [entry and list(entry) for entry in answer["prompt_logprobs"]] == [None, ["71"]]
    sent = serving.channel.sent[0]
    assert (sent.sampling.temperature, sent.sampling.seed, sent.priority, sent.cache_salt) == (0.5, 3, 4, "s")
    assert sent.sampling.constraint == Constraint("regex", "a+", None, "regex")


def test_a_prompt_may_be_cut_so_that_the_output_fits(serving: Serving) -> None:
    ids = list(range(10, 310))
    for params, kept in (({"max_tokens": 56}, 200), ({}, MAX_MODEL_LEN - 16)):
        ask(serving, params, token_ids=ids, truncate_prompt_tokens=-1)
        assert serving.channel.sent[-1].prompt_token_ids == ids[-kept:]


@pytest.mark.parametrize("num_top", [None, 0, 2])
def test_a_stream_adds_up_to_the_whole(serving: Serving, num_top: int | None) -> None:
    body = {"token_ids": [70, 71, 72], "sampling_params": {"max_tokens": 10, "logprobs": num_top}}
    (whole,) = ask(serving, body["sampling_params"], token_ids=body["token_ids"])["choices"]  # type: ignore[arg-type]
    events = serving.events(PATH, **body, stream_options={"include_usage": True})
    chunks = [event["choices"][0] for event in events[:-1]]
    assert [i for chunk in chunks for i in chunk["token_ids"]] == whole["token_ids"]
    scores = [entry for chunk in chunks for entry in (chunk["logprobs"] or {"content": []})["content"]]
    assert scores == (whole["logprobs"] or {"content": []})["content"]
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert events[-1]["usage"]["completion_tokens"] == 10


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"token_ids": None}, "token_ids", "token_ids is null, it must be a list of token ids"),
        ({"token_ids": "a"}, "token_ids", "a list of token ids"),
        ({"token_ids": ["a"]}, "token_ids", "a list of token ids"),
        ({"token_ids": [[5]]}, "token_ids", "a list of token ids"),
        ({"token_ids": []}, "token_ids", "token_ids is []"),
        ({"token_ids": [VOCAB_SIZE]}, "token_ids", f"0..{VOCAB_SIZE - 1}"),
        ({"token_ids": [5] * 300}, "token_ids", "This model's maximum context length is"),
        ({"sampling_params": {"max_tokens": 0}}, "sampling_params", "max_tokens is 0"),
        ({"sampling_params": {"temperature": 3}}, "sampling_params", "sampling_params.temperature is 3"),
        ({"sampling_params": 5}, "sampling_params", "sampling_params is 5, it must be a JSON object"),
        ({"stream": 1}, "stream", "true or false"),
        ({"stream_options": {}}, "stream_options", "without stream"),
    ],
)
def test_a_wrong_value_is_named(serving: Serving, fields: dict[str, Any], param: str, message: str) -> None:
    check_error(serving.http.post(PATH, json={"token_ids": [5], **fields}), 400, param, message)
    assert serving.channel.sent == []


def test_versions_and_ids_are_told_without_being_asked_for(serving: Serving) -> None:
    params = {"max_tokens": 3, "logprobs": 0}
    (choice,) = ask(serving, params)["choices"]
    assert choice["weight_versions"] == [{"version": "default", "start": 0, "end": 3}]
    assert [entry["token_id"] for entry in choice["logprobs"]["content"]] == choice["token_ids"] == [70, 71, 70]


@pytest.mark.parametrize(("beside", "inside"), [({}, True), ({"logprobs_mode": "processed_logprobs"}, False)])
def test_log_probabilities_may_be_of_the_law_that_is_drawn_from(
    serving: Serving, beside: dict[str, str], inside: bool
) -> None:
    params = {"logprobs": 0, **({"logprobs_mode": "processed_logprobs"} if inside else {})}
    ask(serving, params, **beside)
    assert serving.channel.sent[-1].sampling.logprobs_mode == "processed_logprobs"
    ask(serving, params, logprobs_mode="raw_logprobs")
    assert serving.channel.sent[-1].sampling.logprobs_mode == "raw_logprobs"
