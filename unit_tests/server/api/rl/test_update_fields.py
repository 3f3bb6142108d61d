"""What updates of all kinds have in common."""

import asyncio
from typing import Any

import msgspec
import pytest

from server.api.fields import Fields
from server.api.rl.desk import Desk, Form, new_id
from server.api.rl.update_fields import (
    COMMIT_SCHEMAS,
    TENSOR_SCHEMAS,
    check_target_only,
    read_choice,
    read_name,
    read_tensors,
    read_update,
    read_version,
    update_weights,
)
from server.control import Pause, TensorSpec, WeightSource
from server.errors import InvalidRequest
from server.messages import Generate, SamplingParams
from unit_tests.server.api.rl.conftest import TrainedServing
from unit_tests.server.fake_engine import FOREVER_ID

FORM = Form((), **COMMIT_SCHEMAS, **TENSOR_SCHEMAS, name={"type": "string"})
SOURCE = WeightSource("disk", path="/new")


def fields(**values: Any) -> Fields:
    """The fields of a request."""
    return FORM.read(msgspec.json.encode(values), [])


@pytest.mark.parametrize(("usual", "said", "expected"), [(False, {}, False), (True, {}, True), (True, False, False)])
def test_what_is_usual_counts_where_nothing_is_said(usual: bool, said: Any, expected: bool) -> None:
    request = fields() if said == {} else fields(partial=said)
    assert read_update(request, SOURCE, ("auto",), usual).command.begin.is_partial is expected


def test_every_part_of_an_update_has_one_id_and_two_updates_have_two() -> None:
    commands = [read_update(fields(), SOURCE, ("auto",)).command for _ in range(2)]
    for command in commands:
        assert command.begin.control_id == command.commit.control_id == command.control_id
    assert commands[0].control_id != commands[1].control_id


def test_tensors_are_listed_by_three_fields() -> None:
    request = fields(names=["a"], dtypes=["torch.float32"], shapes=[[2]])
    assert read_tensors(request) == (TensorSpec("a", "float32", (2,)),)
    with pytest.raises(InvalidRequest, match="shapes is missing"):
        read_tensors(fields(names=["a"], dtypes=["float32"]))
    with pytest.raises(InvalidRequest, match="names has 2 entries, dtypes 1 and shapes 1"):
        read_tensors(fields(names=["a", "b"], dtypes=["float32"], shapes=[[2]]))
    for sizes in ([2**50], [-1], ["2"], [True]):
        with pytest.raises(InvalidRequest, match="a list of lists of sizes"):
            read_tensors(fields(names=["a"], dtypes=["float32"], shapes=[sizes]))


def test_many_tensors_may_be_listed() -> None:
    names = [f"model.language_model.layers.{i}.mlp.experts.down_proj.weight" for i in range(20_000)]
    found = read_tensors(fields(names=names, dtypes=["bfloat16"] * 20_000, shapes=[[512, 2048]] * 20_000))
    assert [tensor.name for tensor in found] == names


def test_texts_have_defaults_choices_and_lengths() -> None:
    assert read_choice(fields(), "name", ("a", "b")) == "a"
    assert read_choice(fields(), "name", ("a", "b"), "b") == "b"
    with pytest.raises(InvalidRequest, match="name is 'c', it must be one of a, b"):
        read_choice(fields(name="c"), "name", ("a", "b"))
    assert read_name(fields(name="x"), "name") == "x"
    assert (read_version(fields(), "weight_version"), read_version(fields(weight_version="1"), "weight_version")) == (
        None,
        "1",
    )
    with pytest.raises(InvalidRequest, match="weight_version has 257 characters, the range"):
        read_version(fields(weight_version="v" * 257), "weight_version")


def test_a_draft_heads_tensor_is_found() -> None:
    check_target_only([TensorSpec("model.mtp.x", "float32", ())])
    with pytest.raises(InvalidRequest, match=r"the update brings mtp\.x"):
        check_target_only([TensorSpec("a", "float32", ()), TensorSpec("mtp.x", "float32", ())])


def test_requests_that_stand_still_are_counted(make_trained: Any) -> None:
    trained: TrainedServing = make_trained()

    async def talk() -> list[int]:
        desk, client, counts = Desk(trained.services), trained.client, list[int]()
        request = Generate("r", [FOREVER_ID, 70], SamplingParams())
        async with trained.delivering():
            with client.submit([request]) as outputs:
                await anext(outputs)
                for command in (None, Pause(new_id(), "keep")):
                    if command is not None:
                        await desk.carry_out(command)
                    update = read_update(fields(), SOURCE, ("auto",))
                    counts.append((await update_weights(desk, update))["num_paused_requests"])
        return counts

    assert asyncio.run(asyncio.wait_for(talk(), 20)) == [0, 1]
