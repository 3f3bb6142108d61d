"""The schemas of other APIs describe what the endpoints take and give."""

from typing import Any

import jsonschema
import pytest

from server.api import foreign_schemas as schemas
from unit_tests.server.api.conftest import Serving

ROUTES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "/v1/responses": (schemas.RESPONSE_REQUEST, schemas.RESPONSE, {"input": "hi"}),
    "/v1/messages": (
        schemas.ANTHROPIC_REQUEST,
        schemas.ANTHROPIC_MESSAGE,
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
    ),
    "/inference/v1/generate": (schemas.TOKENS_REQUEST, schemas.TOKENS_ANSWER, {"token_ids": [5, 6]}),
    "/generate": (schemas.GENERATE_REQUEST, schemas.GENERATE_ANSWER, {"input_ids": [[5, 6], [7]]}),
}


@pytest.mark.parametrize("path", ROUTES)
def test_requests_and_answers_match_their_schemas(serving: Serving, path: str) -> None:
    request, answer, body = ROUTES[path]
    jsonschema.validate(body, request)
    found = serving.http.post(path, json=body)
    assert found.status_code == 200
    jsonschema.validate(found.json(), answer)


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_may_be_null_that_need_not_be_there(serving: Serving, path: str) -> None:
    request, _, body = ROUTES[path]
    nulls = {**body, **dict.fromkeys(set(request["properties"]) - set(body) - {"text"})}
    jsonschema.validate(nulls, request)
    assert serving.http.post(path, json=nulls).status_code == 200


def test_errors_of_anthropics_routes_match_their_schema(serving: Serving) -> None:
    jsonschema.validate(serving.http.post("/v1/messages", json={}).json(), schemas.ANTHROPIC_ERROR)
    count = serving.http.post("/v1/messages/count_tokens", json=ROUTES["/v1/messages"][2]).json()
    jsonschema.validate(count, schemas.TOKEN_COUNT)
