"""POST /invocations answers what the two endpoints answer."""

from typing import Any

import pytest

from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error

PATH = "/invocations"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [5, 6, 7], "max_tokens": 6, "logprobs": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "the fox"}], "logprobs": True},
}


@pytest.mark.parametrize(("endpoint", "body"), BODIES.items(), ids=BODIES)
def test_the_answer_is_that_of_the_endpoint(serving: Serving, endpoint: str, body: dict[str, Any]) -> None:
    found, expected = (serving.http.post(path, json=body).json() for path in (PATH, endpoint))
    for name in ("object", "choices", "usage"):
        assert found[name] == expected[name]
    streams = [[event["choices"] for event in serving.events(path, **body)] for path in (PATH, endpoint)]
    assert streams[0] == streams[1]


def test_a_body_that_is_neither_is_a_completion_without_a_prompt(serving: Serving) -> None:
    check_error(serving.http.post(PATH, json={"input": "x"}), 400, "prompt", "prompt is null")
