"""The tokenizer over HTTP: ids and texts there and back, conversations, and what others need to do the same."""

from typing import Any

import jinja2
import jsonschema
import pytest

from unit_tests.server.api.conftest import ScriptedServing, Serving
from unit_tests.server.api.test_requests import check_error
from unit_tests.server.fake_engine import MAX_MODEL_LEN, VOCAB_SIZE

TEXT = "the fox naïve 中文😀 <|im_end|>"


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_ids_and_texts_go_there_and_back(serving: Serving, prefix: str) -> None:
    found = serving.http.post(f"{prefix}/tokenize", json={"prompt": TEXT, "model": "tiny"}).json()
    assert found == {
        "count": len(found["tokens"]),
        "max_model_len": serving.services.limits.max_model_len,
        "tokens": serving.tokenizer.encode(TEXT),
        "token_strs": None,
    }
    answer = serving.http.post(f"{prefix}/detokenize", json={"tokens": found["tokens"]})
    assert answer.json() == {"prompt": TEXT}


def test_the_texts_of_tokens_are_told_apart(serving: Serving) -> None:
    found = serving.http.post("/tokenize", json={"prompt": "fox😀", "return_token_strs": True}).json()
    assert len(found["token_strs"]) == found["count"]
    assert "".join(text for text in found["token_strs"] if not text.startswith("bytes:")) == "fox"
    assert any(text.startswith("bytes:\\x") for text in found["token_strs"])


def test_a_conversation_is_what_chat_makes_of_it(scripted: ScriptedServing) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "clock"}}],
        "chat_template_kwargs": {"enable_thinking": True},
    }
    found = scripted.http.post("/tokenize", json=body).json()
    assert scripted.http.post("/v1/chat/completions", json=body).status_code == 200
    assert found["tokens"] == scripted.engine.requests[-1].prompt_token_ids
    shorter = scripted.http.post("/tokenize", json={**body, "add_generation_prompt": False}).json()
    assert found["tokens"][: shorter["count"]] == shorter["tokens"]


def test_prompts_may_be_longer_than_the_context(serving: Serving) -> None:
    limit = serving.services.limits.max_model_len
    for body in ({"prompt": "the fox " * 5000}, {"messages": [{"role": "user", "content": "the fox " * 5000}]}):
        found = serving.http.post("/tokenize", json=body).json()
        assert found["count"] > limit
        assert serving.http.post("/detokenize", json={"tokens": found["tokens"]}).status_code == 200
    assert serving.http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


@pytest.mark.parametrize(("asked", "kept"), [(5, 5), (-1, MAX_MODEL_LEN - 1)])
def test_prompts_are_cut_as_they_would_be_to_go_on(serving: Serving, asked: int, kept: int) -> None:
    text = "the fox " * 500
    for body in ({"prompt": text}, {"messages": [{"role": "user", "content": text}]}):
        whole = serving.http.post("/tokenize", json=body).json()["tokens"]
        for side, expected in (("left", whole[-kept:]), ("right", whole[:kept])):
            cut = {**body, "truncate_prompt_tokens": asked, "truncation_side": side}
            assert serving.http.post("/tokenize", json=cut).json()["tokens"] == expected


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/tokenize", {}, "prompt", "prompt is null, it must be a string"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", 'prompt is ["a"], it must be a string'),
        ("/tokenize", {"messages": []}, "messages", "messages is []"),
        ("/tokenize", {"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "1..256"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens", "true or false"),
        ("/detokenize", {}, "tokens", "tokens is null, it must be a list of token ids"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens", f"0..{VOCAB_SIZE - 1}"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "-1"),
        ("/detokenize", {"tokens": "a"}, "tokens", "list of token ids"),
        ("/detokenize", {"tokens": [True]}, "tokens", "list of token ids"),
    ],
)
def test_a_wrong_value_is_named(serving: Serving, path: str, body: Any, param: str, message: str) -> None:
    check_error(serving.http.post(path, json=body), 400, param, message)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_another_model_is_not_found(serving: Serving, path: str) -> None:
    check_error(serving.http.post(path, json={"model": "x", "prompt": "a", "tokens": [5]}), 404, "model", "'x'")


def test_a_client_can_render_prompts_by_itself(scripted: ScriptedServing) -> None:
    info = scripted.http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert info["pad_token"] is not None and info["bos_token"] is None
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert info["model_max_length"] == scripted.services.limits.max_model_len
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    messages = [{"role": "user", "content": "hi"}]
    text = environment.from_string(info["chat_template"]).render(messages=messages, add_generation_prompt=True)
    rendered = scripted.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    plain = scripted.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert plain["tokens"] == rendered


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/score", "/score", "/rerank", "/v1/rerank", "/classify"])
def test_what_is_not_served_is_not_found(serving: Serving, path: str) -> None:
    check_error(serving.http.post(path, json={"input": "a"}), 404, None, f"there is no route POST {path}")


def test_a_text_may_come_with_fields_of_conversations_that_are_null(serving: Serving) -> None:
    operation = serving.http.get("/openapi.json").json()["paths"]["/tokenize"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    body = {**dict.fromkeys(schema["properties"]), "prompt": "hi"}
    jsonschema.validate(body, schema)
    assert serving.http.post("/tokenize", json=body).status_code == 200
