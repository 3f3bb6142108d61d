"""Weight sessions by vLLM's names."""

from typing import Any

import pytest

from server.control import (
    AddTensors,
    BeginUpdate,
    CommitUpdate,
    JoinGroup,
    RollBackUpdate,
    TensorSpec,
    UpdateWeights,
    WeightSource,
)
from unit_tests.server.api.rl.conftest import TrainedServing

INFO = {"names": ["a.weight", "mtp.fc.weight"], "dtype_names": ["bfloat16", "float32"], "shapes": [[2, 3], [1]]}
SPECS = (TensorSpec("a.weight", "bfloat16", (2, 3)), TensorSpec("mtp.fc.weight", "float32", (1,)))
INIT = {"master_address": "trainer", "master_port": 29500, "rank_offset": 1, "world_size": 2, "packed": False}


def test_a_session_is_started_filled_and_finished(trained: TrainedServing) -> None:
    assert trained.succeed("/start_weight_update") == {"message": "Weight update started"}
    assert trained.last_command() == BeginUpdate(trained.last_command().control_id)
    for _ in range(2):
        assert trained.succeed("/update_weights", {"update_info": INFO}) == {"message": "2 weights received"}
    source = WeightSource("group", group="weight_update_group", tensors=SPECS)
    assert trained.last_command() == AddTensors(trained.last_command().control_id, source)
    finished = trained.succeed("/finish_weight_update", {"weight_version": "9"})
    assert (finished["message"], finished["weight_version"]) == ("Weight update finished", "9")
    assert trained.last_command() == CommitUpdate(trained.last_command().control_id, "9", "keep")
    trained.succeed("/start_weight_update", {"partial": True, "require_mtp": True, "result_sha256": "0" * 64})
    command = trained.last_command()
    assert command == BeginUpdate(command.control_id, is_partial=True, needs_mtp=True, result_sha256="0" * 64)
    assert trained.succeed("/finish_weight_update", {"in_flight": "retract"})["weight_version"] == "2"
    assert trained.last_command().in_flight == "retract"


def test_the_group_is_joined_by_one_name(trained: TrainedServing) -> None:
    trained.succeed("/init_weight_transfer_engine", {"init_info": INIT})
    command = trained.last_command()
    assert command == JoinGroup(command.control_id, "weight_update_group", "trainer", 29500, 1, 2, "gloo")
    assert trained.http.get("/get_world_size").json() == {"world_size": 1}


def test_out_of_turn_is_a_conflict(trained: TrainedServing) -> None:
    assert "no weight session" in trained.refuse("/update_weights", {"update_info": INFO}, 409)["message"]
    trained.refuse("/finish_weight_update", status=409)
    trained.succeed("/start_weight_update")
    for path in ("/start_weight_update", "/start_draft_weight_update"):
        assert "a weight session is open" in trained.refuse(path, status=409)["message"]


def test_a_session_for_the_draft_head_takes_nothing_else(trained: TrainedServing) -> None:
    head = {"names": ["mtp.fc.weight"], "dtype_names": ["float32"], "shapes": [[1]]}
    trained.succeed("/start_draft_weight_update")
    assert trained.last_command() == BeginUpdate(trained.last_command().control_id, is_partial=True)
    trained.succeed("/update_weights", {"update_info": head})
    error = trained.refuse("/update_weights", {"update_info": INFO})
    assert error["param"] == "update_info.names" and "names has a.weight" in error["message"]
    assert isinstance(trained.last_command(), RollBackUpdate)
    trained.succeed("/start_weight_update")
    trained.succeed("/update_weights", {"update_info": INFO})


def test_a_directory_is_an_update_of_its_own(trained: TrainedServing) -> None:
    answer = trained.succeed("/update_weights", {"weight_dir": "/new", "weight_version": "3"})
    assert (answer["success"], answer["weight_version"]) == (True, "3")
    assert isinstance(trained.last_command(), UpdateWeights)
    assert trained.last_command().source == WeightSource("disk", path="/new")


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/init_weight_transfer_engine", {}, "master_address", "init_info.master_address is missing"),
        ("/init_weight_transfer_engine", {"init_info": 5}, "init_info", "a JSON object"),
        ("/init_weight_transfer_engine", {"init_info": {**INIT, "packed": True}}, "init_info.packed", "one by one"),
        ("/init_weight_transfer_engine", {"init_info": {**INIT, "packed": 1}}, "init_info.packed", "true or false"),
        (
            "/init_weight_transfer_engine",
            {"init_info": {**INIT, "world_size": "2"}},
            "init_info.world_size",
            "an integer",
        ),
        ("/start_weight_update", {"partial": "yes"}, "partial", "true or false"),
        ("/update_weights", {}, "update_info", "both missing"),
        ("/update_weights", {"update_info": INFO, "weight_dir": "/x"}, "update_info", "both given"),
        ("/update_weights", {"update_info": {}}, "update_info.names", "update_info.names is missing"),
        ("/update_weights", {"update_info": {**INFO, "packed": True}}, "update_info.packed", "one by one"),
        (
            "/update_weights",
            {"update_info": {**INFO, "num_updates_list": [1]}},
            "update_info.num_updates_list",
            "/pull_weights takes deltas",
        ),
        ("/update_weights", {"weight_dir": ""}, "weight_dir", "range is 1.."),
        ("/finish_weight_update", {"weight_version": 5}, "weight_version", "a string"),
        ("/finish_weight_update", {"in_flight": "x"}, "in_flight", "one of abort, wait"),
    ],
)
def test_a_wrong_value_is_named_in_openais_form(
    trained: TrainedServing, path: str, body: Any, param: str, message: str
) -> None:
    answer = trained.http.post(path, json=body)
    assert answer.status_code == 400 and set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"]
    assert trained.engine.commands == []
