"""What stands around the choices of an answer: names, usage, metrics; and the model cards."""

import time
from typing import Any

import openai
import pytest

from benchmarks.openai_server import Server, growth
from unit_tests.server.conformance.answers import CHAT, COMPLETIONS, create
from unit_tests.server.conformance.conftest import Pair

pytestmark = pytest.mark.slow
ENDPOINT = pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
REQUEST_ID = "x-request-id"


def check_positive(values: dict[str, Any], *names: str) -> None:
    for name in names:
        assert values[name] > 0, name


@ENDPOINT
def test_an_answer_has_openais_form(client: openai.OpenAI, endpoint: str) -> None:
    answer = create(client, endpoint, temperature=0, max_tokens=6)
    body = answer.model_dump()
    assert body["object"] == ("chat.completion" if endpoint == CHAT else "text_completion")
    assert body["id"].startswith("chatcmpl-" if endpoint == CHAT else "cmpl-")
    assert abs(body["created"] - time.time()) < 600
    assert body["model"] == client.models.list().data[0].id and body["system_fingerprint"]
    (choice,) = body["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "length"
    if endpoint == CHAT:
        assert choice["message"]["role"] == "assistant" and choice["message"]["refusal"] is None
        assert {"reasoning", "reasoning_content"} <= choice["message"].keys()
    usage = body["usage"]
    assert usage["completion_tokens"] == 6 and usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]


@ENDPOINT
def test_two_answers_have_two_ids_and_a_client_may_choose_one(client: openai.OpenAI, endpoint: str) -> None:
    ids = {create(client, endpoint, max_tokens=1).id for _ in range(3)}
    assert len(ids) == 3
    assert create(client, endpoint, max_tokens=1, request_id="mine-1").id.endswith("-mine-1")
    resource = client.chat.completions if endpoint == CHAT else client.completions
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]} if endpoint == CHAT else {"prompt": "a"}
    headers = {REQUEST_ID: "mine-2"}
    raw = resource.with_raw_response.create(model="", max_tokens=1, extra_headers=headers, **fields)
    assert raw.headers[REQUEST_ID] == "mine-2" and raw.parse().id.endswith("-mine-2")


@ENDPOINT
def test_time_and_drafts_are_told(pair: Pair, endpoint: str) -> None:
    fields = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    plain, drafting = (create(client, endpoint, **fields).model_dump() for client in (pair.plain, pair.drafting))
    for body in (plain, drafting):
        check_positive(body["metrics"], "time_to_first_token_ms", "generation_time_ms", "mean_itl_ms")
        check_positive(body["timings"], "prompt_ms", "predicted_ms", "predicted_per_second")
        assert body["timings"]["predicted_n"] == 20
    assert plain["metrics"]["speculative_decoding"] is None and plain["timings"]["draft_n"] == 0
    told, timings = drafting["metrics"]["speculative_decoding"], drafting["timings"]
    accepted = told["num_accepted_draft_tokens"]
    assert timings["draft_n"] == told["num_draft_tokens"] > 0 and timings["draft_n_accepted"] == accepted > 0
    assert told["num_spec_tokens"] == 3 and sum(told["acceptance_histogram"]) == told["num_spec_steps"]
    assert sum(i * count for i, count in enumerate(told["acceptance_histogram"])) == accepted
    details = drafting["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == accepted
    assert create(pair.drafting, endpoint, n=2, **fields).model_dump()["metrics"] is None


def test_the_model_has_a_card(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.object, card.model_dump()["max_model_len"]) == ("model", 4096)
    assert client.models.retrieve(card.id) == card
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@ENDPOINT
def test_the_model_may_be_named_or_not(client: openai.OpenAI, endpoint: str) -> None:
    name = client.models.list().data[0].id
    for model in (name, ""):
        assert create(client, endpoint, model=model, max_tokens=1).model == name


@ENDPOINT
def test_counters_count_exactly(client: openai.OpenAI, endpoint: str) -> None:
    server = Server(str(client.base_url), timeout=30)
    before = server.read_counters()
    answers = [create(client, endpoint, temperature=0, max_tokens=7, ignore_eos=True, n=2) for _ in range(3)]
    with pytest.raises(openai.BadRequestError):
        create(client, endpoint, temperature=9)
    grown = {name: value for (name, _), value in growth(before, server.read_counters()).items()}
    assert grown["vllm:prompt_tokens_total"] == 2 * sum(answer.usage.prompt_tokens for answer in answers)
    assert grown["vllm:generation_tokens_total"] == 42
    assert grown["vllm:request_success_total"] == 6
    details = [answer.usage.completion_tokens_details for answer in answers]
    accepted = sum(detail.accepted_prediction_tokens for detail in details)
    assert grown.get("vllm:spec_decode_num_accepted_tokens_total", 0) == accepted
    assert grown["vllm:num_requests_running"] == grown["vllm:num_requests_waiting"] == 0
