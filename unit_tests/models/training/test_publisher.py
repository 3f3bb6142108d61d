"""The publisher over real sockets, with the receiver that servers have: what arrives, and when it is a delta."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from safetensors.torch import load_file

from models.errors import WeightUpdateError
from models.training.mtp_settings import TrainingError
from models.training.publisher import KEPT_SECONDS, SHARED_MEMORY, Publisher
from models.weight_transfer.receiver import fetch, receive
from models.weight_update import combine_checksums, hash_tensor
from models.weights import normalise_name
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models import sessions

TIMEOUT = 20.0


class Receiver:
    """A server's weights: takes whole tensors and deltas as an update would."""

    def __init__(self):
        self.tensors: dict[str, torch.Tensor] = {}
        self.version: str | None = None
        self.lock = threading.Lock()

    def skips(self, name):
        return False

    def add(self, name, tensor):
        with self.lock:
            self.tensors[name] = tensor.clone()

    def add_delta(self, name, indices, values):
        with self.lock:
            self.tensors[name] = self.tensors[name].clone()
            self.tensors[name].view(-1)[indices.long()] = values

    def pull(self, publisher, num_streams=3, strategies=("full", "delta")):
        """The transfer that was made; the weights are then those that it promised."""
        transfer = fetch(publisher.url, self.version, num_streams, TIMEOUT, strategies)
        receive(transfer, publisher.url, TIMEOUT, self)
        for place in transfer.tensors:
            assert hash_tensor(self.tensors[place.spec.name]) == place.spec.sha256
        checksums = {name: hash_tensor(tensor) for name, tensor in self.tensors.items()}
        assert combine_checksums(checksums) == transfer.result_sha256 == publisher.version.result_sha256
        self.version = transfer.version
        return transfer


@pytest.fixture
def publisher():
    with Publisher() as one:
        yield one


def draw(seed=0, dtype=torch.bfloat16, size=3000):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (size, 7), "mtp.b": (size,), "c": (5, 1, 3)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def change(tensors, share, seed=1):
    """The tensors with about that share of their numbers changed; "c" stays."""
    generator = torch.Generator().manual_seed(seed)
    out = dict(tensors)
    for name in ("a", "mtp.b"):
        is_changed = torch.rand(tensors[name].shape, generator=generator) < share
        out[name] = torch.where(is_changed, tensors[name] + 1, tensors[name])
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_streams", [1, 3, 64])
def test_whole_weights_and_then_a_delta_arrive_bit_for_bit(publisher, dtype, num_streams):
    receiver, first = Receiver(), draw(dtype=dtype)
    publisher.publish(first)
    assert receiver.pull(publisher, num_streams).mode == "full"
    second = change(first, 0.02)
    publisher.publish(second)
    transfer = receiver.pull(publisher, num_streams)
    assert (transfer.mode, transfer.base_version, transfer.version) == ("delta", "0", "1")
    assert [place.spec.name for place in transfer.tensors if place.num_changed] == ["a", "mtp.b"]
    assert transfer.num_bytes < 0.1 * publisher.version.num_bytes
    assert all(torch.equal(receiver.tensors[name], second[name]) for name in second)


def test_full_and_delta_take_turns_as_the_interval_says():
    """Thirty versions; the base is right each time."""
    with Publisher(full_sync_interval=10) as publisher:
        receiver, tensors = Receiver(), draw(size=50)
        for step in range(31):
            tensors = change(tensors, 0.05, seed=step)
            publisher.publish(tensors)
            receiver.pull(publisher)
        assert publisher.modes == ["full" if step % 10 == 0 else "delta" for step in range(31)]


@pytest.mark.parametrize(("interval", "modes"), [(0, ["full"] + 3 * ["delta"]), (1, 4 * ["full"])])
def test_the_interval_may_force_none_or_all(interval, modes):
    with Publisher(full_sync_interval=interval) as publisher:
        receiver, tensors = Receiver(), draw(size=50)
        for step in range(4):
            tensors = change(tensors, 0.05, seed=step)
            publisher.publish(tensors)
            receiver.pull(publisher)
        assert publisher.modes == modes


def test_a_receiver_that_missed_a_version_gets_all(publisher):
    receiver, tensors = Receiver(), draw()
    publisher.publish(tensors)
    receiver.pull(publisher)
    for seed in (1, 2):
        tensors = change(tensors, 0.01, seed)
        publisher.publish(tensors)
    assert receiver.pull(publisher).mode == "full"
    assert receiver.pull(publisher).mode == "full"  # it has this version, not the one before


def test_a_version_that_changes_much_travels_whole(publisher):
    receiver, tensors = Receiver(), draw()
    publisher.publish(tensors)
    receiver.pull(publisher)
    # A changed number of 2 bytes takes 6: half of the bytes are a sixth of the numbers.
    for share, mode in ((0.15, "delta"), (0.19, "full")):
        tensors = change(tensors, share)
        publisher.publish(tensors)
        assert receiver.pull(publisher).mode == mode


