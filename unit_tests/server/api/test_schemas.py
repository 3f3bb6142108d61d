"""The schemas are valid, describe what the readers know, and accept what the server answers."""

from typing import Any

import jsonschema_rs
import pytest

from server.api import requests, schemas
from server.api.openapi import Schema
from unit_tests.server.api.conftest import Serving

REQUESTS = {"completion": schemas.COMPLETION_REQUEST, "chat": schemas.CHAT_REQUEST}


def is_valid(value: Any, schema: Schema) -> bool:
    return jsonschema_rs.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize("name", [name for name in dir(schemas) if name.isupper() and not name.startswith("_")])
def test_every_schema_is_one(name: str) -> None:
    assert jsonschema_rs.meta.is_valid(getattr(schemas, name))


def test_every_field_that_a_reader_knows_is_described() -> None:
    described = {field for schema in REQUESTS.values() for field in schema["properties"]}
    known = set(requests._REQUEST.__struct_fields__)
    assert len(known) > 50
    assert known - described <= set(requests._UNSERVED)  # read only to be refused


@pytest.mark.parametrize("schema", REQUESTS.values(), ids=REQUESTS)
def test_every_field_may_be_null_but_the_one_that_is_needed(schema: Schema) -> None:
    for field, rules in schema["properties"].items():
        assert is_valid(None, rules) == (field not in schema["required"]), field


@pytest.mark.parametrize(
    ("kind", "body", "fits"),
    [
        ("completion", {"prompt": "a"}, True),
        ("completion", {"prompt": [1, 2], "unknown": 5, "temperature": None}, True),
        ("completion", {"prompt": [[1], [2]], "stop": ["a"] * 4, "logit_bias": {"5": -100}}, True),
        ("completion", {"prompt": "", "n": 1}, False),
        ("completion", {"prompt": "a", "stop": ["a"] * 65}, False),
        ("completion", {"prompt": [True]}, False),
        ("completion", {"prompt": "a", "temperature": 2.1}, False),
        ("completion", {}, False),
        ("chat", {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}, True),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, True),
        ("chat", {"messages": [{"role": "assistant", "tool_calls": []}]}, True),
        ("chat", {"messages": []}, False),
        ("chat", {"messages": [{"content": "a"}]}, False),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]}, False),
    ],
)
def test_requests_fit_or_not(kind: str, body: dict[str, Any], fits: bool) -> None:
    assert is_valid(body, REQUESTS[kind]) == fits


def test_answers_are_as_described(serving: Serving) -> None:
    assert is_valid(serving.complete([5, 6], max_tokens=3, logprobs=1), schemas.COMPLETION)
    assert is_valid(serving.chat("the fox", max_tokens=3), schemas.CHAT_COMPLETION)
    assert is_valid(serving.http.get("/v1/models").json(), schemas.MODEL_LIST)
    assert is_valid(serving.http.get("/v1/models/tiny").json(), schemas.MODEL)
    assert not is_valid(serving.complete([5], max_tokens=1), schemas.CHAT_COMPLETION)
