"""Forms and their fields, the engine's refusals, and bodies as large as the model."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from server.api.openapi import nullable
from server.api.rl.desk import Desk, Form, new_id, success
from server.api.transport import MAX_BODY_BYTES
from server.config import EngineConfig
from server.control import Resume
from server.errors import Conflict, EngineDead, InvalidRequest, TandemError
from unit_tests.server.api.rl.conftest import TrainedServing
from unit_tests.server.api.rl.test_inline_tensors import encode

FORM = Form(
    (),
    text=nullable("string"),
    count=nullable("integer"),
    share=nullable("number"),
    flag=nullable("boolean"),
    words=nullable("array"),
)


@pytest.mark.parametrize(
    ("name", "query", "value"),
    [
        ("text", ["5"], "5"),
        ("text", ["a", "b"], "b"),
        ("count", ["5"], 5),
        ("count", ["-1"], -1),
        ("count", ["05"], "05"),
        ("count", ["x"], "x"),
        ("count", ["[" * 5000], "[" * 5000),
        ("share", ["2.50"], 2.5),
        ("flag", ["True"], True),
        ("flag", ["false"], False),
        ("flag", ["yes"], "yes"),
        ("words", ["a", "b"], ["a", "b"]),
        ("words", ["a"], ["a"]),
    ],
)
def test_a_query_says_what_a_body_would(name: str, query: list[str], value: Any) -> None:
    assert FORM.read(b"", [(name, text) for text in query]).value(name) == value


def test_a_query_goes_before_the_body_and_unknown_names_are_ignored() -> None:
    fields = FORM.read(b'{"text": "body", "count": 1, "else": 2}', [("text", "query"), ("other", "x")])
    assert (fields.value("text"), fields.value("count"), fields.value("flag")) == ("query", 1, None)
    with pytest.raises(InvalidRequest, match="count is 'x', it must be an integer"):
        FORM.read(b"", [("count", "x")]).integer("count", 0)


def test_a_form_describes_a_body_or_a_query() -> None:
    with_body, without = FORM.describe(True, True, None), FORM.describe(False, False, None)
    assert with_body["openapi_extra"]["requestBody"]["required"] is False
    assert "requestBody" not in without["openapi_extra"]
    assert [each["name"] for each in without["openapi_extra"]["parameters"]] == [
        *("text", "count", "share", "flag", "words")
    ]
    needed = Form(("text",), text=nullable("string")).describe(True, True, None)["openapi_extra"]
    assert needed["requestBody"]["required"] is True and "parameters" not in needed


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Conflict", Conflict),
        ("EngineDead", EngineDead),
        ("InvalidRequest", InvalidRequest),
        ("CheckpointError", InvalidRequest),
        ("RequestTimeout", InvalidRequest),
        ("NoSuchError", InvalidRequest),
    ],
)
def test_what_the_engine_refuses_is_the_requests_fault_or_a_matter_of_when(
    make_trained: Any, kind: str, expected: type[TandemError]
) -> None:
    trained: TrainedServing = make_trained()
    trained.engine.refusals[Resume] = ("no", kind)

    async def talk() -> None:
        async with trained.delivering():
            await Desk(trained.services).carry_out(Resume(new_id()))

    with pytest.raises(expected, match=r"^no$") as caught:
        asyncio.run(talk())
    assert type(caught.value) is expected


def test_success_has_more_to_say() -> None:
    assert success("well", count=1) == {"success": True, "message": "well", "count": 1}


def test_tensors_in_a_request_may_be_as_large_as_the_model_and_nothing_else(make_trained: Any, tmp_path: Path) -> None:
    large = {"a": [0.0] * (MAX_BODY_BYTES // 4)}
    data, text = encode(large)
    (tmp_path / "model.safetensors").write_bytes(data)
    config = EngineConfig(model=str(tmp_path))
    trained: TrainedServing = make_trained(config)
    body = {"serialized_named_tensors": [text]}
    assert len(json.dumps(body)) > MAX_BODY_BYTES
    with trained.listening():
        trained.succeed("/update_weights_from_tensor", body)
        assert trained.last_update().source.data == (data,)
        assert "the limit is 4194304" in trained.refuse("/update_weights_from_disk", body)["message"]
        limit = int(8 / 3 * len(data)) + MAX_BODY_BYTES
        too_large = json.dumps({"serialized_named_tensors": ["A" * limit]})
        answer = trained.http.post("/update_weights_from_tensor", content=too_large)
        assert answer.status_code == 400 and f"the limit is {limit}; send less" in answer.json()["message"]
