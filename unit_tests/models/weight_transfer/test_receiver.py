"""Pulling weights over real sockets: whole or as a delta, over one or many streams; whatever goes wrong is told."""

import itertools
import random
import socket
import threading

import pytest
import torch

from models.errors import WeightUpdateError
from models.weight_transfer import receiver
from models.weight_transfer.receiver import fetch, receive
from models.weight_transfer.wire import write_end, write_frame
from models.weight_update import WeightUpdate
from unit_tests.models.sessions import change, checksum_of, draw_tensors, make_store
from unit_tests.models.weight_transfer.publisher import FRAME_BYTES, publish, send_share

TIMEOUT = 20.0


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A store that tests leave as it is."""
    return make_store(tmp_path_factory.mktemp("served"), dtype="bfloat16")


def pull(store, url, num_streams=2, timeout=TIMEOUT, commits=False):
    """A whole session; unless it commits nothing changes."""
    transfer = fetch(url, "16", num_streams, timeout)
    session = store.begin(
        tensors=[place.spec for place in transfer.tensors],
        is_delta=transfer.mode == "delta",
        result_sha256=transfer.result_sha256,
    )
    receive(transfer, url, timeout, session)
    session.prepare()
    if commits:
        session.commit()
    session.close()
    return transfer


def refusal(store, **settings) -> str:
    before = store.checksum()
    timeout, num_streams = settings.pop("timeout", TIMEOUT), settings.pop("num_streams", 2)
    with publish(draw_tensors(dtype="bfloat16"), **settings) as publisher:
        with pytest.raises(WeightUpdateError) as caught:
            pull(store, publisher.url, num_streams, timeout)
        assert store.checksum() == before and "\n" not in str(caught.value)
        return str(caught.value)


@pytest.mark.parametrize("num_streams", [1, 2, 6])
def test_full_weights_come_over_many_streams(num_streams, tmp_path):
    store, tensors = make_store(tmp_path, dtype="bfloat16"), draw_tensors(dtype="bfloat16")
    with publish(tensors) as publisher:
        transfer = pull(store, publisher.url, num_streams, commits=True)
    assert store.checksum() == checksum_of(tensors)
    assert publisher.answers == [b"\x06"] * num_streams and transfer.version == "17"
    assert sorted(publisher.handshakes) == [f"TANDEM/1 17-1 {stream}\n".encode() for stream in range(num_streams)]
    [order] = publisher.orders
    assert order == {
        "path": "/transfer",
        "base_version": "16",
        "strategies": ["full", "delta"],
        "num_streams": num_streams,
    }


@pytest.mark.parametrize("share", [0, 0.02, 1])
@pytest.mark.parametrize("num_streams", [2, 6])
def test_deltas_come_over_many_streams(num_streams, share, tmp_path):
    store = make_store(tmp_path, moe=True, dtype="bfloat16")
    old = {name: store.export(name) for name in store.checksums()}
    new = {name: change(tensor, share, seed) for seed, (name, tensor) in enumerate(old.items())}
    with publish(new, old) as publisher:
        assert pull(store, publisher.url, num_streams, commits=True).mode == "delta"
    assert store.checksum() == checksum_of(new)
    assert publisher.answers == [b"\x06"] * num_streams


def test_frames_may_come_in_any_order_and_size(served):
    def send(connection, payload, stream, num_streams):
        places = sorted({0, len(payload), *random.Random(5).sample(range(len(payload)), 300)})
        pieces = list(itertools.pairwise(places))[stream::num_streams]
        random.Random(stream).shuffle(pieces)
        for start, end in pieces:
            write_frame(connection, start, payload[start:end])
        write_end(connection)

    with publish(draw_tensors(dtype="bfloat16"), send=send) as publisher:
        pull(served, publisher.url, 3)
    assert publisher.answers == [b"\x06"] * 3


def test_data_come_from_the_host_that_was_named_whatever_it_says(served):
    def point_elsewhere(offer, payload):
        return offer | {"host": "127.0.0.256"}, payload

    with publish(draw_tensors(dtype="bfloat16"), change=point_elsewhere) as publisher:
        pull(served, f"{publisher.url}/")
    assert publisher.answers == [b"\x06"] * 2


def test_a_publisher_cannot_send_one_elsewhere():
    answer = b"HTTP/1.1 302 Found\r\nlocation: %s/transfer\r\ncontent-length: 0\r\n\r\n"
    with publish({}) as other, socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=say_once, args=(server, answer % other.url.encode()))
        thread.start()
        with pytest.raises(WeightUpdateError, match=r"refuses \(302\): Found"):
            fetch(f"http://127.0.0.1:{server.getsockname()[1]}", None)
        thread.join()


def test_a_long_answer_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(receiver, "_MAX_REPLY_BYTES", 100)
    with (
        publish(draw_tensors(dtype="bfloat16")) as publisher,
        pytest.raises(WeightUpdateError, match="answers with more than 100 bytes: offer fewer tensors"),
    ):
        fetch(publisher.url, None)


def test_tensors_that_are_not_looked_at_take_no_memory(served, monkeypatch, caplog):
    came, add = {}, WeightUpdate.add

    def note(session, name, tensor):
        came[name] = tensor.nbytes
        add(session, name, tensor)

    monkeypatch.setattr(WeightUpdate, "add", note)
    monkeypatch.setattr(receiver, "_SCRATCH_BYTES", 700)
    caplog.set_level("INFO", logger="models")
    tensors = {"model.visual.x": torch.ones(9000)} | draw_tensors(dtype="bfloat16")
    with publish(tensors) as publisher:
        pull(served, publisher.url)
    assert came == {name: tensor.nbytes for name, tensor in tensors.items()} | {"model.visual.x": 0}
    assert "skipped 1 vision tensors" in caplog.text


@pytest.mark.parametrize("seed", range(6))
def test_a_bit_that_flips_on_the_way_is_found_out(seed, served):
    def flip(offer, payload):
        place = random.Random(seed).randrange(len(payload) * 8)
        spoiled = bytearray(payload)
        spoiled[place // 8] ^= 1 << place % 8
        return offer, bytes(spoiled)

    assert "has SHA-256" in refusal(served, change=flip)


@pytest.mark.parametrize("seed", range(8))
def test_a_bit_that_flips_in_a_delta_is_found_out(seed, served):
    old = {name: served.export(name) for name in served.checksums()}
    new = {name: change(tensor, 0.02, seed) for name, tensor in old.items()}

    def flip(offer, payload):
        place = random.Random(seed).randrange(len(payload) * 8)
        spoiled = bytearray(payload)
        spoiled[place // 8] ^= 1 << place % 8
        return offer, bytes(spoiled)

    with publish(new, old, change=flip) as publisher, pytest.raises(WeightUpdateError) as caught:
        pull(served, publisher.url)
    assert any(words in str(caught.value) for words in ("has SHA-256", "indices from", "behind"))


def cut_off(length):
    """Send so many bytes of the stream, whatever they are, and go."""

    def send(connection, payload, stream, num_streams):
        left, right = socket.socketpair()
        with left, right:
            thread = threading.Thread(target=send_share, args=(left, payload[: 3 * FRAME_BYTES], stream, num_streams))
            thread.start()
            remaining = length
            while remaining:
                data = right.recv(remaining)
                connection.sendall(data)
                remaining -= len(data)
            right.recv(1 << 20)
            thread.join()

    return send


@pytest.mark.parametrize("length", [0, 7, 16, 17, FRAME_BYTES + 15, FRAME_BYTES + 16])
def test_a_stream_that_ends_early_is_told(length, served):
    said = refusal(served, send=cut_off(length))
    assert "http://127.0.0.1" in said and "in the middle: send all of it" in said


def test_bytes_that_no_stream_brings_are_told(served):
    def send(connection, payload, stream, num_streams):
        send_share(connection, payload[:-10], stream, num_streams)

    said = refusal(served, send=send)
    assert "of 4" in said or " bytes: " in said
    assert "mtp" in said and "are not complete" in said


def test_bytes_that_come_twice_are_told(served):
    def send(connection, payload, stream, num_streams):
        send_share(connection, payload, 0, num_streams)

    assert "came twice: send each once" in refusal(served, send=send)


@pytest.mark.parametrize("first", [FRAME_BYTES - 1, 1])
def test_frames_that_overlap_are_told(first, served):
    def send(connection, payload, stream, num_streams):
        write_frame(connection, FRAME_BYTES, payload[:FRAME_BYTES])
        write_frame(connection, first, payload[:FRAME_BYTES])
        write_end(connection)

    assert "came twice" in refusal(served, send=send, num_streams=1)


def test_bytes_behind_the_end_are_told(served):
    def send(connection, payload, stream, num_streams):
        write_frame(connection, len(payload) - 1, b"xx")
        write_end(connection)

    assert "of a transfer with" in refusal(served, send=send)
    huge = [2**64 - 1, 2**63]

    def send_huge(connection, payload, stream, num_streams):
        write_frame(connection, huge[stream], b"x")
        write_end(connection)

    assert "of a transfer with" in refusal(served, send=send_huge)


def wait_for_end(connection):
    """Block until the receiver is gone."""
    while connection.recv(1):
        pass


def test_silence_is_told(served):
    def send(connection, payload, stream, num_streams):
        if stream:
            wait_for_end(connection)
        send_share(connection, payload, stream, num_streams)

    assert "sent nothing in stream 1 for 0.2 s" in refusal(served, send=send, timeout=0.2)


def test_one_stream_that_fails_ends_the_others(served):
    def send(connection, payload, stream, num_streams):
        if stream:
            wait_for_end(connection)

    assert "ended stream 0 in the middle" in refusal(served, send=send, timeout=15)


def test_a_transfer_of_wrong_tensors_is_refused_before_a_stream_is_opened(served):
    def shrink(offer, payload):
        offer["tensors"][0]["shape"] = [64, 320]
        return offer, payload

    with publish(draw_tensors(dtype="bfloat16"), change=shrink) as publisher:
        with pytest.raises(WeightUpdateError, match=r"has shape \[64, 320\]"):
            pull(served, publisher.url)
        assert not publisher.handshakes


def test_a_publisher_that_refuses_is_quoted(served):
    with publish({}, status=409) as publisher:
        with pytest.raises(WeightUpdateError, match=r"http://.* refuses \(409\): version 3 is gone: take full"):
            fetch(publisher.url, "3", 2, TIMEOUT, ("delta",))
        assert publisher.orders[0]["strategies"] == ["delta"]


def test_no_publisher_is_told(served):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(WeightUpdateError, match=f"publisher http://127.0.0.1:{port} cannot be reached: .*refused"):
        fetch(f"http://127.0.0.1:{port}", None)
    for url in ("file:///etc/passwd", "127.0.0.1:80", ""):
        with pytest.raises(WeightUpdateError, match="is no address of a publisher: it begins with http://"):
            fetch(url, None)


def test_no_data_port_is_told(served):
    def move(offer, payload):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            return offer | {"port": closed.getsockname()[1]}, payload

    assert "cannot be reached" in refusal(served, change=move)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"tensors": 3}'])
def test_an_answer_that_is_no_offer_is_told(content):
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer_once, args=(server, content))
        thread.start()
        with pytest.raises(WeightUpdateError, match=r"http://127\.0\.0\.1:\d+ answers what is no"):
            fetch(f"http://127.0.0.1:{server.getsockname()[1]}", None)
        thread.join()


def answer_once(server, content):
    say_once(server, b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(content) + content)


def say_once(server, answer):
    connection, _ = server.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(answer)


def test_silence_of_the_control_port_is_told():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(WeightUpdateError, match="cannot be reached: timed out"),
    ):
        fetch(f"http://127.0.0.1:{server.getsockname()[1]}", None, 2, 0.2)
