"""Looking at the weights that serve."""

from typing import Any

import pytest

from server.control import CheckWeights, ReadWeights, SetVersion
from unit_tests.server.api.rl.conftest import TrainedServing
from unit_tests.server.api.rl.trained_engine import CHECKSUMS

READ = "/get_weights_by_name"


def test_values_are_read_by_body_or_query(trained: TrainedServing) -> None:
    asked = {"name": "model.norm.weight", "truncate_size": 2}
    answers = [
        trained.http.post(READ, json=asked),
        trained.http.get(READ, params=asked),
        trained.http.request("GET", READ, json=asked),
    ]
    assert [answer.json() for answer in answers] == [[0.5, 1.0]] * 3
    assert {(command.name, command.num_values) for command in trained.engine.commands} == {("model.norm.weight", 2)}
    trained.succeed(READ, {"name": "x"})
    assert trained.last_command().num_values == 100
    trained.engine.refusals[ReadWeights] = ("there is no weight x", "InvalidRequest")
    assert trained.refuse(READ, {"name": "x"})["message"] == "there is no weight x"


@pytest.mark.parametrize(
    ("sent", "action"),
    [({}, "checksum"), ({"action": "snapshot"}, "snapshot"), ({"action": "reset_tensors"}, "reset")],
)
def test_the_checker_passes_actions_on(trained: TrainedServing, sent: Any, action: str) -> None:
    answer = trained.succeed("/weights_checker", sent)
    assert trained.last_command().action == action and answer["message"] == f"The weights passed: {action}."
    assert answer.get("checksums") == (None if action == "reset" else CHECKSUMS)
    told = trained.succeed("/weight_checker", sent)
    assert told["action"] == action and told.get("checksum") == answer.get("checksum")


def test_a_comparison_names_what_differs(trained: TrainedServing) -> None:
    error = trained.refuse("/weights_checker", {"action": "compare"})
    assert error["message"] == "1 weight differs from the snapshot: mtp.norm.weight"
    compared = trained.succeed("/weight_checker", {"action": "compare"})
    assert compared == {"action": "compare", "match": False, "different": ["mtp.norm.weight"]}


@pytest.mark.parametrize(
    ("baseline", "different"),
    [
        ("cc", []),
        ("dd", ["*"]),
        (CHECKSUMS, []),
        ({**CHECKSUMS, "mtp.norm.weight": "x"}, ["mtp.norm.weight"]),
        ({"model.norm.weight": "aa", "more": "y"}, ["more", "mtp.norm.weight"]),
    ],
)
def test_a_baseline_is_compared_by_names_or_as_a_whole(
    trained: TrainedServing, baseline: Any, different: list[str]
) -> None:
    compared = trained.succeed("/weight_checker", {"action": "compare", "baseline": baseline})
    assert compared == {"action": "compare", "match": not different, "different": different}
    assert trained.last_command() == CheckWeights(trained.last_command().control_id)


def test_a_new_name_of_the_weights_aborts_by_sglangs_field_and_not_by_vllms(trained: TrainedServing) -> None:
    ended: list[Any] = []
    trained.client.end = ended.append  # type: ignore[method-assign, assignment]
    answer = trained.succeed("/update_weight_version", {"new_version": "v2"})
    assert answer == {"success": True, "message": "Weight version updated to v2.", "new_version": "v2"}
    assert isinstance(trained.last_command(), SetVersion) and ended == [[]]
    trained.succeed("/update_weight_version", {"weight_version": "v3"})
    trained.succeed("/update_weight_version", {"new_version": "v3", "abort_all_requests": False})
    assert ended == [[]]
    trained.succeed("/update_weight_version", {"weight_version": "v4", "abort_all_requests": True})
    assert ended == [[], []] and trained.engine.version == "v4"


def test_versions_are_told(trained: TrainedServing) -> None:
    trained.succeed("/update_weight_version", {"weight_version": "v2"})
    info = trained.http.get("/weight_info").json()
    assert info == {
        "weight_version": "v2",
        "mtp_weight_version": "default",
        "mtp_stale": True,
        "drafts_by_version": {
            "default": {"proposed": [8, 8], "accepted": [6, 4]},
            "v2": {"proposed": [4, 4], "accepted": [3, 1]},
        },
        "num_weight_updates": 0,
    }
    assert trained.http.get("/get_weight_version").json() == {"weight_version": "v2"}
    for path in ("/model_info", "/get_model_info", "/server_info"):
        found = trained.http.get(path).json()
        assert {name: found[name] for name in info if name != "num_weight_updates"}.items() <= info.items()


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (READ, {}, "name", "name has 0 characters"),
        (READ, {"name": "x", "truncate_size": 0}, "truncate_size", "in 1.."),
        ("/weights_checker", {"action": "look"}, "action", "one of checksum, snapshot, compare, reset"),
        ("/weight_checker", {"action": 5}, "action", "a string"),
        ("/weight_checker", {"action": "compare", "baseline": 5}, "baseline", "baseline is 5, it must be checksums"),
        ("/update_weight_version", {}, "new_version", "new_version is missing"),
        ("/update_weight_version", {"new_version": 5}, "new_version", "a string"),
        ("/update_weight_version", {"new_version": "v", "abort_all_requests": 1}, "abort_all_requests", "true or"),
    ],
)
def test_a_wrong_value_is_named(trained: TrainedServing, path: str, body: Any, param: str, message: str) -> None:
    error = trained.refuse(path, body)
    assert error["param"] == param and message in error["message"]
    assert trained.engine.commands == []