def test_other_tensors_than_before_travel_whole(publisher):
    receiver, tensors = Receiver(), draw()
    publisher.publish(tensors)
    receiver.pull(publisher)
    publisher.publish({**tensors, "d": torch.ones(2)})
    assert receiver.pull(publisher).mode == "full"


def test_weights_that_did_not_change_are_a_delta_of_nothing(publisher):
    receiver, tensors = Receiver(), draw()
    for _ in range(2):
        publisher.publish(tensors)
        transfer = receiver.pull(publisher)
    assert (transfer.mode, transfer.num_bytes) == ("delta", 0)


def test_either_side_may_want_full_only(publisher):
    tensors = draw()
    with Publisher(strategies=("full",)) as full_only:
        for one, strategies in ((publisher, ("full",)), (full_only, ("full", "delta"))):
            receiver = Receiver()
            for seed in (1, 2):
                one.publish(change(tensors, 0.01, seed))
                assert receiver.pull(one, strategies=strategies).mode == "full"


def test_a_delta_that_cannot_be_is_refused_with_the_reason(publisher):
    with pytest.raises(WeightUpdateError, match=r"409.*nothing is published yet"):
        fetch(publisher.url, None, 1, TIMEOUT)
    publisher.publish(draw())
    with pytest.raises(
        WeightUpdateError, match="version 0 cannot be sent as delta to a receiver of version x: take full"
    ):
        fetch(publisher.url, "x", 1, TIMEOUT, ("delta",))


def test_negative_zeros_and_nans_are_changes_of_bits(publisher):
    receiver, tensors = Receiver(), draw(dtype=torch.float32)
    tensors["a"][0, :2] = torch.tensor([0.0, float("nan")])
    publisher.publish(tensors)
    receiver.pull(publisher)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["a"][0, 0] = -0.0
    publisher.publish(tensors)
    transfer = receiver.pull(publisher)
    assert [place.num_changed for place in transfer.tensors] == [1, 0, 0]


def test_training_may_go_on_with_tensors_that_are_published(publisher):
    receiver, tensors = Receiver(), draw()
    publisher.publish(tensors)
    expected = tensors["a"].clone()
    tensors["a"].zero_()
    receiver.pull(publisher)
    assert torch.equal(receiver.tensors["a"], expected)


def test_a_transfer_that_was_ordered_is_of_its_own_version(publisher):
    first = draw()
    publisher.publish(first)
    transfer = fetch(publisher.url, None, 2, TIMEOUT)
    publisher.publish(change(first, 0.5))
    receiver = Receiver()
    receive(transfer, publisher.url, TIMEOUT, receiver)
    assert all(torch.equal(receiver.tensors[name], first[name]) for name in first)


def test_several_servers_may_pull_at_once(publisher):
    tensors = draw()
    publisher.publish(tensors)
    receivers = [Receiver() for _ in range(4)]
    threads = [threading.Thread(target=receiver.pull, args=(publisher,)) for receiver in receivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert all(torch.equal(receiver.tensors["a"], tensors["a"]) for receiver in receivers)


def test_transfers_that_were_read_are_forgotten(publisher):
    publisher.publish(draw())
    transfer = fetch(publisher.url, None, 2, TIMEOUT)
    receive(transfer, publisher.url, TIMEOUT, Receiver())
    deadline = time.monotonic() + TIMEOUT
    while publisher.find_order(transfer.transfer_id) is not None and time.monotonic() < deadline:
        threading.Event().wait(0.01)  # the last stream's thread is just about to
    assert publisher.find_order(transfer.transfer_id) is None


def test_transfers_that_no_one_comes_for_are_forgotten_after_a_while(publisher):
    publisher.publish(draw())
    unread = [fetch(publisher.url, None, 1, TIMEOUT) for _ in range(70)]
    for one in unread[:3]:
        publisher.find_order(one.transfer_id).used -= KEPT_SECONDS
    assert publisher.find_order(unread[2].transfer_id) is not None  # someone comes
    publisher.order(None, ("full",), 1)
    found = [publisher.find_order(one.transfer_id) is not None for one in unread]
    assert found == [False] * 2 + [True] * 68
    with pytest.raises(WeightUpdateError, match="stream 0"):
        receive(unread[0], publisher.url, TIMEOUT, Receiver())


@pytest.mark.parametrize("line", ["GET / HTTP/1.1\n", "TANDEM/1 {id} 9\n", "TANDEM/1 nothing 0\n", 600 * "x"])
def test_a_stranger_on_a_data_connection_gets_nothing(publisher, line):
    publisher.publish(draw())
    transfer = fetch(publisher.url, None, 1, TIMEOUT)
    with socket.create_connection(("127.0.0.1", transfer.port), TIMEOUT) as connection:
        connection.sendall(line.format(id=transfer.transfer_id).encode())
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection) == b""
    receive(transfer, publisher.url, TIMEOUT, Receiver())


