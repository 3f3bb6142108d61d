"""Sessions on the weights of a real engine, by every kind of source."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch import Tensor

from models.errors import WeightUpdateError
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
from unit_tests.models.sessions import checksum_of, describe, draw_tensors, make_store
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
        session.begin(BeginUpdate("b", is_delta=True, base_version="17"))
        with pytest.raises(InvalidRequest, match="'16'"):
            session.add(source)
    assert weights.store.checksum() == checksum_of(new)


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
