"""What pauses and weight sessions do to requests, and that whatever goes wrong leaves the old weights serving."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.weight_update import WeightUpdate
from server.control import (
    MEMORY_TAGS,
    AddTensors,
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    FlushCache,
    JoinGroup,
    LeaveGroup,
    ReadWeights,
    ReleaseMemory,
    RestoreMemory,
    RollBackUpdate,
    SetVersion,
    TensorSpec,
    WeightSource,
)
from server.messages import SamplingParams
from unit_tests.server.commands import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    WAIT_SECONDS,
    Client,
    client_norm,
    cold_tokens,
    inline,
    make_pair,
    pause,
    resume,
    serving,
    start,
    update_from,
)
from unit_tests.server.engines import assert_nothing_left, make_engine


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one shape."""
    return make_pair(tmp_path_factory.mktemp("weights"))


@pytest.fixture(params=[0, 3], ids=["plain", "speculative"])
def client(checkpoints: list[Path], request: pytest.FixtureRequest) -> Iterator[Client]:
    """Of an engine that serves the first checkpoint."""
    with serving(checkpoints[0], request.param) as client:
        yield client


# Pauses.


@pytest.mark.parametrize("mode", ["keep", "retract"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_pause_changes_nothing_but_the_time(
    client: Client, checkpoints: list[Path], mode: str, params: SamplingParams
) -> None:
    start(client, params)
    assert client.do(pause(mode)) == {"num_requests": 3}
    engine, so_far = client.engine, {name: list(tokens) for name, tokens in client.tokens.items()}
    assert engine.stats().is_paused and not engine.has_work()
    assert engine.stats().num_running == (3 if mode == "keep" else 0)
    client.add("late", [9, 8, 7])
    assert not engine.has_work() and engine.step() == [] and client.tokens == so_far | {"late": []}
    client.do(resume())
    client.finish()
    expected = cold_tokens(checkpoints[0], [*PROMPTS, [9, 8, 7]], [params, params, params, GREEDY])
    assert list(client.tokens.values()) == expected


def test_retracted_requests_hold_nothing(client: Client) -> None:
    start(client)
    scheduler = client.engine.scheduler
    num_cached = scheduler.cache.num_cached_pages
    client.do(pause("retract"))
    assert not scheduler.holdings and scheduler.rows.num_free == scheduler.rows.count
    assert scheduler.cache.num_cached_pages == num_cached  # of the prefill; what they held themselves is free
    assert scheduler.pages.num_free + num_cached + len(scheduler.cache._tiers.late_pages) == scheduler.pages.count
    client.do(resume())
    client.finish()


def test_abort_ends_every_request_with_what_it_has(client: Client) -> None:
    constrained = SamplingParams(temperature=0, max_tokens=5, bad_words=((3,),))
    start(client, SAMPLED)
    client.add("waiting", [5] * 20)
    client.add("compiling", [5, 6], constrained)
    so_far = {name: list(tokens) for name, tokens in client.tokens.items()}
    assert client.do(pause("abort"))["num_requests"] == 5
    assert client.ends == dict.fromkeys(client.tokens, "abort")
    for name, tokens in client.tokens.items():
        assert tokens[: len(so_far[name])] == so_far[name]
        assert sum(len(output.logprobs) for output in client.outputs[name]) == (len(tokens) if name in "012" else 0)
    assert not client.engine.has_work()
    client.do(resume())


def test_wait_lets_those_that_are_here_end_and_nobody_else_begin(client: Client, checkpoints: list[Path]) -> None:
    start(client)
    client.send(pause("wait"))
    client.step()
    client.add("late", [9, 8, 7], priority=-1)
    assert client.engine.stats().num_waiting == 1
    assert client.await_done().values == {"num_requests": 0}
    assert client.ends == dict.fromkeys("012", "length") and not client.tokens["late"]
    assert list(client.tokens.values())[:3] == cold_tokens(checkpoints[0], PROMPTS, GREEDY)
    client.do(resume())
    client.finish()
    assert client.ends["late"] == "length"


def test_a_second_pause_applies_its_own_mode(client: Client) -> None:
    start(client)
    client.do(pause("keep"))
    client.do(pause("keep"))
    assert client.engine.stats().num_running == 3
    assert client.refusal(pause("wait")) == (
        "Conflict",
        "3 requests cannot end in a paused engine: resume it, or use another mode",
    )
    client.do(pause("retract"))
    assert client.engine.stats().num_running == 0 and client.engine.stats().num_waiting == 3
    client.do(pause("abort"))
    assert set(client.ends.values()) == {"abort"}
    assert client.do(pause("wait")) == {"num_requests": 0}
    assert client.refusal(pause("stop"))[0] == "InvalidRequest"
    client.do(resume())
    client.do(resume())
    assert not client.engine.stats().is_paused


@pytest.mark.parametrize("command", [resume(), pause("keep")])
def test_a_pause_that_waits_is_overtaken(client: Client, command: Any) -> None:
    start(client)
    client.send(pause("wait"))
    client.step()
    client.send(command)
    client.step(2)
    done = {each.control_id: each.kind for each in client.done}
    assert done.pop(command.control_id) == "" and list(done.values()) == ["Conflict"]
    client.do(resume())
    client.add("late", [9, 8, 7])
    client.finish()
    assert set(client.ends.values()) == {"length"} and len(client.ends) == 4


def test_times_are_over_in_a_pause_too(checkpoints: list[Path]) -> None:
    engine = make_engine(checkpoints[0], mtp_step=1)
    now = [0.0]
    engine.scheduler.clock = lambda: now[0]
    client = Client(engine)
    client.add("begun", PROMPTS[0], timeout=5)
    client.step(3)
    client.do(pause("keep"))
    client.add("new", PROMPTS[1], timeout=7)
    assert not engine.has_work() and engine.patience < 1
    now[0] = 6.0
    assert engine.has_work()
    client.step()
    assert client.ends == {"begun": "abort"}
    now[0] = 8.0
    assert engine.has_work()
    (failed,) = engine.step()
    assert failed.request_id == "new" and failed.error == "RequestTimeout"  # type: ignore[union-attr]
    assert_nothing_left(engine)


# Sessions.


def test_a_session_step_by_step(client: Client, checkpoints: list[Path]) -> None:
    source = WeightSource("disk", path=str(checkpoints[1]))
    add, commit = AddTensors("add", source), CommitUpdate("commit", "three")
    for command in (add, commit, RollBackUpdate("back")):
        assert client.refusal(command) == ("Conflict", "no weight session is open: begin one first")
    client.do(BeginUpdate("begin"))
    for command in (BeginUpdate("again"), update_from(checkpoints[1])):
        assert client.refusal(command)[0] == "Conflict"
    client.do(add)
    before = client.fingerprint()
    client.do(RollBackUpdate("back"))
    assert client.fingerprint() == before
    client.do(BeginUpdate("begin"))
    client.do(add)
    client.do(commit)
    assert client.engine.stats().weight_version == "three"
    assert client.refusal(commit)[0] == "Conflict"


def test_commands_of_one_session_may_be_sent_at_once(client: Client, checkpoints: list[Path]) -> None:
    start(client)
    source = WeightSource("disk", path=str(checkpoints[1]))
    for command in (BeginUpdate("begin"), AddTensors("add", source), CommitUpdate("commit"), BeginUpdate("too soon")):
        client.send(command)
    client.step()
    (refused,) = client.done
    client.done.clear()
    assert refused.control_id == "too soon" and refused.kind == "Conflict"
    done = [client.await_done() for _ in range(3)]
    assert [(each.control_id, each.error) for each in done] == [("begin", ""), ("add", ""), ("commit", "")]
    client.finish()


def test_an_error_closes_the_session(client: Client, checkpoints: list[Path]) -> None:
    client.do(BeginUpdate("begin"))
    kind, message = client.refusal(AddTensors("add", inline({"model.nothing.weight": client_norm(client)})))
    assert kind == "InvalidRequest" and "model.nothing.weight" in message
    assert client.refusal(CommitUpdate("commit"))[0] == "Conflict"
    client.do(BeginUpdate("begin"))
    kind, message = client.refusal(CommitUpdate("commit"))
    assert kind == "InvalidRequest" and "lacks" in message
    client.do(update_from(checkpoints[1]))


def test_an_update_for_other_weights_is_refused(client: Client, checkpoints: list[Path]) -> None:
    before = client.fingerprint()
    for base, message in ((None, "needs the version"), ("2", "'2', but 'default' serves: send full")):
        kind, error = client.refusal(BeginUpdate("begin", is_delta=True, base_version=base))
        assert kind == "InvalidRequest" and message in error
    assert client.refusal(update_from(checkpoints[1], base_version="7"))[0] == "InvalidRequest"
    tensors = (TensorSpec("model.norm.weight", "float32", (3,)),)
    kind, error = client.refusal(BeginUpdate("begin", tensors=tensors, is_partial=True))
    assert kind == "InvalidRequest" and "model.norm.weight" in error
    assert client.refusal(update_from(checkpoints[1], in_flight="stop"))[0] == "InvalidRequest"
    kind, error = client.refusal(update_from(Path(), source=WeightSource("post")))
    assert kind == "InvalidRequest" and "'post'" in error
    assert client.fingerprint() == before
    client.do(BeginUpdate("begin", is_delta=True, base_version="default"))
    client.do(RollBackUpdate("back"))


def test_a_commit_that_waits_cannot_wait_in_a_pause(client: Client, checkpoints: list[Path]) -> None:
    start(client)
    client.do(pause("keep"))
    kind, message = client.refusal(update_from(checkpoints[1], in_flight="wait"))
    assert kind == "Conflict" and "3 requests" in message
    client.do(update_from(checkpoints[1]))
    client.do(update_from(checkpoints[0]))
    assert client.engine.stats().is_paused and client.engine.stats().num_running == 3
    client.do(resume())
    client.finish()


# Other commands.


def test_weights_are_looked_at_and_named(client: Client, checkpoints: list[Path]) -> None:
    read = client.do(ReadWeights("read", "model.norm.weight", 5))
    assert read == {"values": client_norm(client)[:5].tolist(), "dtype": "float32", "shape": [64]}
    kind, error = client.refusal(ReadWeights("read", "no.weight"))
    assert kind == "InvalidRequest" and "no.weight" in error
    assert client.refusal(CheckWeights("check", "compare"))[0] == "Conflict"
    snapshot = client.do(CheckWeights("check", "snapshot"))
    assert len(snapshot["checksums"]) > 20 and len(snapshot["checksum"]) == 64
    assert client.do(CheckWeights("check", "compare")) == {"different": []}
    start(client)
    client.do(SetVersion("name", "step 5"))
    assert client.engine.stats().weight_version == client.engine.stats().mtp_weight_version == "step 5"
    client.do(CheckWeights("check", "reset"))
    client.finish()
    assert len(client.do(CheckWeights("check", "compare"))["different"]) > 20
    client.do(update_from(checkpoints[0]))
    assert client.do(CheckWeights("check", "compare")) == {"different": []}


def test_the_cache_is_flushed_when_nobody_needs_it(client: Client) -> None:
    start(client)
    assert client.refusal(FlushCache("flush"))[0] == "Conflict"
    client.do(pause("keep"))
    assert client.refusal(FlushCache("flush"))[0] == "Conflict"
    client.do(resume())
    client.do(FlushCache("flush", timeout=WAIT_SECONDS))
    assert set(client.ends.values()) == {"length"} and client.engine.stats().num_cached_pages == 0
    client.ends.clear()
    start(client)
    client.do(pause("retract"))
    client.do(FlushCache("flush"))
    client.do(resume())
    client.finish()


def test_memory_is_given_back_and_taken_again(client: Client, checkpoints: list[Path]) -> None:
    start(client)
    assert client.refusal(ReleaseMemory("release"))[0] == "Conflict"
    client.do(pause("abort"))
    client.do(resume())
    assert client.do(ReleaseMemory("release"))["num_bytes"] > 0
    stats = client.engine.stats()
    assert (stats.is_frozen, stats.is_paused, stats.released_tags) == (True, False, tuple(sorted(MEMORY_TAGS)))
    client.add("late", PROMPTS[0])
    assert not client.engine.has_work() and client.engine.step() == []
    for command in (update_from(checkpoints[1]), ReadWeights("read", "model.norm.weight"), CheckWeights("check")):
        assert client.refusal(command)[0] == "Conflict"
    client.do(RestoreMemory("restore"))
    stats = client.engine.stats()
    assert (stats.is_frozen, stats.released_tags) == (False, ())
    client.finish()
    assert [client.tokens["late"]] == cold_tokens(checkpoints[0], PROMPTS[:1], GREEDY)
    client.do(BeginUpdate("begin"))
    assert client.refusal(ReleaseMemory("release"))[0] == "Conflict"
    client.do(RollBackUpdate("back"))


def test_memory_comes_back_when_nothing_works_beside_the_steps(
    client: Client, checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, add = threading.Event(), WeightUpdate.add

    def hang(update: WeightUpdate, name: str, tensor: Any) -> None:
        may_go_on.wait(WAIT_SECONDS)
        add(update, name, tensor)

    client.do(ReleaseMemory("release", ("kv_cache",)))
    client.do(BeginUpdate("begin"))
    with monkeypatch.context() as patch:
        patch.setattr(WeightUpdate, "add", hang)
        client.send(AddTensors("add", WeightSource("disk", path=str(checkpoints[1]))))
        client.step()
        client.send(RestoreMemory("restore"))
        client.step()
        assert not client.done and client.engine.stats().released_tags == ("kv_cache",)
        may_go_on.set()
        assert not client.await_done("add").error
    assert client.await_done("restore").values["num_bytes"] > 0
    client.do(CommitUpdate("commit"))


def test_discarded_weights_must_come_again_before_anything_runs(client: Client, checkpoints: list[Path]) -> None:
    client.do(ReleaseMemory("release", ("weights",), discards_weights=True))
    client.add("late", PROMPTS[0])
    client.do(RestoreMemory("restore", ("weights",)))
    assert not client.engine.has_work() and client.engine.stats().is_frozen
    partial = update_from(checkpoints[1], is_partial=True)
    assert client.refusal(partial)[0] == "Conflict"
    client.do(update_from(checkpoints[1]))
    client.finish()
    assert [client.tokens["late"]] == cold_tokens(checkpoints[1], PROMPTS[:1], GREEDY)


def test_a_group_that_does_not_come_together_can_be_left(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    has_come = threading.Event()
    monkeypatch.setattr("models.weight_transfer.groups.join", lambda *_: has_come.wait(WAIT_SECONDS))
    client.send(JoinGroup("join", "g", "127.0.0.1", 1, 1, 2, "gloo"))
    client.send(LeaveGroup("leave", "g"))
    client.step(2)
    done = {each.control_id: (each.kind, each.error) for each in client.done}
    assert done == {
        "leave": ("", ""),
        "join": ("Conflict", "the group g was left before all its members had come"),
    }
    client.done.clear()
    assert client.do(CheckWeights("check"))["checksum"]  # nothing waits for the group any more
    has_come.set()
    assert client.refusal(LeaveGroup("leave", "g"))[0] == "Conflict"


def test_groups_that_are_not_there(client: Client) -> None:
    assert client.refusal(LeaveGroup("leave", "g"))[0] == "Conflict"
    kind, error = client.refusal(JoinGroup("join", "g", "127.0.0.1", 1, 5, 2, "gloo"))
    assert kind == "InvalidRequest" and "rank" in error
    client.do(BeginUpdate("begin"))
    assert client.refusal(AddTensors("add", WeightSource("group", group="g")))[0] == "Conflict"
