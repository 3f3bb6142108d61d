"""Without a tokenizer ids go in and out, and text is refused by the flag's name."""

from collections.abc import Iterator
from typing import Any

import pytest

from server.api.no_tokenizer import NoTokenizer
from server.config import EngineConfig, ServerConfig
from server.errors import InvalidRequest
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error
from unit_tests.server.fake_engine import EOS_ID, FakeEngine

FLAG = "--skip-tokenizer-init"


@pytest.fixture
def silent() -> Iterator[Serving]:
    """A serving without a tokenizer."""
    config = ServerConfig(skip_tokenizer_init=True)
    serving = Serving(FakeEngine(EngineConfig(mtp_step=2)), NoTokenizer(), config=config)
    with serving.listening():
        yield serving


def ask(silent: Serving, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """An answer that must succeed."""
    answer = silent.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_generate_answers_with_ids_and_no_text(silent: Serving) -> None:
    body = {"input_ids": [70, 71], "return_logprob": True, "return_text_in_logprobs": True, "top_logprobs_num": 1}
    answer = ask(silent, "/generate", {**body, "sampling_params": {"max_new_tokens": 3}})
    assert (answer["text"], answer["output_ids"]) == (None, [70, 71, 70])
    assert answer["meta_info"]["output_token_logprobs"] == [[-0.5, i, None] for i in (70, 71, 70)]
    stopped = ask(silent, "/generate", {"input_ids": [70, EOS_ID]})
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS_ID}
    events = silent.events("/generate", input_ids=[70], sampling_params={"max_new_tokens": 2})
    assert events[-1]["output_ids"] == [70, 70] and {event["text"] for event in events} == {None}


def test_tokens_are_named_by_their_ids(silent: Serving) -> None:
    params = {"max_tokens": 2, "logprobs": 1}
    (choice,) = ask(silent, "/inference/v1/generate", {"token_ids": [70], "sampling_params": params})["choices"]
    assert choice["token_ids"] == [70, 70] and "text" not in choice
    (first, _) = choice["logprobs"]["content"]
    assert (first["token_id"], first["token"], first["logprob"]) == (70, "token_id:70", -0.5)
    assert first["top_logprobs"][0]["token"] == "token_id:70"


CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/completions", {"prompt": [5]}),
        ("/invocations", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/generate", {"text": "hi"}),
        ("/generate", {"text": "hi" * 4000}),
        ("/generate", {"input_ids": [5], "sampling_params": {"stop": ["x"]}}),
        ("/generate", {"input_ids": [5], "sampling_params": {"bad_words": ["x"]}}),
        ("/inference/v1/generate", {"token_ids": [5], "sampling_params": {"stop": "x"}}),
        ("/tokenize", {"prompt": "hi"}),
        ("/tokenize", CHAT),
        ("/detokenize", {"tokens": [5]}),
    ],
)
def test_text_is_refused_by_the_flags_name(silent: Serving, path: str, body: dict[str, Any]) -> None:
    answer = silent.http.post(path, json=body)
    assert answer.status_code == 400 and FLAG in answer.json()["error"]["message"]
    assert silent.channel.sent == []


def test_anthropics_messages_are_refused_in_their_form(silent: Serving) -> None:
    answer = silent.http.post("/v1/messages", json={**CHAT, "max_tokens": 5})
    assert answer.status_code == 400 and FLAG in answer.json()["error"]["message"]
    assert answer.json()["type"] == "error"


def test_other_routes_are_as_always(silent: Serving) -> None:
    for path in ("/health", "/v1/models", "/tokenizer_info", "/server_info", "/metrics"):
        assert silent.http.get(path).status_code == 200
    check_error(silent.http.post("/generate", json={}), 400, "text", "both missing")


def test_it_knows_no_token() -> None:
    tokenizer = NoTokenizer()
    assert (tokenizer.token_id("x"), tokenizer.token_bytes(5)) == (None, b"")
    for speak in (lambda: tokenizer.encode("x"), lambda: tokenizer.decode([5])):
        with pytest.raises(InvalidRequest, match=FLAG):
            speak()
