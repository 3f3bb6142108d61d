"""Sessions on the weights of a real engine, by every kind of source."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.errors import WeightUpdateError
from models.training.publisher import Publisher
from models.weight_transfer.groups import Group, join
from models.weight_transfer.wire import DELTA, FULL
from server.backend.memory_release import ReleasedMemory
from server.backend.weight_sessions import Weights, WeightSession, as_tandem_error
from server.control import (
    AddTensors,
    BeginUpdate,
    CommitUpdate,
    JoinGroup,
    LeaveGroup,
    RollBackUpdate,
    TensorSpec,
    WeightSource,
)
from server.errors import Conflict, InvalidRequest, TandemError
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.sessions import checksum_of, describe, draw_tensors, load_store, make_store
from unit_tests.models.weight_transfer.publisher import publish
from unit_tests.server.commands import Client, client_norm, inline, update_from
from unit_tests.server.engines import make_engine


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return Weights(make_store(tmp_path), ReleasedMemory())


def session_of(weights: Weights) -> WeightSession:
    return WeightSession(weights, "16")


def bring(weights: Weights, source: WeightSource, begin: BeginUpdate | None = None) -> str | None:
    """A whole session."""
    session = session_of(weights)
    version = session.bring(source, begin or BeginUpdate("b"))
    session.commit()
    session.close()
    return version


def nudge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A few numbers are others."""
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in changed.values():
        tensor.view(-1)[::7] += 0.5
    return changed


@pytest.mark.parametrize("kind", ["directory", "file", "inline", "stream"])
def test_every_source_brings_the_same_weights(weights: Weights, tmp_path: Path, kind: str) -> None:
    new = draw_tensors(seed=1)
    path = make_checkpoint(tmp_path / "new", num_layers=4, seed=1)
    with publish(new) as publisher:
        sources = {
            "directory": WeightSource("disk", path=str(path)),
            "file": WeightSource("disk", path=str(path / "model.safetensors")),
            "inline": inline(new),
            "stream": WeightSource("stream", url=publisher.url, num_streams=3),
        }
        assert bring(weights, sources[kind]) == ("17" if kind == "stream" else None)
    assert weights.store.checksum() == checksum_of(new)


def test_a_stream_brings_a_delta_to_those_who_have_its_base(weights: Weights) -> None:
    old = draw_tensors(seed=0)
    new = nudge(old)
    with publish(new, old) as publisher:
        source = WeightSource("stream", url=publisher.url)
        assert bring(weights, source) == "17"
        assert publisher.orders[0]["base_version"] == "16" and publisher.orders[0]["strategies"] == [FULL, DELTA]
        assert weights.store.checksum() == checksum_of(new)
        with pytest.raises(InvalidRequest, match="made for version '16', but '17' serves: send full"):
            WeightSession(weights, "17").bring(source, BeginUpdate("b"))
        session = WeightSession(weights, "17")
        session.begin(BeginUpdate("b"))
        with pytest.raises(InvalidRequest, match="cannot come from 'stream', only from disk, inline or group"):
            session.add(source)
    assert weights.store.checksum() == checksum_of(new)


@pytest.mark.parametrize(("kind", "modes"), [("quantized", ["full"]), ("narrower", ["delta", "full"])])
def test_where_a_delta_cannot_be_taken_all_comes(tmp_path: Path, kind: str, modes: list[str]) -> None:
    old = draw_tensors(seed=0)
    new = nudge(old)
    quantization, dtype = ("int8", torch.float32) if kind == "quantized" else ("none", torch.bfloat16)
    checkpoint = make_checkpoint(tmp_path, num_layers=4)
    weights = Weights(load_store(checkpoint, dtype, quantization=quantization), ReleasedMemory())
    with Publisher(full_sync_interval=0) as publisher:
        publisher.publish(old, "16")
        publisher.publish(new, "17")
        source = WeightSource("stream", url=publisher.url)
        with pytest.raises(WeightUpdateError, match="send full"):
            bring(weights, WeightSource("stream", url=publisher.url, strategies=(DELTA,)))
        publisher.modes.clear()
        assert bring(weights, source) == "17"
        assert publisher.modes == modes
    norm = weights.store.export("model.norm.weight")
    assert norm.equal(new["model.norm.weight"].to(norm.dtype))


