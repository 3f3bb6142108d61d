"""Weight updates by SGLang's names: what the engine is told, what is answered, and what is refused."""

import asyncio
from typing import Any

import httpx
import pytest

from server.control import (
    BeginUpdate,
    CommitUpdate,
    JoinGroup,
    LeaveGroup,
    Pause,
    RollBackUpdate,
    TensorSpec,
    UpdateWeights,
    WeightSource,
)
from server.errors import EngineDead
from unit_tests.server.api.rl.conftest import TrainedServing
from unit_tests.server.api.rl.test_inline_tensors import encode
from unit_tests.server.api.rl.trained_engine import BAD_PATH
from unit_tests.server.fake_engine import FOREVER_ID

DISK = "/update_weights_from_disk"
TENSORS = {"names": ["a.weight", "mtp.fc.weight"], "dtypes": ["torch.bfloat16", "float32"], "shapes": [[2, 3], []]}
SPECS = (TensorSpec("a.weight", "bfloat16", (2, 3)), TensorSpec("mtp.fc.weight", "float32", ()))
GROUP = {"master_address": "10.0.0.1", "master_port": 29500, "rank_offset": 1, "world_size": 3}


def test_an_update_from_disk_is_one_session(trained: TrainedServing) -> None:
    answer = trained.succeed(DISK, {"model_path": "/new", "weight_version": "v7"})
    assert answer == {
        "success": True,
        "message": "Succeeded to update model weights. Weight version updated to v7.",
        "num_paused_requests": 0,
        "weight_version": "v7",
        "mode": "full",
        "num_tensors": 2,
        "num_bytes": 10,
    }
    command = trained.last_update()
    assert command.source == WeightSource("disk", path="/new")
    assert command.begin == BeginUpdate(command.control_id)
    assert command.commit == CommitUpdate(command.control_id, "v7", "keep")


def test_a_version_that_is_not_given_is_left_to_the_engine(trained: TrainedServing) -> None:
    assert trained.succeed(DISK, {"model_path": "/new"})["weight_version"] == "1"
    assert trained.last_update().commit.weight_version is None


@pytest.mark.parametrize(
    ("fields", "in_flight"),
    [
        ({}, "keep"),
        ({"abort_all_requests": True}, "abort"),
        ({"in_flight": "wait"}, "wait"),
        ({"in_flight": "retract", "abort_all_requests": True}, "retract"),
        ({"in_flight": None, "abort_all_requests": None}, "keep"),
    ],
)
def test_requests_that_run_go_on_unless_the_trainer_says(
    trained: TrainedServing, fields: dict[str, Any], in_flight: str
) -> None:
    trained.succeed(DISK, {"model_path": "/new", **fields})
    assert trained.last_update().commit.in_flight == in_flight


def test_what_may_be_missing_and_must_be_there_is_passed_on(trained: TrainedServing) -> None:
    trained.succeed(DISK, {"model_path": "/new", "partial": True, "require_mtp": True})
    assert (trained.last_update().begin.is_partial, trained.last_update().begin.needs_mtp) == (True, True)


def test_fields_without_effect_are_accepted_and_unknown_ones_ignored(trained: TrainedServing) -> None:
    harmless = {"flush_cache": False, "is_async": True, "torch_empty_cache": True, "recapture_cuda_graph": False}
    body = {"model_path": "/new", "load_format": "auto", "token_step": 3, "manifest": [1], **harmless}
    trained.succeed(DISK, body)
    assert len(trained.engine.commands) == 1


def test_an_engine_that_is_to_stay_paused_is_paused_first(trained: TrainedServing) -> None:
    trained.succeed(DISK, {"model_path": "/new", "keep_pause": True, "abort_all_requests": True})
    pause, update = trained.engine.commands
    assert isinstance(pause, Pause) and pause.mode == "abort"
    assert isinstance(update, UpdateWeights) and update.commit.in_flight == "keep"
    assert trained.engine.is_paused
    trained.succeed(DISK, {"model_path": "/new", "keep_pause": True})
    assert trained.commands() == ["Pause", "UpdateWeights", "UpdateWeights"]


def test_a_failed_update_leaves_the_version_and_no_pause_of_its_own(trained: TrainedServing) -> None:
    error = trained.refuse(DISK, {"model_path": BAD_PATH, "keep_pause": True})
    assert error["message"] == f"{BAD_PATH} has no safetensors"
    assert trained.commands() == ["Pause", "UpdateWeights", "Resume"]
    assert trained.engine.version == "default" and not trained.engine.is_paused
    trained.succeed("/pause")
    trained.refuse(DISK, {"model_path": BAD_PATH, "keep_pause": True})
    assert trained.engine.is_paused


