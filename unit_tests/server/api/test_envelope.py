"""What an answer has besides its choices, and what it tells of tokens, times and drafts on both endpoints."""

import asyncio
import json
import threading
from itertools import chain
from typing import Any

import pytest

from server.api.completions import CompletionFormat, read_completion_job
from server.api.envelope import Envelope
from server.api.generation import Generation
from server.api.requests import read_fields
from server.config import ServerConfig
from server.messages import TokenLogprobs, TokenOutput
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error
from unit_tests.server.fake_engine import VOCAB_SIZE

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
PATHS = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
PROMPT = "the quick naïve café 中文字符 😀"


def _body(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [{"role": "user", "content": PROMPT}]}
    return {**prompt, "max_tokens": 11, **fields}


def _ask(serving: Serving, path: str, **fields: Any) -> dict[str, Any]:
    answer = serving.http.post(path, json=_body(path, **fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


def _stream(serving: Serving, path: str, **fields: Any) -> list[dict[str, Any]]:
    return serving.events(path, **_body(path, **fields))


def _with(events: list[dict[str, Any]], name: str, index: int = 0) -> list[Any]:
    """The values of a field in the chunks of one choice."""
    return [c[name] for event in events for c in event["choices"] if c["index"] == index and name in c]


@PATHS
def test_ids_of_prompt_and_output_are_told_when_asked_for(serving: Serving, path: str) -> None:
    answer = _ask(serving, path, return_token_ids=True)
    prompt = serving.channel.sent[0].prompt_token_ids
    assert (answer["choices"][0] if path == COMPLETIONS else answer)["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == (prompt * 11)[:11]
    plain = _ask(serving, path)
    assert plain["choices"][0]["token_ids"] is None
    assert (plain["choices"][0] if path == COMPLETIONS else plain)["prompt_token_ids"] is None


@PATHS
def test_streamed_ids_add_up_and_the_prompts_come_with_the_first_chunk(serving: Serving, path: str) -> None:
    events = _stream(serving, path, return_token_ids=True, n=2)
    prompt = serving.channel.sent[0].prompt_token_ids
    for index in range(2):
        assert [*chain(*_with(events, "token_ids", index))] == (prompt * 11)[:11]
    if path == COMPLETIONS:
        told = [_with(events, "prompt_token_ids", index) for index in range(2)]
        assert told == [[prompt], [prompt]]
    else:
        assert [event["prompt_token_ids"] for event in events if "prompt_token_ids" in event] == [prompt] * 2
        assert events[0]["prompt_token_ids"] == prompt


@PATHS
@pytest.mark.parametrize("mtp_step", [0, 2])
def test_the_origin_of_every_token_is_told_when_asked_for(make_serving, path: str, mtp_step: int) -> None:
    serving = make_serving(mtp_step=mtp_step)
    origins = "pddtddtddtt" if mtp_step else "p" + 10 * "t"
    totals = {"accepted": origins.count("d"), "proposed": 8 if mtp_step else 0, "origins": origins}
    with serving.listening():
        assert _ask(serving, path, return_spec=True)["choices"][0]["spec"] == totals
        assert "spec" not in _ask(serving, path)["choices"][0]
        events = _stream(serving, path, return_spec=True)
        steps = _with(events, "spec")
        assert "".join(step["origins"] for step in steps) == origins
        for name in ("accepted", "proposed"):
            assert sum(step[name] for step in steps) == totals[name]
        assert all(step["accepted"] == step["origins"].count("d") for step in steps)
        assert not _with(_stream(serving, path), "spec")


@PATHS
def test_a_step_whose_text_is_held_back_still_tells_of_its_tokens(serving: Serving, path: str) -> None:
    fields = {"max_tokens": 40, "ignore_eos": True, "stop": [PROMPT[:20] + "!"]}
    events = _stream(serving, path, **fields, return_spec=True, return_token_ids=True)
    assert sum(map(len, _with(events, "token_ids"))) == 40
    assert len("".join(step["origins"] for step in _with(events, "spec"))) == 40


@PATHS
def test_times_and_acceptance_of_one_choice_are_told(serving: Serving, path: str) -> None:
    answer = _ask(serving, path)
    found = answer["metrics"]["speculative_decoding"]
    assert found["num_accepted_draft_tokens"] == 6 and found["num_spec_tokens"] == 2
    assert found["acceptance_histogram"] == [1, 0, 3]
    assert "per_step_accepted" not in found
    detailed = _ask(serving, path, return_spec=True)["metrics"]["speculative_decoding"]
    assert detailed["per_step_accepted"] == [2, 2, 2, 0] and detailed["per_step_drafted"] == [2] * 4
    assert answer["metrics"]["time_to_first_token_ms"] > 0
    timings = answer["timings"]
    assert timings["prompt_n"] == answer["usage"]["prompt_tokens"]
    assert (timings["predicted_n"], timings["draft_n"], timings["draft_n_accepted"]) == (11, 8, 6)


@PATHS
def test_of_several_choices_nobody_could_say_whose_times_they_are(serving: Serving, path: str) -> None:
    answer = _ask(serving, path, n=2)
    assert answer["metrics"] is None and answer["timings"] is None
    assert not any("metrics" in event for event in _stream(serving, path, n=2))


@PATHS
def test_a_stream_ends_with_times_and_acceptance(serving: Serving, path: str) -> None:
    for options in (None, {"include_usage": True}):
        events = _stream(serving, path, stream_options=options)
        assert [("metrics" in event, "timings" in event) for event in events[:-1]] == [(False, False)] * len(
            events[:-1]
        )
        assert events[-1]["timings"]["draft_n_accepted"] == 6
        assert events[-1]["metrics"]["speculative_decoding"]["num_spec_steps"] == 4
        assert events[-1]["choices"] == [] if options else events[-1]["choices"][0]["finish_reason"] == "length"


@PATHS
@pytest.mark.parametrize(
    ("options", "at_the_end", "everywhere"),
    [
        (None, False, False),
        ({}, False, False),
        ({"include_usage": False}, False, False),
        ({"include_usage": True}, True, False),
        ({"include_usage": None, "continuous_usage_stats": None}, False, False),
        ({"include_usage": True, "continuous_usage_stats": True}, True, True),
        ({"include_usage": True, "continuous_usage_stats": False}, True, False),
        ({"include_usage": False, "continuous_usage_stats": True}, False, False),
        ({"continuous_usage_stats": True}, True, True),
    ],
)
def test_usage_comes_where_the_options_want_it(
    serving: Serving, path: str, options: dict[str, Any] | None, at_the_end: bool, everywhere: bool
) -> None:
    events = _stream(serving, path, stream_options=options)
    assert (events[-1]["choices"] == []) == at_the_end
    inside = events[:-1] if at_the_end else events
    assert all((event.get("usage") is not None) == everywhere for event in inside)
    if at_the_end:
        assert events[-1]["usage"]["completion_tokens"] == 11


@PATHS
def test_an_answer_names_what_made_it_in_every_chunk(serving: Serving, path: str) -> None:
    answer = _ask(serving, path)
    assert answer["system_fingerprint"].startswith("tandem-")
    assert answer["system_fingerprint"].endswith("-mtp2")
    assert answer["service_tier"] is None
    events = _stream(serving, path)
    assert {event["system_fingerprint"] for event in events} == {answer["system_fingerprint"]}


@PATHS
def test_a_clients_own_id_is_the_answers(serving: Serving, path: str) -> None:
    prefix = "cmpl-" if path == COMPLETIONS else "chatcmpl-"
    assert _ask(serving, path, request_id="mine-1")["id"] == prefix + "mine-1"
    assert {event["id"] for event in _stream(serving, path, request_id="mine-1")} == {prefix + "mine-1"}
    assert len({_ask(serving, path)["id"] for _ in range(3)}) == 3
    check_error(serving.http.post(path, json=_body(path, request_id="x" * 257)), 400, "request_id", "limit is 256")
    check_error(serving.http.post(path, json=_body(path, request_id=5)), 400, "request_id", "a string")


@PATHS
def test_fields_that_change_nothing_are_accepted(serving: Serving, path: str) -> None:
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "session_id": "s"}
    harmless |= {"spaces_between_special_tokens": False, "suffix": "", "use_beam_search": False, "echo": False}
    assert _ask(serving, path, **harmless)["choices"][0]["finish_reason"] == "length"


@PATHS
def test_prompts_are_scored_beside_the_choices_of_a_chat_and_inside_those_of_a_completion(
    serving: Serving, path: str
) -> None:
    answer = _ask(serving, path, prompt_logprobs=2)
    prompt = serving.channel.sent[0].prompt_token_ids
    assert serving.channel.sent[0].sampling.prompt_logprobs == 2
    found = (answer["choices"][0] if path == COMPLETIONS else answer)["prompt_logprobs"]
    assert len(found) == len(prompt) and found[0] is None
    for token_id, entry in zip(prompt[1:], found[1:], strict=True):
        text = serving.tokenizer.token_bytes(token_id).decode(errors="replace")
        assert list(entry) == [str(token_id), "200" if token_id != 200 else "201"]
        assert entry[str(token_id)] == {"logprob": -0.5, "rank": 1, "decoded_token": text}
        assert [one["rank"] for one in entry.values()] == [1, 2]
        assert list(entry.values())[1]["logprob"] == -9999.0
    plain = _ask(serving, path)
    assert (plain["choices"][0] if path == COMPLETIONS else plain)["prompt_logprobs"] is None


@PATHS
@pytest.mark.parametrize("count", [0, 1])
def test_a_stream_cannot_score_its_prompt(serving: Serving, path: str, count: int) -> None:
    body = _body(path, prompt_logprobs=count, stream=True)
    check_error(serving.http.post(path, json=body), 400, "prompt_logprobs", "stream")


@PATHS
def test_the_whole_vocabulary_needs_the_operators_leave(make_serving, path: str) -> None:
    for max_logprobs, limit in ((20, "0..20 (--max-logprobs)"), (3, "0..3 (--max-logprobs)")):
        serving = make_serving(config=ServerConfig(max_logprobs=max_logprobs))
        with serving.listening():
            for count, part in ((-1, f"all {VOCAB_SIZE} tokens"), (max_logprobs + 1, limit), (-2, limit)):
                answer = serving.http.post(path, json=_body(path, prompt_logprobs=count))
                check_error(answer, 400, "prompt_logprobs", part)
    serving = make_serving(config=ServerConfig(max_logprobs=-1))
    with serving.listening():
        _ask(serving, path, prompt_logprobs=-1)
        _ask(serving, path, prompt_logprobs=VOCAB_SIZE)
    assert {message.sampling.prompt_logprobs for message in serving.channel.sent} == {VOCAB_SIZE}


@PATHS
@pytest.mark.parametrize("enable_rl", [False, True])
def test_versions_of_the_weights_are_told_where_trainers_ask(make_serving: Any, path: str, enable_rl: bool) -> None:
    serving = make_serving(config=ServerConfig(enable_rl=enable_rl))
    spans = [{"version": "default", "start": 0, "end": 11}]
    with serving.listening():
        choices = _ask(serving, path, n=2)["choices"]
        assert [choice.get("weight_versions") for choice in choices] == [spans if enable_rl else None] * 2
        events = _stream(serving, path, n=2)
        assert [_with(events, "weight_versions", index) for index in range(2)] == [[spans] * enable_rl] * 2


@pytest.mark.parametrize(
    ("path", "fields", "is_apart"),
    [
        (COMPLETIONS, {"n": 3}, False),
        (COMPLETIONS, {"n": 3, "logprobs": 1}, True),
        (COMPLETIONS, {"logprobs": 1}, False),
        (COMPLETIONS, {"prompt": [70] * 30, "prompt_logprobs": 0}, True),
        (COMPLETIONS, {"prompt_logprobs": 0}, False),
        (CHAT, {}, False),
        (CHAT, {"n": 2, "logprobs": True}, True),
    ],
)
def test_answers_with_many_scores_are_written_off_the_event_loop(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any], is_apart: bool
) -> None:
    threads, write = [], Envelope._write

    def record(*arguments: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return write(*arguments)

    monkeypatch.setattr(Envelope, "_write", record)
    monkeypatch.setattr("server.api.generation.MANY_SCORES", 20)
    _ask(serving, path, **fields)
    assert [name.startswith("reader") for name in threads] == [is_apart]


def test_a_choice_without_tokens_is_the_last_of_all(make_serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    services = make_serving().services
    fields = read_fields(b'{"prompt": [5], "best_of": 3, "max_tokens": 1}', services)
    job = read_completion_job(fields, services)
    outputs = [
        TokenOutput("r", [], [], "abort"),
        TokenOutput("r", [70], [TokenLogprobs(-4.0, [], [])], "length"),
        TokenOutput("r", [71], [TokenLogprobs(-3.0, [], [])], "length"),
    ]

    async def take_all(generation: Generation) -> Any:
        for choice, output in zip(generation.choices, outputs, strict=True):
            yield choice.take(output)

    monkeypatch.setattr(Generation, "deltas", take_all)
    generation = Generation(job, services.tokenizer, services.client, services.metrics)
    answer = asyncio.run(Envelope(services, CompletionFormat(services.tokenizer, job), generation, job, "x").whole())
    assert [choice["text"] for choice in json.loads(answer.body)["choices"]] == [services.tokenizer.decode([71])]