def test_a_trainer_without_a_head_updates_the_target_alone(weights: Weights) -> None:
    old, new = draw_tensors(seed=0), draw_tensors(seed=1)
    headless = {name: tensor for name, tensor in new.items() if not name.startswith("mtp.")}
    with publish(headless) as publisher:
        source = WeightSource("stream", url=publisher.url)
        with pytest.raises(WeightUpdateError, match="no mtp"):
            bring(weights, source, BeginUpdate("b", needs_mtp=True))
        assert bring(weights, source) == "17"
    assert weights.store.checksum() == checksum_of(old | headless)


def test_a_stream_must_give_the_weights_that_the_caller_wants(weights: Weights) -> None:
    new = draw_tensors(seed=1)
    with publish(new) as publisher:
        source = WeightSource("stream", url=publisher.url)
        with pytest.raises(WeightUpdateError, match="SHA-256"):
            bring(weights, source, BeginUpdate("b", result_sha256="0" * 64))
        bring(weights, source, BeginUpdate("b", result_sha256=checksum_of(new)))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_group_brings_what_rank_0_broadcasts(tmp_path: Path) -> None:
    client = Client(make_engine(make_checkpoint(tmp_path / "old", num_layers=4), mtp_step=1, dtype="float32"))
    new, port = draw_tensors(seed=1), free_port()

    def broadcast() -> None:
        group = join("127.0.0.1", port, 0, 2, "gloo", 30.0, "g")
        for tensor in new.values():
            group.send(tensor)
        group.leave()

    sender = threading.Thread(target=broadcast)
    sender.start()
    client.do(JoinGroup("join", "g", "127.0.0.1", port, 1, 2, "gloo"))
    assert client.refusal(JoinGroup("join", "g", "127.0.0.1", port, 1, 2, "gloo"))[0] == "Conflict"
    tensors = tuple(TensorSpec(spec.name, spec.dtype, spec.shape, spec.sha256) for spec in describe(new))
    client.do(BeginUpdate("begin", tensors=tensors, result_sha256=checksum_of(new)))
    client.do(AddTensors("add", WeightSource("group", group="g", tensors=tensors)))
    client.do(CommitUpdate("commit", "from the group"))
    sender.join(30)
    client.do(LeaveGroup("leave", "g"))
    assert client.fingerprint() == ("from the group", checksum_of(new))
    assert client.refusal(LeaveGroup("leave", "g"))[0] == "Conflict"


def meet(client: Client) -> Group:
    """Rank 0 of a group `g` that the engine has joined."""
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        trainer = pool.submit(join, "127.0.0.1", port, 0, 2, "gloo", 30.0, "g")
        client.do(JoinGroup("join", "g", "127.0.0.1", port, 1, 2, "gloo"))
        return trainer.result(30)


def test_an_update_that_is_rolled_back_takes_nothing_of_the_next_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(make_engine(make_checkpoint(tmp_path, num_layers=4), dtype="float32"))
    norm = client_norm(client).float()
    spec = TensorSpec("model.norm.weight", "float32", tuple(norm.shape))
    source, begin = WeightSource("group", group="g", tensors=(spec,)), BeginUpdate("begin", is_partial=True)
    first, waits, receive = meet(client), threading.Event(), Group.receive

    def note(group: Group, spec: TensorSpec) -> Tensor:
        waits.set()
        return receive(group, spec)

    monkeypatch.setattr(Group, "receive", note)
    client.do(begin)
    client.send(AddTensors("add", source))
    client.step()
    assert waits.wait(30)
    client.do(RollBackUpdate("back"))
    refused = client.await_done("add")
    assert refused.kind == "Conflict" and "the group g was left: join it again" in refused.error
    assert client.refusal(LeaveGroup("leave", "g"))[0] == "Conflict"
    second = meet(client)
    client.do(begin)
    client.send(AddTensors("add", source))
    client.step()
    second.send(norm * 2)
    assert not client.await_done("add").error
    client.do(CommitUpdate("commit"))
    assert client_norm(client).equal(norm * 2)
    for group in (first, second):
        group.leave()
    client.do(LeaveGroup("leave", "g"))


class FakeGroup:
    """Has zeros of every shape."""

    def __init__(self) -> None:
        self.num_received, self.has_left = 0, threading.Event()

    def receive(self, spec: TensorSpec) -> Tensor:
        """One more."""
        self.num_received += 1
        return torch.zeros(spec.shape)

    def leave(self) -> None:
        """Note it."""
        self.has_left.set()