def test_a_second_session_is_a_conflict_and_can_be_rolled_back(trained: TrainedServing) -> None:
    trained.succeed("/start_weight_update")
    error = trained.refuse(DISK, {"model_path": "/new"}, 409)
    assert error["type"] == "ConflictError" and "roll it back" in error["message"]
    assert trained.succeed("/rollback_weight_update")["success"] is True
    assert isinstance(trained.last_command(), RollBackUpdate)
    trained.succeed(DISK, {"model_path": "/new"})
    trained.refuse("/rollback_weight_update", status=409)


def test_broadcast_tensors_are_declared_before_they_come(trained: TrainedServing) -> None:
    trained.succeed("/update_weights_from_distributed", {**TENSORS, "group_name": "g", "weight_version": "2"})
    command = trained.last_update()
    assert command.source == WeightSource("group", group="g", tensors=SPECS)
    assert command.begin == BeginUpdate(command.control_id, SPECS, is_partial=True)
    trained.succeed("/update_weights_from_distributed", {**TENSORS, "partial": False})
    assert trained.last_update().source.group == "weight_update_group"
    assert not trained.last_update().begin.is_partial


def test_a_group_is_joined_and_left(trained: TrainedServing) -> None:
    trained.succeed("/init_weights_update_group", {**GROUP, "backend": "nccl"})
    command = trained.last_command()
    assert command == JoinGroup(command.control_id, "weight_update_group", "10.0.0.1", 29500, 1, 3, "nccl")
    trained.succeed("/init_weights_update_group", {**GROUP, "group_name": "g"})
    assert (trained.last_command().group, trained.last_command().backend) == ("g", "gloo")
    trained.succeed("/destroy_weights_update_group", {"group_name": "g"})
    assert trained.last_command() == LeaveGroup(trained.last_command().control_id, "g")


def test_tensors_in_the_request_are_a_file_for_the_engine(trained: TrainedServing) -> None:
    data, text = encode({"mtp.fc.weight": [1.0, 2.0]})
    trained.succeed("/update_weights_from_tensor", {"serialized_named_tensors": [text], "flush_cache": False})
    command = trained.last_update()
    specs = (TensorSpec("mtp.fc.weight", "float32", (2,)),)
    assert command.source == WeightSource("inline", data=(data,), tensors=specs)
    assert command.begin == BeginUpdate(command.control_id, specs, is_partial=True)


@pytest.mark.parametrize("path", ["/update_weights_from_tensor", "/update_weights_from_distributed"])
def test_a_draft_head_that_is_to_be_left_alone_gets_nothing(trained: TrainedServing, path: str) -> None:
    body = {**TENSORS, "serialized_named_tensors": [encode({"mtp.fc.weight": [1.0]})[1]], "disable_draft_model": True}
    assert "brings mtp.fc.weight" in trained.refuse(path, body)["message"]
    assert trained.engine.commands == []


@pytest.mark.parametrize(("path", "body"), [(DISK, {"model_path": "/new"}), ("/pull_weights", {"url": "http://t"})])
def test_nobody_knows_beforehand_whether_a_source_has_a_draft_head(
    trained: TrainedServing, path: str, body: dict[str, Any]
) -> None:
    error = trained.refuse(path, {**body, "disable_draft_model": True})
    assert error["param"] == "disable_draft_model" and "leave it out" in error["message"]
    assert trained.engine.commands == []
    trained.succeed(path, {**body, "disable_draft_model": False})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (DISK, {"model_path": "/new"}),
        ("/pull_weights", {"url": "http://t"}),
        ("/update_weights_from_distributed", TENSORS),
        ("/update_weights_from_tensor", {"serialized_named_tensors": [encode({"a.weight": [1.0]})[1]]}),
        ("/update_weights", {"weight_dir": "/new"}),
    ],
)
def test_the_checksum_of_the_result_may_be_asked_for(trained: TrainedServing, path: str, body: dict[str, Any]) -> None:
    trained.succeed(path, {**body, "result_sha256": "aB" * 32})
    assert trained.last_update().begin.result_sha256 == "aB" * 32


