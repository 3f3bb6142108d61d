"""Every request ends: with a finish reason, an error or an abort."""

import asyncio
import dataclasses
from typing import Any

import pytest

from server.control import Control, Done, Pause, RestoreMemory, Resume, RollBackUpdate
from server.errors import EngineDead, InvalidRequest, ModelFailure, QueueFull, RequestTimeout, TandemError
from server.messages import Abort, Failed, Generate, SamplingParams, StepReport, TokenOutput
from unit_tests.server.api.conftest import Serving
from unit_tests.server.fake_engine import BROKEN_ID, FOREVER_ID, REFUSE_ID


def _generate(request_id: str, first_id: int = 5, max_tokens: int = 4) -> Generate:
    return Generate(request_id, [first_id, 6], SamplingParams(max_tokens=max_tokens))


def test_outputs_of_requests_submitted_together_come_until_all_have_ended(make_serving) -> None:
    serving: Serving = make_serving()

    async def talk() -> list[TokenOutput]:
        async with serving.delivering():
            with serving.client.submit([_generate("a"), _generate("b", max_tokens=9)]) as outputs:
                return [output async for output in outputs]

    received = asyncio.run(talk())
    lengths = {name: sum(len(o.token_ids) for o in received if o.request_id == name) for name in ("a", "b")}
    assert lengths == {"a": 4, "b": 9}
    assert serving.client.num_in_flight == 0
    assert not any(isinstance(message, Abort) for message in serving.channel.sent)


def test_leaving_the_block_aborts_what_still_runs(make_serving) -> None:
    serving: Serving = make_serving()

    async def talk() -> None:
        async with serving.delivering():
            with serving.client.submit([_generate("a", FOREVER_ID), _generate("b")]) as outputs:
                async for output in outputs:
                    if output.request_id == "b" and output.finish_reason is not None:
                        break

    asyncio.run(talk())
    assert [message for message in serving.channel.sent if isinstance(message, Abort)] == [Abort("a")]


def test_outputs_of_an_aborted_request_that_are_on_their_way_are_dropped(make_serving) -> None:
    serving: Serving = make_serving()

    async def talk() -> set[str]:
        async with serving.delivering():
            with serving.client.submit([_generate("a", FOREVER_ID), _generate("b", max_tokens=30)]) as outputs:
                await anext(outputs)
                outputs.abort("a")
                return {output.request_id async for output in outputs}

    assert asyncio.run(talk()) == {"b"}


def test_requests_are_found_by_name_and_end_with_the_counts_they_have(make_serving) -> None:
    serving: Serving = make_serving()
    client = serving.client

    async def talk() -> list[TokenOutput]:
        async with serving.delivering():
            with client.submit([_generate("a", FOREVER_ID), _generate("b", max_tokens=30)], ["x", "y"]) as outputs:
                before = [await anext(outputs) for _ in range(4)]
                assert client.find(lambda name: name == "x") == ["a"]
                assert client.find(lambda name: name in "xy") == ["a", "b"]
                client.end(["a", "a", "unknown"])
                assert client.find(lambda _: True) == ["b"]
                return before + [output async for output in outputs]

    received = [output for output in asyncio.run(talk()) if output.request_id == "a"]
    assert received[-1] == dataclasses.replace(received[-2], token_ids=[], logprobs=[], finish_reason="abort")
    assert [message for message in serving.channel.sent if isinstance(message, Abort)] == [Abort("a")]
    assert client.num_in_flight == 0 and client._names == {}


def test_an_end_repeats_no_step_that_was_told(make_serving) -> None:
    client = make_serving().client

    async def talk() -> list[TokenOutput]:
        with client.submit([_generate("a")], ["x"]) as outputs:
            outputs.put(TokenOutput("a", [5, 6], num_proposed=2, num_accepted=1, drafted_steps=[(2, 1)], age=0.1))
            client.end(["a"])
            return [output async for output in outputs]

    _, last = asyncio.run(talk())
    assert last.finish_reason == "abort" and (last.num_proposed, last.num_accepted) == (2, 1)
    assert (last.token_ids, last.drafted_steps, last.age) == ([], [], 0.0)


def test_a_request_ends_before_its_first_output_too(make_serving) -> None:
    client = make_serving().client

    async def talk() -> list[TokenOutput]:
        with client.submit([_generate("a")], ["x"]) as outputs:
            client.end(["a"])
            return [output async for output in outputs]

    assert asyncio.run(talk()) == [TokenOutput("a", [], finish_reason="abort")]


