"""Pausing by the names of two servers: what the engine is told, and what comes of requests."""

import asyncio
from typing import Any

import httpx
import pytest

from server.control import FlushCache, Pause, Resume
from unit_tests.server.api.rl.conftest import TrainedServing
from unit_tests.server.fake_engine import FOREVER_ID

ENDLESS = [FOREVER_ID, 70, 71]


@pytest.mark.parametrize(
    ("path", "sent", "mode"),
    [
        ("/pause_generation", None, "abort"),
        ("/pause_generation", {"mode": "abort"}, "abort"),
        ("/pause_generation", {"mode": "retract"}, "retract"),
        ("/pause_generation", {"mode": "in_place"}, "keep"),
        ("/pause", None, "abort"),
        ("/pause", {"mode": "wait"}, "wait"),
        ("/pause", {"mode": "keep"}, "keep"),
    ],
)
def test_a_mode_has_the_names_that_trainers_know(trained: TrainedServing, path: str, sent: Any, mode: str) -> None:
    trained.succeed(path, sent)
    trained.succeed(path, **(sent or {}))
    pauses = [command for command in trained.engine.commands if isinstance(command, Pause)]
    assert [pause.mode for pause in pauses] == [mode, mode]
    assert trained.http.get("/is_paused").json() == {"is_paused": True}


def test_sglang_hears_of_success_and_vllm_of_a_status(trained: TrainedServing) -> None:
    paused = trained.succeed("/pause_generation", {})
    assert paused == {
        "success": True,
        "message": "Generation paused successfully.",
        "status": "ok",
        "num_requests": 0,
    }
    assert trained.succeed("/continue_generation", {})["success"] is True
    assert trained.http.get("/is_paused").json() == {"is_paused": False}
    assert trained.succeed("/pause") == {"status": "paused"}
    assert trained.succeed("/resume") == {"status": "resumed"}
    assert isinstance(trained.last_command(), Resume)


@pytest.mark.parametrize(
    ("query", "flushes"),
    [({}, True), ({"mode": "wait"}, True), ({"clear_cache": "false"}, False), ({"mode": "keep"}, False)],
)
def test_a_pause_of_vllms_forgets_prefixes_unless_somebody_needs_them(
    trained: TrainedServing, query: dict[str, str], flushes: bool
) -> None:
    trained.succeed("/pause", **query)
    assert isinstance(trained.last_command(), FlushCache) is flushes


@pytest.mark.parametrize("method", ["get", "post"])
def test_the_cache_is_flushed_within_a_time(trained: TrainedServing, method: str) -> None:
    answer = trained.http.request(method, "/flush_cache", params={"timeout": "2.5"})
    assert answer.json() == {"success": True, "message": "Cache flushed."}
    assert trained.last_command().timeout == 2.5
    trained.http.request(method, "/flush_cache")
    assert trained.last_command().timeout == 0


def test_a_reset_puts_running_requests_back_if_asked(trained: TrainedServing) -> None:
    trained.succeed("/reset_prefix_cache")
    assert trained.commands() == ["FlushCache"]
    trained.succeed("/reset_prefix_cache", reset_running_requests="true")
    assert trained.commands()[1:] == ["Pause", "FlushCache", "Resume"]
    assert trained.engine.commands[1].mode == "retract"


def test_a_reset_of_a_paused_engine_leaves_it_paused_and_a_failed_one_goes_on(trained: TrainedServing) -> None:
    trained.engine.refusals[FlushCache] = ("1 requests run", "Conflict")
    assert "run" in trained.refuse("/reset_prefix_cache", {"reset_running_requests": True}, 409)["message"]
    assert not trained.engine.is_paused
    trained.engine.refusals.clear()
    trained.succeed("/pause")
    trained.succeed("/reset_prefix_cache", {"reset_running_requests": True})
    assert trained.engine.is_paused


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/pause_generation", {"mode": "later"}, "mode", "'later', it must be one of abort, wait, retract, keep, in_"),
        ("/pause_generation", {"mode": 1}, "mode", "a string"),
        ("/pause", {"clear_cache": 1}, "clear_cache", "true or false"),
        ("/flush_cache", {"timeout": "x"}, "timeout", "a number"),
        ("/flush_cache", {"timeout": -1}, "timeout", "in [0, 3600]"),
        ("/reset_prefix_cache", {"reset_running_requests": 3}, "reset_running_requests", "true or false"),
    ],
)
def test_a_wrong_value_is_named(trained: TrainedServing, path: str, body: Any, param: str, message: str) -> None:
    error = trained.refuse(path, body)
    assert error["param"] == param and message in error["message"]
    assert trained.engine.commands == []


def run(trained: TrainedServing, mode: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answers of a request that runs when the engine is paused, and of one that comes later; the first is ended by
    name unless the pause ended it."""

    async def talk() -> tuple[dict[str, Any], dict[str, Any]]:
        transport = httpx.ASGITransport(trained.app)
        async with trained.delivering(), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            sampling = {"max_new_tokens": 200}
            body = {"input_ids": ENDLESS, "rid": "mine", "return_logprob": True, "sampling_params": sampling}
            first = asyncio.create_task(http.post("/generate", json=body))
            while trained.client.stats.num_steps < 5:
                await asyncio.sleep(0.001)
            assert (await http.post("/pause_generation", json={"mode": mode})).json()["num_requests"] == 1
            late = {"input_ids": [70, 71], "sampling_params": {"max_new_tokens": 3}}
            second = asyncio.create_task(http.post("/generate", json=late))
            while trained.client.num_in_flight < (1 if mode == "abort" else 2):
                await asyncio.sleep(0.001)
            assert (await http.get("/health")).status_code == 200
            assert (await http.get("/health_generate")).status_code == 200
            if mode != "abort":
                assert (await http.post("/abort_request", json={"rid": "mine"})).json() == {"num_aborted": 1}
            answer = await first
            assert not second.done()
            await http.post("/continue_generation")
            return answer.json(), (await second).json()

    return asyncio.run(asyncio.wait_for(talk(), 20))


@pytest.mark.parametrize("mode", ["abort", "in_place"])
def test_a_request_ends_with_its_tokens_and_later_ones_lose_nothing_but_time(make_trained: Any, mode: str) -> None:
    ended, late = run(make_trained(), mode)
    meta = ended["meta_info"]
    assert meta["finish_reason"] == {"type": "abort", "message": "the request was aborted, or its time was over"}
    count = len(ended["output_ids"])
    assert 0 < count == meta["completion_tokens"] == len(meta["output_token_logprobs"])
    assert ended["output_ids"] == (ENDLESS * 100_000)[:count]
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": count}]
    assert late["output_ids"] == [70, 71, 70]
    assert late["meta_info"]["finish_reason"]["type"] == "length"
