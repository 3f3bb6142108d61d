"""The routes that do not generate."""

import time

import anthropic
import pytest
from openai import OpenAI

from server.config import ServerConfig
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error

DEEP_FIELDS = (
    *("stop", "logit_bias", "response_format", "structured_outputs", "guided_json", "json_schema", "stream_options"),
    *("speculative", "max_tokens", "tools", "chat_template_kwargs", "documents", "no_such_field"),
)


def test_the_model_is_listed_and_shown_with_its_context_limit(serving: Serving) -> None:
    (card,) = serving.http.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", serving.services.limits.max_model_len)
    assert serving.http.get("/v1/models/tiny").json() == card
    check_error(serving.http.get("/v1/models/other"), 404, None, "other")


def test_a_model_with_several_names_answers_to_each_and_signs_with_the_first(make_serving) -> None:
    serving = make_serving(config=ServerConfig(served_model_name=("one", "two")))
    with serving.listening():
        cards = serving.http.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["one", "two"]
        for name in ("one", "two", ""):
            assert serving.complete([5], model=name, max_tokens=1)["model"] == "one"
        assert serving.http.get("/v1/models/two").json() == cards[1]
        refused = serving.http.post("/v1/completions", json={"prompt": [5], "model": "tiny"})
        check_error(refused, 404, "model", "'one'")


def test_pages_of_allowed_origins_may_call_and_read_refusals_too(make_serving) -> None:
    serving = make_serving(config=ServerConfig(allowed_origins=("http://friend",), api_key=("k",)))
    asks = {"origin": "http://friend", "access-control-request-method": "POST"}
    with serving.listening():
        preflight = serving.http.options(
            "/v1/completions", headers={**asks, "access-control-request-headers": "authorization, x-api-key"}
        )
        assert preflight.status_code == 200
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        refused = serving.http.get("/v1/models", headers={"origin": "http://friend"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "http://friend"
        assert refused.headers["access-control-expose-headers"].lower() == "x-request-id, request-id"
        stranger = serving.http.get("/health", headers={"origin": "http://stranger"})
        assert "access-control-allow-origin" not in stranger.headers
        assert serving.http.options("/v1/completions", headers={**asks, "origin": "http://stranger"}).status_code == 400


def test_no_origin_is_allowed_unless_asked_for(serving: Serving) -> None:
    answer = serving.http.get("/health", headers={"origin": "http://friend"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    asks = {"origin": "http://friend", "access-control-request-method": "POST"}
    check_error(serving.http.options("/v1/completions", headers=asks), 405, None)


@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "/v1/completions"), ("TRACE", "/health"), ("HEAD", "/v1/chat/completions")]
)
def test_a_wrong_method_is_told_the_right_one(serving: Serving, method: str, path: str) -> None:
    answer = serving.http.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"]


def test_a_slash_too_many_is_no_route(serving: Serving) -> None:
    check_error(serving.http.get("/v1/models/", follow_redirects=False), 404, None)


def test_the_anthropic_client_lists_the_model(serving: Serving) -> None:
    client = anthropic.Anthropic(base_url="http://testserver", api_key="-", http_client=serving.http)
    (model,) = client.models.list()
    assert (model.id, model.display_name, model.type) == ("tiny", "tiny", "model")
    assert model.created_at.timestamp() == serving.services.created
    assert client.models.retrieve("tiny") == model


def test_the_openai_client_understands_every_answer(serving: Serving) -> None:
    client = OpenAI(base_url="http://testserver/v1", api_key="-", http_client=serving.http)
    assert [model.id for model in client.models.list()] == ["tiny"]
    messages = [{"role": "user", "content": "the fox"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, logprobs=True, top_logprobs=1)
    assert whole.choices[0].message.content == "user\nthe fox"
    assert whole.usage.completion_tokens_details.accepted_prediction_tokens is not None
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    completion = client.completions.create(model="tiny", prompt="the fox", max_tokens=2, logprobs=1)
    assert len(completion.choices[0].logprobs.tokens) == 2


@pytest.mark.parametrize("depth", [900, 20_000])
@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a":', "}")], ids=["lists", "objects"])
def test_deep_json_is_answered_at_once_wherever_it_stands(
    serving: Serving, depth: int, opens: str, closes: str
) -> None:
    deep = opens * depth + "1" + closes * depth
    message = '{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, '
    bodies = {
        "/v1/completions": [deep, *(f'{{"prompt": [5], "max_tokens": 1, "{name}": {deep}}}' for name in DEEP_FIELDS)],
        "/v1/chat/completions": [
            f'{{"messages": {deep}}}',
            f'{{"messages": [{{"role": "user", "content": {deep}}}]}}',
            *(f'{message} "{name}": {deep}}}' for name in DEEP_FIELDS),
            f'{message} "tools": [{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}]}}',
        ],
    }
    start = time.perf_counter()
    for path, texts in bodies.items():
        for text in texts:
            answer = serving.http.post(path, content=text, headers={"content-type": "application/json"})
            assert answer.status_code in ((400,) if depth > 1000 else (200, 400)), (path, text[:80], answer.text)
    assert time.perf_counter() - start < 20