def read_to_end(connection):
    found = b""
    try:
        while part := connection.recv(4096):
            found += part
    except ConnectionResetError:  # what it had not read was dropped
        pass
    return found


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/transfer", b"{", 409, "the order is not readable"),
        ("/transfer", b"[]", 409, "the order is not readable"),
        ("/transfer", b'{"strategies": ["full"]}', 409, "num_streams"),
        ("/transfer", b'{"strategies": ["full"], "num_streams": 65}', 409, "num_streams is 65, 1 to 64 are served"),
        ("/transfer", b'{"strategies": [], "num_streams": 1}', 409, "a list of full and delta is needed"),
        ("/other", b"{}", 404, "/other is not served"),
    ],
)
def test_a_wrong_order_is_refused(publisher, path, body, status, message):
    publisher.publish(draw())
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(publisher.url + path, body, TIMEOUT)
    assert caught.value.code == status
    assert message in json.loads(caught.value.read())["error"]


def test_it_tells_which_version_there_is(publisher):
    tensors = draw()
    publisher.publish(tensors, "first")
    publisher.publish(change(tensors, 0.01))
    with urllib.request.urlopen(publisher.url + "/version", timeout=TIMEOUT) as response:
        told = json.loads(response.read())
    assert told == {"version": "1", "base_version": "first", "strategies": ["full", "delta"]}


def test_the_same_weights_go_to_disk_and_to_shared_memory(publisher, tmp_path):
    tensors = draw()
    publisher.publish(tensors)
    assert publisher.save(tmp_path / "out") == tmp_path / "out"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors"}
    shared = publisher.share()
    assert shared.parent == SHARED_MEMORY
    for folder in (tmp_path / "out", shared):
        stored = load_file(folder / "model.safetensors")
        assert all(torch.equal(stored[name], tensors[name]) for name in tensors)
    newer = publisher.share()
    assert newer.exists()
    assert not shared.exists()
    publisher.close()
    assert not newer.exists()


def test_a_group_gets_every_tensor_in_order(publisher):
    sent = []

    class Group:
        def send(self, tensor):
            sent.append(tensor)

    tensors = draw()
    publisher.publish(tensors)
    publisher.broadcast(Group())
    assert all(torch.equal(one, other) for one, other in zip(sent, tensors.values(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategies": ("full", "xor")}, "strategy 'xor' is unknown"),
        ({"strategies": ("delta",)}, "the strategies lack full"),
        ({"full_sync_interval": -1}, "full_sync_interval is -1"),
        ({"host": "203.0.113.7"}, "cannot listen at 203.0.113.7:0"),
    ],
)
def test_what_cannot_be_served_is_refused(options, message):
    with pytest.raises(TrainingError, match=message):
        Publisher(**options)


def test_a_name_may_not_come_twice_in_a_row(publisher):
    with pytest.raises(TrainingError, match="no tensors"):
        publisher.publish({})
    publisher.publish(draw(), "x")
    with pytest.raises(TrainingError, match="version 'x' is published already"):
        publisher.publish(draw(), "x")


def test_a_name_may_have_blanks(publisher):
    publisher.publish(draw(), "step 1, run 2")
    assert Receiver().pull(publisher).version == "step 1, run 2"


def serve(store, publisher, base):
    """A server's session: (mode, what it changed)."""
    transfer = fetch(publisher.url, base, 2, TIMEOUT)
    session = store.begin(
        tensors=[place.spec for place in transfer.tensors],
        is_delta=transfer.mode == "delta",
        needs_mtp=True,
        result_sha256=transfer.result_sha256,
    )
    receive(transfer, publisher.url, TIMEOUT, session)
    session.prepare()
    report = session.commit()
    session.close()
    return transfer.mode, report


SPELLINGS = {
    "text": {},
    "vl": {"prefix": "vl", "vision": True},
    "language_model": {"prefix": "language_model.model"},
    "fused": {"moe": True},
    "one by one": {"moe": True, "expert_layout": "per_expert", "prefix": "vl"},
}


@pytest.mark.parametrize("mtp", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_servers_take_every_spelling_whole_and_as_a_delta_of_one_tensor(spelling, mtp, publisher, tmp_path):
    options = {"num_layers": 4, "dtype": "bfloat16", **SPELLINGS[spelling]}
    store = sessions.load_store(make_checkpoint(tmp_path, **options), torch.bfloat16, mtp)
    first = load_file(make_checkpoint(tmp_path / "new", seed=1, **options) / "model.safetensors")
    first["lm_head.weight"] = torch.ones(320, 64, dtype=torch.bfloat16)  # tied there: not looked at
    [name, *_] = [name for name in first if "layers.1.mlp." in name and "down_proj" in name]
    second = first | {name: sessions.change(first[name], 0.02)}
    for base, tensors, mode in ((None, first, "full"), ("0", second, "delta")):
        publisher.publish(tensors)
        found, report = serve(store, publisher, base)
        assert found == mode
        assert report.touched_target
        assert report.touched_draft == mtp
        served = [one for one in tensors if "visual" not in one and "lm_head" not in one]
        served = [one for one in served if mtp or not normalise_name(one).startswith("mtp.")]
        assert all(torch.equal(store.export(one), tensors[one]) for one in served)