def test_a_refused_request_raises_its_error_and_takes_its_siblings_along(make_serving) -> None:
    serving: Serving = make_serving()

    async def talk() -> None:
        async with serving.delivering():
            with serving.client.submit([_generate("good", FOREVER_ID), _generate("bad", REFUSE_ID)]) as outputs:
                async for _ in outputs:
                    pass

    with pytest.raises(InvalidRequest, match="refuses"):
        asyncio.run(talk())
    assert serving.channel.sent[-1] == Abort("good")
    assert serving.client.num_in_flight == 0


@pytest.mark.parametrize(
    ("fields", "kind"), [({"timeout": 0.5}, RequestTimeout), ({"prompt": BROKEN_ID}, ModelFailure)]
)
def test_a_request_that_fails_later_raises_its_error_and_takes_its_siblings_along(
    make_serving, fields: dict[str, Any], kind: type[TandemError]
) -> None:
    serving: Serving = make_serving()
    prompt = [fields.pop("prompt", 5), 6]

    async def talk() -> None:
        async with serving.delivering():
            bad = Generate("bad", prompt, SamplingParams(max_tokens=9), **fields)
            with serving.client.submit([_generate("good", FOREVER_ID), bad]) as outputs:
                async for _ in outputs:
                    pass

    with pytest.raises(kind):
        asyncio.run(talk())
    assert [message for message in serving.channel.sent if isinstance(message, Abort)] == [Abort("good")]
    assert serving.client.num_in_flight == 0


def test_room_is_counted_in_requests_and_comes_back(make_serving) -> None:
    serving: Serving = make_serving(max_requests=2)

    async def talk() -> None:
        async with serving.delivering():
            with serving.client.submit([_generate("a", FOREVER_ID)]):
                with pytest.raises(QueueFull, match="--max-queue"):
                    serving.client.submit([_generate("b"), _generate("c")])
                serving.client.check_room(1)
                with pytest.raises(InvalidRequest, match="has 3 choices, the limit is 2"):
                    serving.client.check_room(3)
            serving.client.check_room(2)

    asyncio.run(talk())


def test_a_failure_ends_every_request_and_refuses_new_ones(make_serving) -> None:
    serving: Serving = make_serving()

    async def talk() -> None:
        async with serving.delivering():
            with serving.client.submit([_generate("a", FOREVER_ID)]) as outputs:
                await anext(outputs)
                serving.client.fail(EngineDead("gone"))
                with pytest.raises(EngineDead, match="gone"):
                    async for _ in outputs:
                        pass
            with pytest.raises(EngineDead, match="gone"):
                serving.client.submit([_generate("b")])

    asyncio.run(talk())


def test_a_command_is_awaited_however_long_it_takes_and_its_answer_is_its_own(make_serving) -> None:
    serving: Serving = make_serving()
    client = serving.client

    def report(*ids: str) -> StepReport:
        return StepReport([], [], client.stats, [Done(control_id, {"id": control_id}) for control_id in ids])

    async def talk() -> None:
        first, second, third = (asyncio.create_task(client.control(Resume(name))) for name in "abc")
        await asyncio.sleep(0)
        assert serving.channel.sent == [Resume("a"), Resume("b"), Resume("c")]
        third.cancel()
        client._deliver(report("b", "unknown"))
        assert (await second).values == {"id": "b"} and not first.done()
        client._deliver(report("a", "c"))
        assert (await first).values == {"id": "a"}
        assert client._commands == {}

    asyncio.run(talk())


def test_commands_fail_when_the_engine_dies_and_after(make_serving) -> None:
    client = make_serving().client

    async def talk() -> None:
        waiting = asyncio.create_task(client.control(Resume("a")))
        await asyncio.sleep(0)
        client.fail(EngineDead("gone"))
        for attempt in (waiting, client.control(Resume("b"))):
            with pytest.raises(EngineDead, match="gone"):
                await attempt

    asyncio.run(talk())


@pytest.mark.parametrize("command", [Resume("a"), RollBackUpdate("a"), RestoreMemory("a")])
def test_what_lets_requests_go_on_passes_until_the_engine_has_failed(make_serving, command: Control) -> None:
    client = make_serving().client

    async def talk() -> None:
        client.refuse(EngineDead("draining"))
        with pytest.raises(EngineDead, match="draining"):
            await client.control(Pause("b"))
        waiting = asyncio.create_task(client.control(command))
        await asyncio.sleep(0)
        client._deliver(StepReport([], [], client.stats, [Done("a")]))
        assert await waiting == Done("a")
        client.fail(EngineDead("gone"))
        client.refuse(EngineDead("draining"))
        with pytest.raises(EngineDead, match="gone"):
            await client.control(command)

    asyncio.run(talk())