def from_group(*names: str) -> WeightSource:
    """Vectors that `g` is to send."""
    return WeightSource("group", group="g", tensors=tuple(TensorSpec(name, "float32", (64,)) for name in names))


@pytest.mark.parametrize("at_once", [False, True])
def test_a_group_that_owes_something_to_an_update_that_failed_is_left(tmp_path: Path, at_once: bool) -> None:
    client = Client(make_engine(make_checkpoint(tmp_path, num_layers=4), dtype="float32"))
    group, source = FakeGroup(), from_group("model.norm.weight", "model.bad", "mtp.norm.weight")
    client.engine.controls._weights.groups["g"] = group  # type: ignore[assignment]
    if at_once:  # refused before the first comes
        refused = client.refusal(update_from(Path(), source=source, tensors=source.tensors, is_partial=True))
    else:
        client.do(BeginUpdate("begin", is_partial=True))
        refused = client.refusal(AddTensors("add", source))
    assert refused[0] == "InvalidRequest" and "model.bad" in refused[1]
    assert refused[1].endswith("; the group g was left: join it again")
    assert group.num_received == (0 if at_once else 2) and group.has_left.wait(30)
    assert client.refusal(LeaveGroup("leave", "g"))[0] == "Conflict"


def test_a_group_that_owes_nothing_stays(weights: Weights) -> None:
    group = FakeGroup()
    weights.groups["g"] = group  # type: ignore[assignment]
    session = session_of(weights)
    with pytest.raises(WeightUpdateError, match="the update lacks"):
        session.bring(from_group("model.norm.weight"), BeginUpdate("b"))
    session.close()
    assert weights.groups and not group.has_left.is_set() and not session.left_group
    with pytest.raises(Conflict, match=r"the group h has not been joined: join it first$"):
        session_of(weights).bring(WeightSource("group", group="h"), BeginUpdate("b"))


def test_a_session_that_was_closed_takes_nothing_more(weights: Weights) -> None:
    session = session_of(weights)
    with pytest.raises(Conflict, match="closed"):
        session.prepare()
    session.begin(BeginUpdate("b"))
    session.close()
    session.close()
    for call in (session.prepare, session.commit, lambda: session.add(inline(draw_tensors()))):
        with pytest.raises(Conflict, match="closed"):
            call()


def test_discarded_weights_need_a_whole_update_with_the_head(weights: Weights) -> None:
    weights.released.are_discarded = True
    with pytest.raises(Conflict, match="all of them"):
        session_of(weights).begin(BeginUpdate("b", is_partial=True))
    new = draw_tensors(seed=1)
    headless = {name: tensor for name, tensor in new.items() if not name.startswith("mtp.")}
    session = session_of(weights)
    session.begin(BeginUpdate("b"))
    session.add(inline(headless))
    with pytest.raises(WeightUpdateError, match="mtp"):
        session.prepare()
    assert weights.released.are_discarded
    bring(weights, inline(new))
    assert not weights.released.are_discarded


def test_weights_that_were_released_meanwhile_are_not_exchanged(weights: Weights) -> None:
    session = session_of(weights)
    session.begin(BeginUpdate("b"))
    session.add(inline(draw_tensors(seed=1)))
    session.prepare()
    weights.released.tags.add("weights")
    with pytest.raises(Conflict, match="released"):
        session.commit()


def test_weights_that_are_not_there_are_not_looked_at(weights: Weights) -> None:
    weights.released.tags.add("weights")
    for call in (weights.fill_randomly, lambda: weights.check("checksum"), lambda: weights.read("lm_head.weight", 1)):
        with pytest.raises(Conflict, match="released"):
            call()


def test_errors_of_all_kinds_are_told(tmp_path: Path) -> None:
    client = Client(make_engine(make_checkpoint(tmp_path, num_layers=4)))
    kind, error = client.refusal(update_from(tmp_path / "nowhere"))
    assert kind == "InvalidRequest" and "nowhere" in error
    kind, error = client.refusal(update_from(Path(), source=WeightSource("stream", url="http://127.0.0.1:1")))
    assert kind == "InvalidRequest" and "http://127.0.0.1:1 cannot be reached" in error
    told = as_tandem_error(KeyError("x"))
    assert type(told) is TandemError and told.message == "KeyError: 'x'"
    assert as_tandem_error(told) is told
