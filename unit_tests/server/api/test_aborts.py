"""Ending requests by name: they end with what they have, and others go on."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error
from unit_tests.server.fake_engine import FOREVER_ID

ENDLESS = [FOREVER_ID, 70, 71]
GENERATE, COMPLETIONS = "/generate", "/v1/completions"

Asked = tuple[str, dict[str, Any], dict[str, str]]
NAMED: Asked = (COMPLETIONS, {"prompt": ENDLESS, "request_id": "mine"}, {})
BY_HEADER: Asked = (COMPLETIONS, {"prompt": ENDLESS}, {"x-request-id": "mine"})
BY_RID: Asked = (GENERATE, {"input_ids": ENDLESS, "rid": "mine"}, {})
OTHER: Asked = (COMPLETIONS, {"prompt": ENDLESS, "request_id": "mine too"}, {})


def run(
    serving: Serving, asked: list[Asked], path: str, body: dict[str, Any], num_running: int, num_aborted: int
) -> list[httpx.Response]:
    """The answers to all but the last of the requests, which must go on; then it is ended as well."""

    async def talk() -> list[httpx.Response]:
        transport = httpx.ASGITransport(serving.app)
        async with serving.delivering(), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            tasks = [asyncio.create_task(http.post(url, json=fields, headers=head)) for url, fields, head in asked]
            while serving.client.stats.num_running < num_running:
                await asyncio.sleep(0.001)
            answer = await http.post(path, json=body)
            assert answer.json() == {"num_aborted": num_aborted}
            answers = [await task for task in tasks[:-1]]
            assert not tasks[-1].done()
            assert (await http.post("/abort_request", json={"abort_all": True})).json() == {"num_aborted": 1}
            assert (await tasks[-1]).status_code == 200
            while len(serving.engine.aborted) < num_running:
                await asyncio.sleep(0.001)
        return answers

    answers = asyncio.run(run_in_time(talk()))
    assert serving.client.num_in_flight == 0
    assert len(serving.engine.aborted) == num_running
    return answers


async def run_in_time(work: Any) -> Any:
    """The result of work that must not hang."""
    return await asyncio.wait_for(work, 20)


def check_choice(serving: Serving, choice: dict[str, Any]) -> None:
    """A choice ended by an abort has the text of tokens that came in turn."""
    assert choice["finish_reason"] == "abort"
    assert choice["text"] == serving.tokenizer.decode((ENDLESS * 100_000)[: len(choice["token_ids"])])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [NAMED, BY_HEADER])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/abort_request", {"rid": "mine"}),
        ("/abort_request", {"rid": "cmpl-mine"}),
        ("/abort_requests", {"request_ids": ["none", "mine", "mine"]}),
    ],
)
def test_a_completion_ends_with_the_tokens_it_has(
    make_serving: Callable[..., Serving], asked: Asked, path: str, body: dict[str, Any], stream: bool
) -> None:
    serving = make_serving()
    url, fields, head = asked
    fields = {**fields, "n": 2, "stream": stream, "return_token_ids": True, "return_spec": True}
    (answer,) = run(serving, [(url, fields, head), OTHER], path, body, 3, 2)
    if not stream:
        found = answer.json()
        for choice in found["choices"]:
            check_choice(serving, choice)
            assert len(choice["spec"]["origins"]) == len(choice["token_ids"])
        assert found["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in found["choices"])
        assert found["usage"]["completion_tokens_details"]["rejected_prediction_tokens"] == 0
        return
    chunks = [json.loads(line[6:])["choices"][0] for line in answer.text.split("\n\n")[:-2]]
    for index in range(2):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        whole = {name: [part for chunk in own for part in chunk[name]] for name in ("text", "token_ids")}
        choice = {
            "text": "".join(whole["text"]),
            "token_ids": whole["token_ids"],
            "finish_reason": own[-1]["finish_reason"],
        }
        check_choice(serving, choice)


def test_prompts_of_a_batch_have_names_of_their_own(make_serving: Callable[..., Serving]) -> None:
    serving = make_serving()
    batch: Asked = (
        GENERATE,
        {"input_ids": [ENDLESS, [70]], "rid": ["mine", "b"], "sampling_params": {"max_new_tokens": 2}},
        {},
    )
    (answer,) = run(serving, [batch, OTHER], "/abort_request", {"rid": "mine"}, 2, 1)
    first, second = answer.json()
    assert first["meta_info"]["finish_reason"]["type"] == "abort"
    assert second["meta_info"]["finish_reason"] == {"type": "length", "length": 2}


def test_a_batch_with_one_name_gives_its_prompts_numbers(make_serving: Callable[..., Serving]) -> None:
    serving = make_serving()
    batch: Asked = (GENERATE, {"input_ids": [ENDLESS, ENDLESS], "rid": "r"}, {})
    body = {"request_ids": ["r_0", "r_1"]}
    (answer,) = run(serving, [batch, OTHER], "/abort_requests", body, 3, 2)
    assert [output["meta_info"]["finish_reason"]["type"] for output in answer.json()] == ["abort", "abort"]


def test_a_request_that_has_no_token_yet_ends_too(make_serving: Callable[..., Serving]) -> None:
    serving = make_serving()
    serving.channel.paused = True

    async def talk() -> list[httpx.Response]:
        transport = httpx.ASGITransport(serving.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            scored = {**BY_RID[1], "return_logprob": True, "logprob_start_len": 0}
            echoed = {"prompt": ENDLESS, "prompt_logprobs": 1}
            asked = [(GENERATE, BY_RID[1]), (GENERATE, scored), (COMPLETIONS, echoed)]
            tasks = [asyncio.create_task(http.post(path, json=fields)) for path, fields in asked]
            while serving.client.num_in_flight < 3:
                await asyncio.sleep(0.001)
            assert (await http.post("/abort_request", json={"abort_all": True})).json() == {"num_aborted": 3}
            return [await task for task in tasks]

    plain, scored, echoed = asyncio.run(run_in_time(talk()))
    for answer in (plain, scored):
        assert (answer.json()["text"], answer.json()["output_ids"]) == ("", [])
        assert answer.json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert scored.json()["meta_info"]["input_token_logprobs"] == []
    check_error(echoed, 409, None, "aborted before its prompt was scored")


def test_the_id_of_a_message_is_a_name_as_well(make_serving: Callable[..., Serving]) -> None:
    serving = make_serving()
    serving.channel.paused = True

    async def talk() -> httpx.Response:
        transport = httpx.ASGITransport(serving.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "request_id": "mine"}
            task = asyncio.create_task(http.post("/v1/messages", json=body))
            while serving.client.num_in_flight < 1:
                await asyncio.sleep(0.001)
            assert (await http.post("/abort_request", json={"rid": "msg_mine"})).json() == {"num_aborted": 1}
            return await task

    answer = asyncio.run(run_in_time(talk())).json()
    assert (answer["id"], answer["stop_reason"]) == ("msg_mine", "abort")


def test_nobody_is_ended_by_a_name_that_nobody_has(serving: Serving) -> None:
    assert serving.http.post("/abort_request", json={"rid": "x"}).json() == {"num_aborted": 0}
    assert serving.http.post("/abort_request", json={"abort_all": True, "rid": None}).json() == {"num_aborted": 0}


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/abort_request", {}, "rid", "rid is missing"),
        ("/abort_request", {"rid": ""}, "rid", "rid is missing"),
        ("/abort_request", {"rid": 5}, "rid", "a string"),
        ("/abort_request", {"abort_all": 1}, "abort_all", "true or false"),
        ("/abort_requests", {}, "request_ids", "request_ids is []"),
        ("/abort_requests", {"request_ids": [5]}, "request_ids", "request_ids has 5, its entries must be strings"),
        ("/abort_requests", {"request_ids": ["x"] * 20_000}, "request_ids", "the limit is 16384"),
        ("/abort_requests", {"request_ids": "x"}, "request_ids", "a list"),
    ],
)
def test_a_wrong_value_is_named(serving: Serving, path: str, body: Any, param: str, message: str) -> None:
    check_error(serving.http.post(path, json=body), 400, param, message)
