"""Bad input: every mistake is a 400 (or 404) that names the field, and the server goes on."""

from typing import Any

import pytest

from server.api.transport import MAX_BODY_BYTES
from server.messages import Generate, SamplingParams
from unit_tests.server.api.conftest import Serving
from unit_tests.server.fake_engine import BROKEN_ID, FOREVER_ID, MAX_MODEL_LEN, REFUSE_ID, VOCAB_SIZE

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]

BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("temperature", -0.1, "[0, 2]"),
    ("temperature", 2.1, "[0, 2]"),
    ("temperature", "1", "a number"),
    ("temperature", True, "a number"),
    ("temperature", [], "a number"),
    ("top_p", 0, "[1e-06, 1]"),
    ("top_p", 1e-7, "[1e-06, 1]"),
    ("top_p", 1.01, "[1e-06, 1]"),
    ("top_k", -2, "-1.."),
    ("top_k", 1.5, "an integer"),
    ("min_p", 1.1, "[0, 1]"),
    ("repetition_penalty", 0, "[0.01, 100]"),
    ("repetition_penalty", 1e-5, "[0.01, 100]"),
    ("repetition_penalty", 1e30, "[0.01, 100]"),
    ("presence_penalty", 2.5, "[-2, 2]"),
    ("frequency_penalty", -2.5, "[-2, 2]"),
    ("seed", 2**63, "9223372036854775807"),
    ("seed", 10**100, "9223372036854775807"),
    ("seed", "5", "an integer"),
    ("n", 0, "1..128"),
    ("n", 129, "1..128"),
    ("n", True, "an integer"),
    ("max_tokens", 0, f"1..{MAX_MODEL_LEN}"),
    ("max_tokens", MAX_MODEL_LEN + 1, f"1..{MAX_MODEL_LEN}"),
    ("max_tokens", 5.0, "an integer"),
    ("max_tokens", "5", "an integer"),
    ("min_tokens", -1, "0.."),
    ("min_tokens", 200, "max_tokens"),
    ("stop", "", "1..1024"),
    ("stop", [""], "1..1024"),
    ("stop", ["a"] * 65, "has 65 entries, the limit is 64"),
    ("stop", "x" * 100_000, "1..1024"),
    ("stop", "x" * 1_000_000, "bytes"),
    ("stop", [5], "string"),
    ("stop", 5, "a list"),
    ("stop_token_ids", [VOCAB_SIZE], f"0..{VOCAB_SIZE - 1}"),
    ("stop_token_ids", [-1], f"0..{VOCAB_SIZE - 1}"),
    ("stop_token_ids", 5, "a list"),
    ("logit_bias", {"x": 1}, "token id"),
    ("logit_bias", {"-1": 1}, "token id"),
    ("logit_bias", {str(VOCAB_SIZE): 1}, f"0..{VOCAB_SIZE - 1}"),
    ("logit_bias", {"5": "1"}, "a number"),
    ("logit_bias", [5], "an object"),
    ("stream", 1, "true or false"),
    ("stream_options", {"include_usage": True}, "stream"),
    ("ignore_eos", "yes", "true or false"),
    ("skip_special_tokens", 0, "true or false"),
    ("model", 5, "a string"),
    ("speculative", 5, "a JSON object"),
    ("speculative", [], "a JSON object"),
    ("speculative", True, "a JSON object"),
    ("speculative", {"enabled": 1}, "speculative.enabled is 1, it must be true or false"),
    ("speculative", {"enabled": "no"}, "speculative.enabled"),
    ("speculative", {"max_draft": 3}, "speculative.max_draft is 3, it must be in 0..2 (--mtp-step)"),
    ("speculative", {"max_draft": -1}, "speculative.max_draft is -1, it must be in 0..2 (--mtp-step)"),
    ("speculative", {"max_draft": 10**100}, "0..2 (--mtp-step)"),
    ("speculative", {"enabled": False, "max_draft": 3}, "0..2 (--mtp-step)"),
    ("speculative", {"max_draft": 1.0}, "speculative.max_draft is 1.0, it must be an integer"),
    ("speculative", {"max_draft": True}, "an integer"),
    ("speculative", {"max_draft": "1"}, "an integer"),
    ("priority", "0", "an integer"),
    ("priority", 1.5, "an integer"),
    ("priority", True, "an integer"),
    ("priority", 2**31, "-2147483648..2147483647"),
    ("priority", -(2**31) - 1, "-2147483648..2147483647"),
    ("timeout", 0, "timeout is 0, it must be above 0 seconds"),
    ("timeout", -0.0, "above 0 seconds"),
    ("timeout", -1.5, "timeout is -1.5, it must be above 0 seconds"),
    ("timeout", "5", "a number"),
    ("timeout", True, "a number"),
    ("timeout", [5], "a number"),
    ("timeout", 10**400, "1.79769e+308"),
    ("cache_salt", "", "0 characters, the range is 1..256"),
    ("cache_salt", "x" * 257, "257 characters, the range is 1..256"),
    ("cache_salt", 5, "a string"),
    ("cache_salt", ["a"], "a string"),
    ("response_format", {"type": "xml"}, "must be one of text"),
]


