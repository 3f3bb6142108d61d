"""Memory is given back and taken again, and an engine that sleeps is paused meanwhile."""

from typing import Any

import pytest

from server.control import MEMORY_TAGS, ReleaseMemory, RestoreMemory
from unit_tests.server.api.rl.conftest import TrainedServing

RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"


def is_sleeping(trained: TrainedServing) -> bool:
    """What /is_sleeping says."""
    answer: bool = trained.http.get("/is_sleeping").json()["is_sleeping"]
    return answer


def test_memory_goes_and_comes_by_tags(trained: TrainedServing) -> None:
    assert trained.succeed(RELEASE, {})["message"] == "The memory of weights, kv_cache, cuda_graph is released."
    assert trained.engine.released == set(MEMORY_TAGS)
    assert is_sleeping(trained)
    trained.succeed(RESUME, {"tags": ["weights", "weights"]})
    assert trained.engine.released == {"kv_cache"} and is_sleeping(trained)
    trained.succeed(RESUME)
    assert not trained.engine.released and not is_sleeping(trained)
    assert trained.commands() == ["ReleaseMemory", "RestoreMemory", "RestoreMemory"]


def test_a_paused_engine_stays_paused(trained: TrainedServing) -> None:
    trained.succeed("/pause_generation")
    trained.succeed(RELEASE, {"tags": ["kv_cache"]})
    trained.succeed(RESUME, {"tags": ["kv_cache"]})
    assert trained.engine.is_paused and not is_sleeping(trained)


def test_a_refused_release_leaves_the_engine_running(trained: TrainedServing) -> None:
    trained.engine.refusals[ReleaseMemory] = ("1 requests run", "Conflict")
    assert "run" in trained.refuse(RELEASE, status=409)["message"]
    trained.refuse("/sleep", status=409)
    assert not trained.engine.is_paused and not is_sleeping(trained)
    trained.succeed("/pause_generation")
    trained.refuse("/sleep", status=409)
    assert trained.engine.is_paused


@pytest.mark.parametrize(
    ("query", "mode", "released", "discards"),
    [
        ({}, "abort", True, False),
        ({"level": "1", "mode": "wait"}, "wait", True, False),
        ({"level": "2"}, "abort", True, True),
        ({"level": "0", "mode": "keep"}, "keep", False, False),
    ],
)
def test_sleep_has_levels(
    trained: TrainedServing, query: dict[str, str], mode: str, released: bool, discards: bool
) -> None:
    trained.succeed("/sleep", **query)
    assert trained.engine.commands[0].mode == mode
    assert is_sleeping(trained) and trained.engine.is_paused
    releases = [command for command in trained.engine.commands if isinstance(command, ReleaseMemory)]
    assert [command.discards_weights for command in releases] == [discards] * released
    assert trained.succeed("/wake_up")["message"] == "The engine is awake."
    assert not is_sleeping(trained) and not trained.engine.is_paused


def test_waking_up_may_take_steps(trained: TrainedServing) -> None:
    trained.succeed("/sleep", level=1)
    assert trained.http.post("/wake_up?tags=weights&tags=cuda_graph").json()["message"] == "The engine sleeps on."
    assert trained.engine.released == {"kv_cache"} and is_sleeping(trained)
    trained.succeed("/wake_up", tags="kv_cache")
    assert not is_sleeping(trained)


def test_taking_what_is_there_changes_nothing(trained: TrainedServing) -> None:
    trained.succeed("/pause_generation")
    trained.succeed(RESUME)
    trained.succeed("/wake_up")
    assert trained.commands() == ["Pause", "RestoreMemory", "RestoreMemory"]
    assert trained.engine.is_paused and not is_sleeping(trained)


def test_a_resume_ends_a_sleep_and_a_pause_behind_it_is_anothers(trained: TrainedServing) -> None:
    trained.succeed("/sleep", level=0)
    trained.succeed("/resume")
    assert not is_sleeping(trained)
    trained.succeed("/pause")
    trained.succeed("/sleep", level=0)
    assert not is_sleeping(trained)
    trained.succeed("/wake_up")
    assert trained.engine.is_paused
    trained.succeed("/resume")
    trained.succeed("/sleep", level=1)
    trained.succeed("/sleep", level=1)
    trained.succeed("/wake_up")
    assert not trained.engine.is_paused and not is_sleeping(trained)


def test_what_could_not_come_back_can_be_asked_for_again(trained: TrainedServing) -> None:
    trained.succeed("/sleep")
    trained.engine.refusals[RestoreMemory] = ("out of memory for decode graphs", "ConfigError")
    trained.engine.released = {"cuda_graph"}  # what is left when weights and caches have come back
    assert "out of memory" in trained.refuse("/wake_up")["message"]
    assert is_sleeping(trained) and trained.engine.is_paused
    del trained.engine.refusals[RestoreMemory]
    trained.succeed("/wake_up", tags="kv_cache")
    assert not is_sleeping(trained) and not trained.engine.is_paused and not trained.engine.released


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (RELEASE, {"tags": "weights"}, "tags", "a list"),
        (RELEASE, {"tags": ["heat"]}, "tags", "'heat', there are weights, kv_cache, cuda_graph"),
        (RESUME, {"tags": [None]}, "tags", "has null"),
        ("/sleep", {"level": 3}, "level", "in 0..2"),
        ("/sleep", {"mode": "deep"}, "mode", "one of abort"),
        ("/wake_up", {"tags": ["weights"] * 4}, "tags", "4 entries, the limit is 3"),
    ],
)
def test_a_wrong_value_is_named(trained: TrainedServing, path: str, body: Any, param: str, message: str) -> None:
    error = trained.refuse(path, body)
    assert error["param"] == param and message in error["message"]
    assert trained.engine.commands == []
