"""Real engines behind the endpoints of other APIs: drafts and streams change nothing of an answer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.tokenizer import Tokenizer
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_anthropic_answer import join_events
from unit_tests.server.api.test_anthropic_answer import read_events as read_anthropic_events
from unit_tests.server.api.test_response_answer import read_events, without_ids
from unit_tests.server.engines import make_engine

SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"enum": ["a", "b"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1, "seed": 5},
    {"temperature": 1, "seed": 6, "top_k": 20, "top_p": 0.9, "presence_penalty": 1.5, "logit_bias": {"97": 4}},
]


@pytest.fixture(scope="module")
def servings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Serving]]:
    """Without and with drafts."""
    checkpoint = make_checkpoint(Path(tmp_path_factory.mktemp("foreign")), num_layers=4, close_draft=True)
    engines = make_engine(checkpoint), make_engine(checkpoint, mtp_step=3, chunked_prefill_size=24, overlap="on")
    plain, drafting = (Serving(engine, Tokenizer(checkpoint)) for engine in engines)
    with plain.listening(), drafting.listening():
        yield [plain, drafting]


def post(serving: Serving, path: str, body: dict[str, Any]) -> Any:
    """An answer that must succeed."""
    answer = serving.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", [None, {"type": "json_schema", "name": "x", "schema": SCHEMA}])
def test_responses(servings: list[Serving], settings: dict[str, Any], form: Any) -> None:
    body = {"input": "the fox", "max_output_tokens": 40, "include": ["message.output_text.logprobs"], **settings}
    body |= {"text": {"format": form}} if form else {}
    plain, drafting = (without_ids(post(serving, "/v1/responses", body).json()) for serving in servings)
    assert drafting["usage"]["output_tokens"] > 3
    assert_close(plain, drafting)
    streamed = read_events(post(servings[1], "/v1/responses", {**body, "stream": True}))[-1]["response"]
    assert_close(without_ids(streamed), drafting)


@pytest.mark.parametrize("settings", SETTINGS)
def test_messages(servings: list[Serving], settings: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "the"}]
    body = {"messages": messages, "max_tokens": 40, "stop_sequences": ["q", "zz"], **settings}
    plain, drafting = (without_ids(post(serving, "/v1/messages", body).json()) for serving in servings)
    assert plain == drafting
    streamed = join_events(read_anthropic_events(post(servings[1], "/v1/messages", {**body, "stream": True})))
    assert without_ids(streamed) == drafting


@pytest.mark.parametrize("settings", SETTINGS)
def test_generate(servings: list[Serving], settings: dict[str, Any]) -> None:
    params = {"max_new_tokens": 40, "n": 2, "ignore_eos": True, **settings}
    params |= {"sampling_seed": params.pop("seed", None)}
    body = {"input_ids": [[200, 3, 7], [9] * 40], "sampling_params": params}
    body |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3}
    plain, drafting = (post(serving, "/generate", body).json() for serving in servings)
    for one, other in zip(plain, drafting, strict=True):
        for name in ("text", "output_ids"):
            assert one[name] == other[name]
        for name in ("finish_reason", "completion_tokens"):
            assert one["meta_info"][name] == other["meta_info"][name]
        for name in ("input_token_logprobs", "output_token_logprobs", "input_top_logprobs", "output_top_logprobs"):
            assert_close(one["meta_info"][name], other["meta_info"][name])
    assert plain[0]["meta_info"]["spec_draft_token_num"] == 0
    meta = drafting[0]["meta_info"]
    assert 0 < meta["spec_accept_token_num"] <= meta["spec_draft_token_num"]
    assert meta["spec_accept_length"] == 39 / meta["spec_verify_ct"] > 1


@pytest.mark.parametrize("settings", SETTINGS)
def test_generate_by_vllm_s_form(servings: list[Serving], settings: dict[str, Any]) -> None:
    params = {"max_tokens": 40, "logprobs": 2, "ignore_eos": True, **settings}
    body = {"token_ids": [200, 3, 7], "sampling_params": params}
    plain, drafting = (post(serving, "/inference/v1/generate", body).json()["choices"][0] for serving in servings)
    assert_close(plain, drafting)
    chunks = [event["choices"][0] for event in servings[1].events("/inference/v1/generate", **body)]
    assert [token_id for chunk in chunks for token_id in chunk["token_ids"]] == drafting["token_ids"]


def assert_close(one: Any, other: Any) -> None:
    """Two JSON values are equal, numbers but for rounding."""
    if isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-6)
    elif isinstance(one, dict):
        assert set(one) == set(other)
        for name in one:
            assert_close(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for each, twin in zip(one, other, strict=True):
            assert_close(each, twin)
    else:
        assert one == other