def check_error(answer: Any, status: int, param: str | None, *parts: str) -> str:
    """The answer is an OpenAI error body; returns its message."""
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert param is None or error["param"].startswith(param)
    assert len(error["message"]) < 500
    for part in parts:
        assert part in error["message"]
    return error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("field", "value", "limit"), BAD_FIELDS)
def test_a_wrong_value_is_named_with_its_limit(serving: Serving, path: str, field: str, value: Any, limit: str) -> None:
    body = {"messages": MESSAGES, "prompt": "hi", "max_tokens": 20, field: value}
    check_error(serving.http.post(path, json=body), 400, field, field, limit)
    assert serving.channel.sent == []


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_bad_value_in_a_stream_is_a_plain_error(serving: Serving, path: str) -> None:
    body = {"messages": MESSAGES, "prompt": "hi", "stream": True, "temperature": 9}
    check_error(serving.http.post(path, json=body), 400, "temperature")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_null_means_the_default_and_unknown_fields_are_ignored(serving: Serving, path: str) -> None:
    fields = {field: None for field, _, _ in BAD_FIELDS}
    body = {"messages": MESSAGES, "prompt": "hi", **fields, "no_such_field": {"deep": [1]}, "user": "me", "echo": False}
    assert serving.http.post(path, json=body).status_code == 200


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b'"x"', "JSON object"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"ignored": "\xff"}', "UTF-8"),
        (b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"model": NaN}', "not valid JSON"),
        (b'{"temperature": 1e999, "prompt": "a"}', "temperature"),
    ],
)
def test_a_body_that_is_not_a_json_object_is_explained(serving: Serving, path: str, body: bytes, message: str) -> None:
    check_error(serving.http.post(path, content=body, headers={"content-type": "application/json"}), 400, None, message)


def test_lone_surrogates_are_refused(serving: Serving) -> None:
    answer = serving.http.post(COMPLETIONS, content=b'{"prompt": "\\ud800"}')
    check_error(answer, 400, None, "not valid JSON")


def test_another_content_type_is_refused(serving: Serving) -> None:
    answer = serving.http.post(COMPLETIONS, content=b"{}", headers={"content-type": "text/plain"})
    check_error(answer, 400, None, "application/json")