def test_outputs_know_the_version_of_the_weights_that_made_them(make_serving) -> None:
    client = make_serving().client

    def report(version: str, *outputs: TokenOutput) -> StepReport:
        return StepReport([*outputs], [], dataclasses.replace(client.stats, weight_version=version))

    async def talk() -> list[tuple[str, list[int], str]]:
        client._deliver(report("1"))
        told = []
        with client.submit([_generate("a"), _generate("b")]) as outputs:
            assert outputs.weight_version == "1"
            client._deliver(report("1", TokenOutput("a", [5])))
            client._deliver(report("2"))
            client._deliver(report("3", TokenOutput("b", [6]), TokenOutput("a", [7], finish_reason="stop")))
            client._deliver(report("3", TokenOutput("b", [8], finish_reason="stop")))
            async for output in outputs:
                told.append((output.request_id, output.token_ids, outputs.weight_version))
        return told

    assert asyncio.run(talk()) == [("a", [5], "1"), ("b", [6], "3"), ("a", [7], "3"), ("b", [8], "3")]


def test_draining_refuses_new_requests_and_ends_when_the_last_one_has(make_serving) -> None:
    serving: Serving = make_serving()

    async def talk() -> int:
        async with serving.delivering():
            with serving.client.submit([_generate("a", max_tokens=50)]) as outputs:
                serving.client.refuse(EngineDead("draining"))
                with pytest.raises(EngineDead, match="draining"):
                    serving.client.check_room(1)
                idle = asyncio.create_task(serving.client.wait_idle())
                num_tokens = 0
                async for output in outputs:
                    assert not idle.done()
                    num_tokens += len(output.token_ids)
                await asyncio.wait_for(idle, 10)
                return num_tokens

    assert asyncio.run(talk()) == 50


def test_an_engine_that_generates_a_token_is_well(make_serving) -> None:
    serving: Serving = make_serving()

    async def probe() -> None:
        async with serving.delivering():
            await serving.client.check_generates(30.0)

    asyncio.run(probe())
    assert serving.client.num_in_flight == 0


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("num_output", [0, 3])
def test_without_a_token_in_time_it_is_well_if_others_got_theirs(make_serving, is_full: bool, num_output: int) -> None:
    serving: Serving = make_serving(max_requests=1 if is_full else 2)
    serving.channel.paused = True

    async def probe() -> None:
        with serving.client.submit([_generate("a", FOREVER_ID)]):
            probing = asyncio.create_task(serving.client.check_generates(0.02))
            await asyncio.sleep(0)
            serving.client.stats = dataclasses.replace(serving.client.stats, num_output_tokens=num_output)
            await probing

    if num_output:
        asyncio.run(probe())
    else:
        with pytest.raises(EngineDead, match=r"nothing in 0\.02 seconds"):
            asyncio.run(probe())
    assert serving.client.num_in_flight == 0


def test_an_engine_that_was_paused_meanwhile_is_well(make_serving) -> None:
    serving: Serving = make_serving()

    async def probe() -> None:
        probing = asyncio.create_task(serving.client.check_generates(0.02))
        await asyncio.sleep(0)
        assert serving.client.num_in_flight == 1
        serving.client.stats = dataclasses.replace(serving.client.stats, is_frozen=True)
        await probing

    asyncio.run(probe())


@pytest.mark.parametrize(
    ("failure", "message"),
    [(ModelFailure("not finite"), "cannot generate: not finite"), (RequestTimeout("late"), "nothing in 30 seconds")],
)
def test_a_token_that_cannot_be_had_is_a_dead_engine(make_serving, failure: TandemError, message: str) -> None:
    serving: Serving = make_serving()

    async def probe() -> None:
        probing = asyncio.create_task(serving.client.check_generates(30.0))
        await asyncio.sleep(0)
        (request,) = serving.channel.sent
        report = Failed(request.request_id, type(failure).__name__, failure.message)
        serving.client._deliver(StepReport([], [report], serving.client.stats))
        await probing

    with pytest.raises(EngineDead, match=message):
        asyncio.run(probe())