def test_weights_are_pulled_from_a_publisher(trained: TrainedServing) -> None:
    trained.succeed("/pull_weights", {"url": "http://trainer:7000/"})
    assert trained.last_update().source == WeightSource("stream", url="http://trainer:7000", num_streams=4)
    body = {"url": "http://t", "num_streams": 2, "strategies": ["full"], "weight_version": "5"}
    trained.succeed("/pull_weights", body)
    assert trained.last_update().source == WeightSource("stream", url="http://t", num_streams=2, strategies=("full",))
    assert trained.last_update().commit.weight_version == "5"


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (DISK, {}, "model_path", "model_path has 0 characters"),
        (DISK, {"model_path": 5}, "model_path", "a string"),
        (DISK, {"model_path": "x", "weight_version": 5}, "weight_version", "a string"),
        (DISK, {"model_path": "x", "weight_version": ""}, "weight_version", "range is 1..256"),
        (DISK, {"model_path": "x", "abort_all_requests": "yes"}, "abort_all_requests", "true or false"),
        (DISK, {"model_path": "x", "flush_cache": 1}, "flush_cache", "true or false"),
        (DISK, {"model_path": "x", "keep_pause": 1}, "keep_pause", "true or false"),
        (DISK, {"model_path": "x", "is_async": 0}, "is_async", "true or false"),
        (DISK, {"model_path": "x", "token_step": "1"}, "token_step", "an integer"),
        (DISK, {"model_path": "x", "load_format": "dummy"}, "load_format", "one of auto, safetensors"),
        (DISK, {"model_path": "x", "in_flight": "drop"}, "in_flight", "one of abort, wait, retract, keep"),
        (DISK, {"model_path": "x", "result_sha256": "ab"}, "result_sha256", "64 hexadecimal digits"),
        ("/pull_weights", {}, "url", "url has 0 characters"),
        ("/pull_weights", {"url": "file:///x"}, "url", "must begin with http"),
        ("/pull_weights", {"url": "http://t", "num_streams": 65}, "num_streams", "in 1..64"),
        ("/pull_weights", {"url": "http://t", "strategies": ["xor"]}, "strategies", "there are full, delta"),
        ("/pull_weights", {"url": "http://t", "strategies": [None]}, "strategies", "has null"),
        ("/update_weights_from_distributed", {}, "names", "names is missing"),
        ("/update_weights_from_distributed", {**TENSORS, "names": "x"}, "names", "a list of texts"),
        ("/update_weights_from_distributed", {**TENSORS, "names": ["x"]}, "names", "shapes 2; each tensor needs"),
        ("/update_weights_from_distributed", {**TENSORS, "shapes": [[-1], []]}, "shapes", "a list of lists of sizes"),
        ("/update_weights_from_distributed", {**TENSORS, "load_format": "flattened_bucket"}, "load_format", "auto"),
        ("/init_weights_update_group", {}, "master_address", "master_address is missing"),
        ("/init_weights_update_group", {**GROUP, "rank_offset": 3}, "rank_offset", "ranks of a world of 3 end with 2"),
        ("/init_weights_update_group", {**GROUP, "master_port": 70000}, "master_port", "in 1..65535"),
        ("/init_weights_update_group", {**GROUP, "backend": "mpi"}, "backend", "one of nccl, gloo"),
        ("/destroy_weights_update_group", {"group_name": ""}, "group_name", "range is 1.."),
    ],
)
def test_a_wrong_value_is_named(trained: TrainedServing, path: str, body: Any, param: str, message: str) -> None:
    error = trained.refuse(path, body)
    assert error["param"] == param and message in error["message"]
    assert trained.engine.commands == []


def test_the_engine_dying_ends_an_update_that_takes_its_time(make_trained: Any) -> None:
    trained = make_trained()
    trained.engine.is_slow = True

    async def talk() -> httpx.Response:
        transport = httpx.ASGITransport(trained.app)
        async with trained.delivering(), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            update = asyncio.create_task(http.post(DISK, json={"model_path": "/new"}))
            while not trained.engine.commands:
                await asyncio.sleep(0.001)
            assert not update.done()
            trained.client.fail(EngineDead("the engine has gone"))
            return await update

    answer = asyncio.run(asyncio.wait_for(talk(), 20))
    assert answer.status_code == 503 and "has gone" in answer.json()["error"]["message"]


def test_tokens_belong_to_the_version_that_made_them(make_trained: Any) -> None:
    trained = make_trained()

    async def talk() -> dict[str, Any]:
        transport = httpx.ASGITransport(trained.app)
        async with trained.delivering(), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            running = asyncio.create_task(http.post("/generate", json={"input_ids": [FOREVER_ID, 70], "rid": "r"}))
            for version in ("a", "b"):
                before = trained.client.stats.num_steps
                while trained.client.stats.num_steps < before + 5:
                    await asyncio.sleep(0.001)
                body = {"model_path": "/new", "weight_version": version}
                assert (await http.post(DISK, json=body)).json()["success"]
            after = trained.client.stats.num_steps
            while trained.client.stats.num_steps < after + 5:
                await asyncio.sleep(0.001)
            await http.post("/abort_request", json={"rid": "r"})
            return (await running).json()

    answer = asyncio.run(asyncio.wait_for(talk(), 20))
    spans = answer["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "a", "b"]
    assert [spans[0]["start"], *(span["end"] for span in spans)] == [
        0,
        spans[1]["start"],
        spans[2]["start"],
        len(answer["output_ids"]),
    ]
    assert all(span["start"] < span["end"] for span in spans)
    assert answer["meta_info"]["weight_version"] == "b"