def test_a_body_over_the_limit_is_refused(serving: Serving) -> None:
    answer = serving.http.post(COMPLETIONS, content=b" " * (MAX_BODY_BYTES + 1))
    check_error(answer, 400, None, str(MAX_BODY_BYTES))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_another_model_is_not_found_and_an_empty_name_is_the_served_one(serving: Serving, path: str) -> None:
    body = {"messages": MESSAGES, "prompt": "hi"}
    check_error(serving.http.post(path, json={**body, "model": "nope" * 1000}), 404, "model", "nope")
    for model in ("", None, "tiny"):
        assert serving.http.post(path, json={**body, "model": model}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_what_only_the_engine_can_refuse_is_a_plain_error_too(serving: Serving, stream: bool) -> None:
    answer = serving.http.post(COMPLETIONS, json={"prompt": [REFUSE_ID], "stream": stream})
    check_error(answer, 400, None, "the engine refuses")


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_is_429_and_starts_nothing(make_serving, stream: bool) -> None:
    serving = make_serving(max_requests=3)
    with serving.listening():
        with serving.client.submit([Generate("running", [FOREVER_ID], SamplingParams())]):
            answer = serving.http.post(COMPLETIONS, json={"prompt": [5], "n": 3, "stream": stream})
            check_error(answer, 429, None, "--max-queue")
            assert [message.request_id for message in serving.channel.sent] == ["running"]
            assert serving.client.num_in_flight == 1
        serving.complete([5], n=3)
        assert serving.gauge("tandem:num_requests_aborted_total") == 0
        assert 'finished_reason="abort",model_name="tiny"} 0.0' in serving.http.get("/metrics").text


@pytest.mark.parametrize("stream", [True, False])
def test_a_batch_that_can_never_fit_is_not_told_to_try_again(make_serving, stream: bool) -> None:
    serving = make_serving(max_requests=3)
    with serving.listening():
        answer = serving.http.post(COMPLETIONS, json={"prompt": [5], "n": 4, "stream": stream})
        message = check_error(answer, 400, None, "--max-queue")
        assert "try again" not in message
        assert serving.channel.sent == []


def test_too_many_choices_in_all_are_refused(serving: Serving) -> None:
    check_error(serving.http.post(COMPLETIONS, json={"prompt": ["a"] * 100, "n": 11}), 400, "n", "1024")


def test_top_logprobs_need_logprobs(serving: Serving) -> None:
    body = {"messages": MESSAGES, "top_logprobs": 3}
    check_error(serving.http.post(CHAT, json=body), 400, "top_logprobs")
    check_error(
        serving.http.post(CHAT, json={**body, "logprobs": True, "top_logprobs": 21}), 400, "top_logprobs", "0..20"
    )
    check_error(serving.http.post(COMPLETIONS, json={"prompt": "a", "logprobs": 21}), 400, "logprobs", "0..20")


@pytest.mark.parametrize(
    ("wanted", "max_draft"),
    [
        (None, None),
        ({}, None),
        ({"enabled": True}, None),
        ({"enabled": False}, 0),
        ({"enabled": False, "max_draft": 2}, 0),
        ({"enabled": None, "max_draft": None}, None),
        ({"max_draft": 0}, 0),
        ({"max_draft": 2}, 2),
        ({"enabled": True, "max_draft": 1, "num_trees": {"deep": [1]}}, 1),
    ],
)
def test_speculative_bounds_the_drafts_of_every_choice(serving: Serving, wanted: Any, max_draft: int | None) -> None:
    serving.complete([5], n=2, max_tokens=1, speculative=wanted)
    serving.chat("x", n=2, max_tokens=1, speculative=wanted)
    assert [message.sampling.max_draft for message in serving.channel.sent] == [max_draft] * 4


def test_without_speculation_in_the_server_a_request_may_only_leave_it_off(make_serving) -> None:
    serving = make_serving(mtp_step=0)
    with serving.listening():
        body = {"prompt": [5], "speculative": {"max_draft": 1}}
        check_error(serving.http.post(COMPLETIONS, json=body), 400, "speculative.max_draft", "0..0 (--mtp-step)")
        serving.complete([5], speculative={"enabled": True, "max_draft": 0})


def test_the_terms_of_a_request_hold_for_all_its_choices(serving: Serving) -> None:
    fields = {"priority": -7, "timeout": 90, "cache_salt": "é" * 256, "n": 2, "max_tokens": 1}
    serving.complete([[5], [6]], **fields)
    serving.chat("x", **fields)
    terms = [(message.priority, message.timeout, message.cache_salt) for message in serving.channel.sent]
    assert terms == [(-7, 90.0, "é" * 256)] * 6


def test_a_request_without_terms_leaves_them_to_the_engine(serving: Serving) -> None:
    serving.complete([5], max_tokens=1)
    serving.chat("x", max_tokens=1)
    terms = [(message.priority, message.timeout, message.cache_salt) for message in serving.channel.sent]
    assert terms == [(0, None, "")] * 2


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_gets_no_token_in_time_is_408(serving: Serving, path: str, stream: bool) -> None:
    body = {"messages": MESSAGES, "prompt": "hi", "n": 2, "timeout": 0.5, "stream": stream}
    answer = serving.http.post(path, json=body)
    check_error(answer, 408, None, "time was over before its first token")
    assert answer.json()["error"]["type"] == "TimeoutError"
    assert serving.client.num_in_flight == 0
    assert serving.gauge("tandem:num_requests_aborted_total") == 2
    assert serving.gauge("tandem:request_timeouts_total") == 2


def test_a_request_whose_model_fails_is_500(serving: Serving) -> None:
    answer = serving.http.post(COMPLETIONS, json={"prompt": [[BROKEN_ID], [FOREVER_ID]], "max_tokens": 9})
    check_error(answer, 500, None, "not finite")
    assert serving.client.num_in_flight == 0


def test_biases_beyond_100_are_clamped(serving: Serving) -> None:
    serving.complete([5], logit_bias={"7": 500, "8": -500, "9": 1}, max_tokens=1)
    assert serving.channel.sent[0].sampling.logit_bias == {7: 100.0, 8: -100.0, 9: 1.0}
