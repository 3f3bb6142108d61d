"""The routes that do not generate."""

import importlib.metadata

import pytest
from openai import OpenAI

from server.errors import EngineDead
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error


def test_the_model_is_listed_and_shown_with_its_context_limit(serving: Serving) -> None:
    (card,) = serving.http.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", serving.services.limits.max_model_len)
    assert serving.http.get("/v1/models/tiny").json() == card
    check_error(serving.http.get("/v1/models/other"), 404, None, "other")


def test_health_is_200_until_the_engine_fails(serving: Serving) -> None:
    assert serving.http.get("/health").status_code == 200
    serving.client.fail(EngineDead("gone"))
    check_error(serving.http.get("/health"), 503, None, "gone")
    check_error(serving.http.post("/v1/completions", json={"prompt": [5]}), 503, None, "gone")


@pytest.mark.parametrize(("installed", "version"), [({"tandem": "1.2.3"}, "1.2.3"), ({}, "0+checkout")])
def test_the_version_is_the_packages_unless_it_is_not_installed(
    make_serving, monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], version: str
) -> None:
    def find(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr("importlib.metadata.version", find)
    serving = make_serving()
    with serving.listening():
        assert serving.http.get("/version").json() == {"version": version}


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
