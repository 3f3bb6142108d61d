"""POST /generate: tokens in and out, their log-probabilities, streams that repeat all there is, and what is refused."""

import itertools
import random
import threading
from typing import Any

import pytest

from server.api.generate import GenerateAnswer
from server.config import ServerConfig
from server.messages import Constraint
from unit_tests.server.api.conftest import ScriptedServing, Serving
from unit_tests.server.api.test_requests import check_error
from unit_tests.server.fake_engine import EOS_ID, FOREVER_ID, MAX_MODEL_LEN, VOCAB_SIZE

PATH = "/generate"


def ask(serving: Serving, params: dict[str, Any] | None = None, **fields: Any) -> Any:
    """An answer that must succeed."""
    answer = serving.http.post(PATH, json={"sampling_params": params or {}, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def without_times(output: dict[str, Any]) -> dict[str, Any]:
    """What does not differ between two answers to the same request."""
    hidden = ("id", "e2e_latency")
    meta = {name: value for name, value in output["meta_info"].items() if name not in hidden}
    return {"text": output["text"], "output_ids": output["output_ids"], "meta_info": meta}


def test_ids_go_in_and_out(serving: Serving) -> None:
    output = ask(serving, {"max_new_tokens": 5}, input_ids=[70, 71, 72], rid="mine")
    assert output["output_ids"] == [70, 71, 72, 70, 71]
    assert output["text"] == serving.tokenizer.decode(output["output_ids"])
    meta = output["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, 5, 0)
    assert meta["e2e_latency"] > 0
    assert "output_token_logprobs" not in meta
    # One token by prefill, then steps of two drafts and one more token, the last of which is cut.
    assert (meta["spec_verify_ct"], meta["spec_accept_token_num"], meta["spec_draft_token_num"]) == (2, 2, 4)
    assert (meta["spec_accept_rate"], meta["spec_accept_length"]) == (0.5, 2.0)


def test_a_text_is_a_prompt_too_and_answers_are_short_unless_asked(serving: Serving) -> None:
    output = ask(serving, text="the fox")
    assert output["meta_info"]["prompt_tokens"] == len(serving.tokenizer.encode("the fox"))
    assert len(output["output_ids"]) == 128


@pytest.mark.parametrize(
    ("params", "ids", "reason"),
    [
        ({}, [70, EOS_ID], {"type": "stop", "matched": EOS_ID}),
        ({"stop_token_ids": [71]}, [70, 71], {"type": "stop", "matched": 71}),
        ({"ignore_eos": True, "max_new_tokens": 3}, [70, EOS_ID], {"type": "length", "length": 3}),
    ],
)
def test_the_reason_says_what_matched(serving: Serving, params: Any, ids: list[int], reason: Any) -> None:
    assert ask(serving, params, input_ids=ids)["meta_info"]["finish_reason"] == reason


@pytest.mark.parametrize(("keeps", "text"), [(False, "the quick"), (True, "the quick brown")])
def test_a_stop_string_is_named_and_cut(scripted: ScriptedServing, keeps: bool, text: str) -> None:
    scripted.say("the quick brown fox")
    output = ask(scripted, {"stop": [" brown"], "no_stop_trim": keeps}, text="x")
    assert output["text"] == text
    assert output["meta_info"]["finish_reason"] == {"type": "stop", "matched": " brown"}


def test_a_prompt_may_be_cut_so_that_the_output_fits(serving: Serving) -> None:
    ids = list(range(10, 310))
    for params, kept in (({"max_new_tokens": 56}, 200), ({"max_new_tokens": 0}, MAX_MODEL_LEN), ({}, 128)):
        ask(serving, params, input_ids=ids, truncate_prompt_tokens=-1)
        assert serving.channel.sent[-1].prompt_token_ids == ids[-kept:]


@pytest.mark.parametrize(
    ("fields", "is_apart"), [({}, False), ({"return_logprob": True}, True), ({"logprob_start_len": 0}, False)]
)
def test_answers_with_many_scores_are_written_off_the_event_loop(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], is_apart: bool
) -> None:
    threads, encode = [], GenerateAnswer._encode

    def record(*arguments: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return encode(*arguments)

    monkeypatch.setattr(GenerateAnswer, "_encode", record)
    monkeypatch.setattr("server.api.generation.MANY_SCORES", 1)
    ask(serving, {"max_new_tokens": 2}, input_ids=[70, 71], **fields)
    assert [name.startswith("reader") for name in threads] == [is_apart]


@pytest.mark.parametrize("prompts", [{"input_ids": [[70], [80, 81]]}, {"text": ["a", "bc"]}])
def test_several_prompts_and_choices_are_a_list(serving: Serving, prompts: Any) -> None:
    outputs = ask(serving, {"max_new_tokens": 2, "n": 2}, rid="r", **prompts)
    assert [output["meta_info"]["id"] for output in outputs] == ["r_0", "r_0", "r_1", "r_1"]
    assert [output["meta_info"]["prompt_tokens"] for output in outputs] == [1, 1, 2, 2]
    named = ask(serving, {"max_new_tokens": 2}, rid=["x", "y"], **prompts)
    assert [output["meta_info"]["id"] for output in named] == ["x", "y"]
    assert len(ask(serving, {"n": 2}, input_ids=[70])) == 2
    assert len(ask(serving, input_ids=[[70]])) == 1


def test_log_probabilities_come_with_ids_and_texts_that_are_asked_for(serving: Serving) -> None:
    fields = {"input_ids": [70, 71], "return_logprob": True, "top_logprobs_num": 2}
    meta = ask(serving, {"max_new_tokens": 2}, return_text_in_logprobs=True, **fields)["meta_info"]
    texts = {i: serving.tokenizer.decode([i]) for i in (70, 71, 200)}
    assert meta["output_token_logprobs"] == [[-0.5, 70, texts[70]], [-0.5, 71, texts[71]]]
    assert meta["output_top_logprobs"][0] == [[-0.5, 70, texts[70]], [-9999.0, 200, texts[200]]]
    assert meta["input_token_logprobs"] == []
    meta = ask(serving, {"max_new_tokens": 1}, **fields)["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, 70, None]]


@pytest.mark.parametrize(
    ("start", "scores"),
    [
        (0, [[None, 70, None], [-0.5, 71, None], [-0.5, 72, None]]),
        (1, [[-0.5, 71, None], [-0.5, 72, None]]),
        (3, []),
        (-1, []),
    ],
)
def test_prompts_are_scored_from_a_token_on(serving: Serving, start: int, scores: Any) -> None:
    fields = {"input_ids": [70, 71, 72], "return_logprob": True, "logprob_start_len": start}
    for max_tokens in (0, 1) if start >= 0 else (1,):
        meta = ask(serving, {"max_new_tokens": max_tokens}, top_logprobs_num=1, **fields)["meta_info"]
        assert meta["input_token_logprobs"] == scores
        assert len(meta["output_token_logprobs"]) == len(meta["output_top_logprobs"]) == max_tokens
        assert [top and [each[1] for each in top] for top in meta["input_top_logprobs"]] == [
            None if logprob is None else [token_id] for logprob, token_id, _ in scores
        ]


def test_names_of_its_own_for_settings_of_all(serving: Serving) -> None:
    params = {"sampling_seed": 7, "min_new_tokens": 3, "max_new_tokens": 4, "top_k": 5, "frequency_penalty": 1}
    ask(serving, params, text="a", priority=3, extra_key="k", cache_salt="s")
    ask(serving, {"regex": "a+"}, text="a", extra_key="k")
    ask(serving, {"json_schema": '{"type": "object"}'}, text="a")
    first, second, third = serving.channel.sent
    sampling = first.sampling
    assert (sampling.seed, sampling.min_tokens, sampling.max_tokens, sampling.top_k) == (7, 3, 4, 5)
    assert (sampling.frequency_penalty, first.priority) == (1.0, 3)
    assert first.cache_salt != second.cache_salt != "k" != first.cache_salt
    assert second.sampling.constraint == Constraint("regex", "a+", None, "regex")
    assert third.sampling.constraint == Constraint("json_schema", '{"type": "object"}', None, "json_schema")
    assert third.cache_salt == ""


@pytest.mark.parametrize("is_single", [True, False])
def test_a_stream_repeats_all_there_is_and_ends_with_the_whole(scripted: ScriptedServing, is_single: bool) -> None:
    rng = random.Random(1)
    for _ in range(10):
        text = "".join(rng.choice("aä中字😀👩‍🚀 \nthe") for _ in range(rng.randint(1, 40)))
        stops = [text[at : at + 2] for at in (rng.randrange(len(text)),)] + ["#"]
        scripted.say(text)
        fields: dict[str, Any] = {"text": "x" if is_single else ["x", "yy"], "sampling_params": {"stop": stops}}
        fields |= {"return_logprob": rng.random() < 0.5, "top_logprobs_num": 1}
        whole = ask(scripted, fields.pop("sampling_params"), **fields)
        events = scripted.events(PATH, sampling_params={"stop": stops}, **fields)
        for index, expected in enumerate([whole] if is_single else whole):
            own = [event for event in events if event.get("index", 0) == index]
            assert all(("index" in event) is not is_single for event in own)
            assert without_times(own[-1]) == without_times(expected)
            for before, after in itertools.pairwise(own):
                assert after["text"].startswith(before["text"]) and "\ufffd" not in after["text"]
                assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
                assert before["meta_info"]["finish_reason"] is None
                told = before["meta_info"].get("output_token_logprobs")
                assert told is None or len(told) == len(before["output_ids"])
                assert "output_top_logprobs" not in before["meta_info"]


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "text", "text and input_ids are both given or both missing"),
    ({"text": "a", "input_ids": [5]}, "text", "both given"),
    ({"text": 5}, "text", "text is 5, it must be a text or a list of such"),
    ({"text": [5]}, "text", "text is [5]"),
    ({"text": []}, "text", "text is []"),
    ({"text": ""}, "text", "text is empty"),
    ({"text": "the fox " * 900}, "text", "This model's maximum context length is"),
    ({"input_ids": "a"}, "input_ids", 'input_ids is "a", it must be a list of token ids'),
    ({"input_ids": ["a"]}, "input_ids", "input_ids is"),
    ({"input_ids": []}, "input_ids", "input_ids is []"),
    ({"input_ids": [[]]}, "input_ids", "is empty"),
    ({"input_ids": [VOCAB_SIZE]}, "input_ids", f"0..{VOCAB_SIZE - 1}"),
    ({"input_ids": [5] * MAX_MODEL_LEN}, "input_ids", "This model's maximum context length is"),
    ({"sampling_params": []}, "sampling_params", "sampling_params is [], it must be a JSON object"),
    ({"sampling_params": {"temperature": 3}}, "sampling_params", "sampling_params.temperature is 3"),
    ({"sampling_params": {"max_new_tokens": -1}}, "sampling_params", f"is -1, it must be in 0..{MAX_MODEL_LEN}"),
    ({"sampling_params": {"min_new_tokens": 129}}, "sampling_params", "min_new_tokens is 129, it must be in 0..128"),
    ({"sampling_params": {"n": 0}}, "sampling_params", "sampling_params.n is 0, it must be in 1..128"),
    ({"sampling_params": {"sampling_seed": "x"}}, "sampling_params", "an integer"),
    ({"sampling_params": {"stop_regex": "a"}}, "sampling_params", "sampling_params.stop_regex is not served"),
    ({"sampling_params": {"regex": "a", "ebnf": "b"}}, None, "both given"),
    ({"top_logprobs_num": 21}, "top_logprobs_num", "0..20"),
    ({"return_logprob": 1}, "return_logprob", "true or false"),
    ({"logprob_start_len": -2}, "logprob_start_len", "-1.."),
    ({"logprob_start_len": 3, "return_logprob": True}, "logprob_start_len", "the limit is the length of the prompt, 1"),
    ({"rid": 5}, "rid", "a string"),
    ({"rid": "x" * 257}, "rid", "limit is 256"),
    ({"rid": ["a", "b"]}, "rid", "rid has 2 entries, it must be a name, or 1 of them"),
    ({"extra_key": ""}, "extra_key", "0 characters, the range is 1..256"),
    ({"image_data": "x"}, "image_data", "image_data is not served"),
    ({"return_hidden_states": True}, "return_hidden_states", "not served"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_value_is_named(
    serving: Serving, stream: bool, fields: dict[str, Any], param: str | None, message: str
) -> None:
    given = {"text", "input_ids"} & set(fields) or not fields
    body = {**({} if given else {"text": "a"}), **fields, "stream": stream}
    check_error(serving.http.post(PATH, json=body), 400, param, message)
    assert serving.channel.sent == []


def test_too_many_choices_in_all_are_refused(serving: Serving) -> None:
    body = {"input_ids": [[5]] * 100, "sampling_params": {"n": 11}}
    check_error(serving.http.post(PATH, json=body), 400, "n", "limit of 1024")


def test_null_and_unknown_fields_are_nothing(serving: Serving) -> None:
    names = ("input_ids", "rid", "extra_key", "return_logprob", "priority", "image_data", "stream", "logprob_start_len")
    body = {"text": "a", "sampling_params": None, "lora_path": None, "no_such": [1], **dict.fromkeys(names)}
    assert serving.http.post(PATH, json=body).status_code == 200


def test_a_time_that_is_over_aborts(serving: Serving) -> None:
    output = ask(serving, {"max_new_tokens": 100}, input_ids=[FOREVER_ID], timeout=3)
    assert output["meta_info"]["finish_reason"]["type"] == "abort"
    assert output["meta_info"]["completion_tokens"] == len(output["output_ids"]) > 0


def test_log_probabilities_are_of_the_law_that_the_server_or_the_request_says(make_serving: Any) -> None:
    serving = make_serving(config=ServerConfig(logprobs_mode="processed_logprobs"))
    with serving.listening():
        modes = []
        for params, fields in (
            ({}, {}),
            ({"logprobs_mode": "raw_logprobs"}, {}),
            ({"logprobs_mode": "raw_logprobs"}, {"logprobs_mode": "processed_logprobs"}),
        ):
            ask(serving, params, input_ids=[70], return_logprob=True, **fields)
            modes.append(serving.channel.sent[-1].sampling.logprobs_mode)
    assert modes == ["processed_logprobs", "raw_logprobs", "processed_logprobs"]


def test_the_version_of_the_weights_is_told(serving: Serving) -> None:
    meta = ask(serving, {"max_new_tokens": 5}, input_ids=[70, 71])["meta_info"]
    assert meta["weight_version"] == "default"
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 5}]
