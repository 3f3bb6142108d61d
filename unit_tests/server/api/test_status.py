"""The routes that tell how the server is."""

import pytest

from server.config import EngineConfig, ServerConfig
from server.errors import EngineDead
from server.messages import EngineStats, Generate, SamplingParams
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.test_requests import check_error
from unit_tests.server.fake_engine import FOREVER_ID


def test_health_generate_is_200_if_a_token_is_generated(serving: Serving) -> None:
    assert serving.http.get("/health_generate").status_code == 200
    (request,) = serving.channel.sent
    assert isinstance(request, Generate) and request.sampling.max_tokens == 1
    serving.client.fail(EngineDead("gone"))
    check_error(serving.http.get("/health_generate"), 503, None, "gone")


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_health_is_200_until_the_engine_fails(serving: Serving, path: str) -> None:
    assert serving.http.get(path).status_code == 200
    assert serving.http.head(path).status_code == 200
    serving.client.fail(EngineDead("gone"))
    check_error(serving.http.get(path), 503, None, "gone")
    assert serving.http.head(path).status_code == 503
    check_error(serving.http.post("/v1/completions", json={"prompt": [5]}), 503, None, "gone")


def test_a_server_that_is_paused_or_has_no_memory_is_healthy(serving: Serving) -> None:
    serving.client.stats = EngineStats(is_frozen=True)
    assert [serving.http.get(path).status_code for path in ("/health", "/ready", "/health_generate")] == [200] * 3
    assert serving.channel.sent == []


def test_ready_is_200_while_requests_are_admitted(serving: Serving) -> None:
    assert serving.http.get("/ready").status_code == 200
    assert serving.http.head("/ready").status_code == 200
    serving.client.refuse(EngineDead("the server is shutting down"))
    check_error(serving.http.get("/ready"), 503, None, "shutting down")


def test_a_full_server_is_not_ready_but_healthy_and_says_when_to_come_again(make_serving) -> None:
    serving = make_serving(max_requests=1)
    serving.channel.paused = True
    with serving.listening():
        assert serving.http.portal is not None
        waiting = serving.http.portal.start_task_soon(_generate_for_ever, serving)
        while serving.client.num_in_flight == 0:
            serving.http.get("/health")
        assert serving.http.get("/health").status_code == 200
        full = serving.http.get("/ready")
        check_error(full, 429, None, "--max-queue")
        assert full.headers["retry-after"] == "1"
        assert serving.http.get("/load").json() == {"server_load": 1, "num_running": 0, "num_waiting": 0}
        serving.client.fail(EngineDead("gone"))
        waiting.cancel()


async def _generate_for_ever(serving: Serving) -> None:
    async for _ in serving.client.submit([Generate("x", [FOREVER_ID], SamplingParams())]):
        pass


def test_the_load_is_what_the_engine_last_said(serving: Serving) -> None:
    serving.client.stats = EngineStats(num_running=3, num_waiting=4)
    assert serving.http.get("/load").json() == {"server_load": 0, "num_running": 3, "num_waiting": 4}


def test_the_version_is_that_of_the_application(serving: Serving) -> None:
    assert serving.http.get("/version").json() == {"version": serving.app.version}


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info_says_where_the_model_comes_from(serving: Serving, path: str) -> None:
    model = serving.services.engine_config.model
    serving.client.stats = EngineStats(
        weight_version="7", mtp_weight_version="6", mtp_stale=True, drafts_by_version={"7": ((4, 2), (3, 1))}
    )
    versions = {
        "weight_version": "7",
        "mtp_weight_version": "6",
        "mtp_stale": True,
        "drafts_by_version": {"7": {"proposed": [4, 2], "accepted": [3, 1]}},
    }
    expected = {"model_path": model, "tokenizer_path": model, "is_generation": True, **versions}
    assert serving.http.get(path).json() == expected
    assert versions.items() <= serving.http.get("/server_info").json().items()
    assert serving.http.get("/get_weight_version").json() == {"weight_version": "7"}


def test_server_info_has_an_older_name(serving: Serving) -> None:
    assert serving.http.get("/get_server_info").json() == serving.http.get("/server_info").json()


def test_server_info_has_settings_and_sizes_and_no_secrets(make_serving) -> None:
    config = ServerConfig(
        api_key=("sesame",), admin_api_key="sesame-too", enable_rl=True, served_model_name=("a", "b"), max_queue=7
    )
    serving = make_serving(config=config)
    with serving.listening():
        answer = serving.http.get("/server_info", headers={"x-api-key": "sesame"})
    assert "sesame" not in answer.text
    info = answer.json()
    assert info["model_names"] == ["a", "b"]
    assert (info["max_model_len"], info["mtp_step"]) == (serving.client.ready.max_model_len, 2)
    assert info["settings"]["max_queue"] == 7 and "api_key" not in info["settings"]
    assert info["versions"]["tandem"] == serving.app.version


def test_a_setting_that_json_has_no_number_for_is_null(make_serving, tokenizer) -> None:
    serving = make_serving()
    object.__setattr__(serving.services, "engine_config", EngineConfig(stream_slowdown=float("inf")))
    with serving.listening():
        assert serving.http.get("/server_info").json()["settings"]["stream_slowdown"] is None
