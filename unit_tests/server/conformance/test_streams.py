"""The chunks of a stream as OpenAI's client sees them."""

from itertools import pairwise
from typing import Any

import openai
import pytest

from unit_tests.server.conformance.answers import CHAT, COMPLETIONS, STRANGE_QUESTION, ask, create, say

pytestmark = pytest.mark.slow
ENDPOINT = pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
LENGTH = 16
FIELDS = {"temperature": 1.5, "seed": 9, "max_tokens": LENGTH, "ignore_eos": True}


def collect(client: openai.OpenAI, endpoint: str, **fields: Any) -> list[dict[str, Any]]:
    stream = create(client, endpoint, stream=True, **{**say(endpoint, STRANGE_QUESTION), **FIELDS, **fields})
    return [chunk.model_dump() for chunk in stream]


@ENDPOINT
def test_all_chunks_belong_together(client: openai.OpenAI, endpoint: str) -> None:
    chunks = collect(client, endpoint)
    object_name = "chat.completion.chunk" if endpoint == CHAT else "text_completion"
    heads = {(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}
    ((answer_id, _, model, name),) = heads
    assert answer_id.startswith("chatcmpl-" if endpoint == CHAT else "cmpl-")
    assert (model, name) == (client.models.list().data[0].id, object_name)
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)


def test_a_chat_begins_with_its_role(client: openai.OpenAI) -> None:
    deltas = [chunk["choices"][0]["delta"] for chunk in collect(client, CHAT)]
    assert (deltas[0]["role"], deltas[0]["content"]) == ("assistant", "")
    assert all(delta["role"] is None for delta in deltas[1:])


@ENDPOINT
@pytest.mark.parametrize("n", [1, 3])
def test_usage_comes_last_and_with_every_chunk_if_wanted(client: openai.OpenAI, endpoint: str, n: int) -> None:
    expected = ask(client, endpoint, **say(endpoint, STRANGE_QUESTION), **FIELDS, n=n).usage
    for options in ({"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}):
        *chunks, last = collect(client, endpoint, n=n, stream_options=options)
        assert last["choices"] == [] and all(chunk["choices"] for chunk in chunks)
        assert [last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]] == expected[:2]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"]]
        if "continuous_usage_stats" in options:
            assert len(counts) == len(chunks) and counts[-1] == n * LENGTH
            assert all(one <= other for one, other in pairwise(counts))
        else:
            assert not counts
    assert collect(client, endpoint, stream_options={"include_usage": False})[-1]["choices"]


@ENDPOINT
def test_choices_are_mixed_and_whole(client: openai.OpenAI, endpoint: str) -> None:
    chunks = collect(client, endpoint, n=3)
    order = [choice["index"] for chunk in chunks for choice in chunk["choices"]]
    assert set(order) == {0, 1, 2} and order != sorted(order)
    prompt = say(endpoint, STRANGE_QUESTION)
    whole = ask(client, endpoint, n=3, **prompt, **FIELDS)
    streamed = ask(client, endpoint, stream=True, n=3, **prompt, **FIELDS)
    assert streamed.choices == whole.choices


@ENDPOINT
def test_log_probabilities_come_with_their_tokens(client: openai.OpenAI, endpoint: str) -> None:
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": 1} if endpoint == CHAT else {"logprobs": 1}
    chunks = collect(client, endpoint, return_token_ids=True, **wanted)
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        logprobs = choice["logprobs"] or {}
        assert len(logprobs.get("content") or logprobs.get("tokens") or ()) == len(choice.get("token_ids") or ())


@ENDPOINT
def test_the_answer_is_an_event_stream(client: openai.OpenAI, endpoint: str) -> None:
    resource = client.chat.completions if endpoint == CHAT else client.completions
    fields = {**say(endpoint), "model": "", "max_tokens": 3, "stream": True}
    with resource.with_streaming_response.create(**fields) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: {") for line in lines[:-1]) and lines[-1] == "data: [DONE]"


@ENDPOINT
def test_a_stream_may_be_left_and_the_next_request_is_served(client: openai.OpenAI, endpoint: str) -> None:
    for _ in range(3):
        with create(client, endpoint, stream=True, **{**FIELDS, "max_tokens": 1000}) as stream:
            next(iter(stream))
    assert ask(client, endpoint, **FIELDS).num_tokens == LENGTH


@ENDPOINT
def test_origins_of_tokens_are_told_with_them(client: openai.OpenAI, endpoint: str) -> None:
    chunks = collect(client, endpoint, return_spec=True, return_token_ids=True, temperature=0)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    told = [(choice["spec"], choice["token_ids"]) for choice in choices if choice.get("spec")]
    assert all(len(spec["origins"]) == len(token_ids) for spec, token_ids in told)
    origins = "".join(spec["origins"] for spec, _ in told)
    drafts = chunks[-1]["metrics"]["speculative_decoding"]
    assert len(origins) == LENGTH and origins[0] == "p" and set(origins) <= set("pdt")
    assert origins.count("d") == (drafts["num_accepted_draft_tokens"] if drafts else 0)
    assert chunks[-1]["timings"]["draft_n_accepted"] == origins.count("d")
