"""Every wrong value, through OpenAI's client: its BadRequestError names the field, what was seen and the limit."""

from typing import Any

import httpx
import openai
import pytest

from unit_tests.server.conformance.answers import CHAT, COMPLETIONS, ask, create

pytestmark = pytest.mark.slow
BOTH, VOCABULARY, CONTEXT = (CHAT, COMPLETIONS), 1024, 4096
INT64 = 2**63
DEEP: Any = 0
for _ in range(200):
    DEEP = {"properties": {"a": DEEP}} if DEEP else {"type": "integer"}

# (endpoints, field, wrong values, a part of the message)
WRONG: list[tuple[tuple[str, ...], str, list[Any], str]] = [
    (BOTH, "temperature", [-1, 2.01, 100], "[0, 2]"),
    (BOTH, "temperature", ["1", True, [1], {}], "a number"),
    (BOTH, "top_p", [0, -0.5, 1.5], "1]"),
    (BOTH, "top_k", [-2, -100], "-1.."),
    (BOTH, "top_k", [1.5, "5"], "an integer"),
    (BOTH, "min_p", [-0.1, 1.1], "[0, 1]"),
    (BOTH, "repetition_penalty", [0, -1, 1e9], "[0.01, 100]"),
    (BOTH, "presence_penalty", [2.1, -2.1], "[-2, 2]"),
    (BOTH, "frequency_penalty", [3, -3], "[-2, 2]"),
    (BOTH, "logit_bias", [{"a": 1}, {"-1": 1}, {"1.5": 1}, {str(VOCABULARY): 1}], f"0..{VOCABULARY - 1}"),
    (BOTH, "logit_bias", [{"5": "1"}, {"5": None}], "a number"),
    (BOTH, "logit_bias", [[5], "5"], "an object"),
    (BOTH, "seed", [INT64, -INT64 - 1], str(INT64 - 1)),
    (BOTH, "seed", [1.5, "1"], "an integer"),
    (BOTH, "n", [0, -1, 129], "1..128"),
    (BOTH, "stop", ["", [""], ["a", ""]], "1..1024"),
    (BOTH, "stop", [["a"] * 65], "limit is 64"),
    (BOTH, "stop", [5, {"a": 1}], "a list"),
    (BOTH, "stop_token_ids", [[-1], [VOCABULARY]], f"0..{VOCABULARY - 1}"),
    (BOTH, "min_tokens", [-1], "0.."),
    (BOTH, "min_tokens", [30], "max_tokens, 9"),
    (BOTH, "max_tokens", [0, -1, CONTEXT + 1], f"1..{CONTEXT}"),
    (BOTH, "max_tokens", [5.5, "5"], "an integer"),
    (BOTH, "ignore_eos", ["yes", 1], "true or false"),
    (BOTH, "skip_special_tokens", ["no"], "true or false"),
    (BOTH, "include_stop_str_in_output", [0], "true or false"),
    (BOTH, "allowed_token_ids", [[VOCABULARY], [-1]], f"0..{VOCABULARY - 1}"),
    (BOTH, "allowed_token_ids", [[]], "no token"),
    (BOTH, "bad_words", ["word"], "a list"),
    (BOTH, "bad_words", [[5], [" "]], "a string"),
    (BOTH, "prompt_logprobs", [-2, 21], "0..20"),
    (BOTH, "prompt_logprobs", [-1], "the limit is 20"),
    (BOTH, "truncate_prompt_tokens", [0, -2, CONTEXT + 1], f"..{CONTEXT}"),
    (BOTH, "truncation_side", ["up"], "left or right"),
    (BOTH, "priority", [1.5, "high"], "an integer"),
    (BOTH, "timeout", [0, -1], "above 0"),
    (BOTH, "cache_salt", ["", "x" * 300], "1..256"),
    (BOTH, "request_id", ["x" * 300], "limit is 256"),
    (BOTH, "return_token_ids", [1], "true or false"),
    (BOTH, "speculative", [{"max_draft": -1}, {"max_draft": 9}], "--mtp-step"),
    (BOTH, "stream_options", [{"include_usage": True}], "stream"),
    (BOTH, "response_format", [{"type": "xml"}], "json_schema"),
    (BOTH, "response_format", [{"type": "json_schema"}], "json_schema"),
    (
        BOTH,
        "response_format",
        [{"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}],
        "type",
    ),
    (BOTH, "response_format", [{"type": "json_schema", "json_schema": {"name": "x", "schema": DEEP}}], "limit"),
    (BOTH, "structured_outputs", [{"regex": "("}], "regex"),
    (BOTH, "structured_outputs", [{"grammar": "root ::= "}, {"grammar": "root ::= nothing"}], "grammar"),
    (BOTH, "structured_outputs", [{"choice": []}], "choice"),
    (BOTH, "structured_outputs", [{"regex": "a", "choice": ["b"]}], "one"),
    (BOTH, "guided_regex", ["["], "regex"),
    ((COMPLETIONS,), "prompt", ["", [], [[]], [1, "a"], ["a", 1], [-1], [VOCABULARY], 5, {}, [1.5], [""]], ""),
    ((COMPLETIONS,), "logprobs", [21, -2], "0..20"),
    ((COMPLETIONS,), "logprobs", [True, "5"], "an integer"),
    ((COMPLETIONS,), "best_of", [0, 129], "128"),
    ((COMPLETIONS,), "suffix", ["after"], "not served"),
    ((COMPLETIONS,), "echo", ["yes"], "true or false"),
    ((CHAT,), "messages", [[], "hi", {}, [5]], "messages"),
    ((CHAT,), "messages", [[{"role": "user"}], [{"content": "hi"}], [{"role": "user", "content": 5}]], "messages[0]"),
    ((CHAT,), "messages", [[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]], "text"),
    ((CHAT,), "messages", [[{"role": "wizard", "content": "hi"}]], "wizard"),
    ((CHAT,), "max_completion_tokens", [0, CONTEXT + 1], f"1..{CONTEXT}"),
    ((CHAT,), "top_logprobs", [1], "logprobs"),
    ((CHAT,), "logprobs", [1, "yes"], "true or false"),
    ((CHAT,), "tools", [[{"type": "function"}], [{"type": "x", "function": {"name": "f"}}]], "tools[0]"),
    ((CHAT,), "tool_choice", ["auto", "required", {"type": "function", "function": {"name": "f"}}], "tools"),
    ((CHAT,), "tool_choice", ["sometimes", {"type": "function"}, 5], "tool_choice"),
    ((CHAT,), "reasoning_effort", ["huge"], "minimal"),
    ((CHAT,), "chat_template_kwargs", [5, []], "an object"),
    ((CHAT,), "thinking_token_budget", [-2], "-1"),
    ((CHAT,), "chat_template", ["{{ messages }}"], "--trust-request-chat-template"),
]
CASES = [
    pytest.param(endpoint, field, value, part, id=f"{endpoint}-{field}-{str(value)[:30]}")
    for endpoints, field, values, part in WRONG
    for endpoint in endpoints
    for value in values
]


def check_refusal(client: openai.OpenAI, endpoint: str, part: str, param: str, **fields: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, endpoint, **{"max_tokens": 9, **fields})
    body: Any = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert (body["type"], body["code"], caught.value.status_code) == ("BadRequestError", 400, 400)
    assert body["param"].startswith(param) and part in body["message"] and param in body["message"]
    assert len(body["message"]) < 600


@pytest.mark.parametrize(("endpoint", "field", "value", "part"), CASES)
def test_a_wrong_value_is_refused(client: openai.OpenAI, endpoint: str, field: str, value: Any, part: str) -> None:
    for stream in (False, True) if field not in ("stream_options", "prompt_logprobs") else (False,):
        check_refusal(client, endpoint, part, field, **{field: value}, stream=stream)


@pytest.mark.parametrize(
    ("endpoint", "fields", "param"),
    [
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (CHAT, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        (COMPLETIONS, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        (COMPLETIONS, {"stream": True, "best_of": 3}, "best_of"),
        (COMPLETIONS, {"n": 3, "best_of": 2}, "best_of"),
        (COMPLETIONS, {"prompt": ["a"] * 100, "n": 11}, "n"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": 0, "echo": True}, "max_tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(
    client: openai.OpenAI, endpoint: str, fields: dict[str, Any], param: str
) -> None:
    check_refusal(client, endpoint, "", param, **fields)


@pytest.mark.parametrize("endpoint", BOTH)
@pytest.mark.parametrize("stream", [True, False])
def test_an_unknown_model_is_not_found(client: openai.OpenAI, endpoint: str, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        create(client, endpoint, model="nobody", stream=stream)
    body: Any = caught.value.body
    assert (body["type"], body["param"], body["code"]) == ("NotFoundError", "model", 404)
    assert "`nobody`" in body["message"] or "'nobody'" in body["message"]


@pytest.mark.parametrize("endpoint", BOTH)
def test_null_is_the_default_and_unknown_fields_are_ignored(client: openai.OpenAI, endpoint: str) -> None:
    fixed = {"messages", "prompt", "max_tokens", "max_completion_tokens", "return_token_ids"}
    nulls = {field: None for endpoints, field, *_ in WRONG if endpoint in endpoints and field not in fixed}
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "session_id": "s"}
    harmless |= {"no_such_field": {"deep": [[1]]}, "priority": 3, "cache_salt": "salt", "temperature": 0}
    expected = ask(client, endpoint, temperature=0, max_tokens=9)
    assert ask(client, endpoint, max_tokens=9, **nulls | harmless).first == expected.first


@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b'{"prompt": "\xff", "messages": []}', "application/json"),
        (b'{"temperature": NaN, "prompt": "a"}', "application/json"),
        (b'{"temperature": 1e999, "prompt": "a"}', "application/json"),
        (b"[" * 20_000, "application/json"),
        (b'{"tools": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "application/json"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "text/plain"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_no_request_is_a_400(client: openai.OpenAI, path: str, body: bytes, content_type: str) -> None:
    answer = httpx.post(f"{client.base_url}{path[1:]}", content=body, headers={"content-type": content_type})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == 400 and len(error["message"]) < 600


def test_unknown_routes_and_wrong_methods_are_json(client: openai.OpenAI) -> None:
    for method, path, status in (("GET", "chat/completions", 405), ("POST", "no/such/route", 404)):
        answer = httpx.request(method, f"{client.base_url}{path}")
        assert answer.status_code == status and answer.json()["error"]["code"] == status
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="", input="a")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a")
