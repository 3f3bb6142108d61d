"""Broadcasts between two processes, whichever way the trainer's came to its group; peers that stay away are told."""

import multiprocessing
import os
import socket
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, distributed_c10d, rendezvous

from models.errors import WeightUpdateError
from models.weight_transfer.groups import DEFAULT_NAME, Group, join
from models.weight_update import TensorSpec, hash_tensor

SHAPE = (5, 7)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8)


def draw(dtype: torch.dtype) -> Tensor:
    return (torch.arange(35).view(SHAPE) * 1.5 + 0.25).to(dtype)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def receive_all(port: int, name: str, sees_end: bool, results) -> None:
    """A process of its own: what rank 1 receives, and what it says when rank 0 is gone."""
    torch.set_num_threads(1)
    group = join("127.0.0.1", port, 1, 2, "gloo", 30.0, name)
    hashes = {}
    for dtype in DTYPES:
        spelled = str(dtype).removeprefix("torch.")
        hashes[spelled] = hash_tensor(group.receive(TensorSpec("w", spelled, SHAPE)))
    said = ""
    if sees_end:
        try:
            group.receive(TensorSpec("model.norm.weight", "float32", SHAPE))
        except WeightUpdateError as error:
            said = str(error)
    results.put((hashes, said))
    group.leave()


def send_through_torch(port: int, name: str) -> None:
    """As trainers do: a group of that name beside the default one."""
    store, _, _ = next(iter(rendezvous(f"tcp://127.0.0.1:{port}", 0, 2, timeout=timedelta(seconds=30))))
    limit = timedelta(seconds=30)
    backend, prefixed = distributed_c10d.Backend("gloo"), PrefixStore(name, store)
    group, _ = distributed_c10d._new_process_group_helper(2, 0, [], backend, prefixed, group_name=name, timeout=limit)
    distributed_c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
    for dtype in DTYPES:
        distributed.broadcast(draw(dtype), src=0, group=group)
    distributed_c10d._world.pg_group_ranks.pop(group)
    group.shutdown()


def send_through_ours(port: int, name: str) -> None:
    group = join("127.0.0.1", port, 0, 2, "gloo", 30.0, name)
    for dtype in DTYPES:
        group.send(draw(dtype).T.contiguous().T)
    group.leave()
    group.leave()


@pytest.mark.slow
@pytest.mark.parametrize("name", [DEFAULT_NAME, "other"])
@pytest.mark.parametrize("send", [send_through_ours, send_through_torch])
def test_tensors_come_bit_by_bit_from_another_process(send, name):
    context, port = multiprocessing.get_context("spawn"), free_port()
    results = context.Queue()
    is_ours = send is send_through_ours  # a group of torch's lives as long as its process
    process = context.Process(target=receive_all, args=(port, name, is_ours, results))
    process.start()
    try:
        send(port, name)
        hashes, said = results.get(timeout=60)
    finally:
        process.join(30)
        process.kill()
    assert hashes == {str(dtype).removeprefix("torch."): hash_tensor(draw(dtype)) for dtype in DTYPES}
    if is_ours:
        assert said.startswith(f"the broadcast of model.norm.weight in the group at 127.0.0.1:{port} failed (")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_that_stays_away_is_told(rank):
    port = free_port()
    with pytest.raises(WeightUpdateError) as caught:
        join("127.0.0.1", port, rank, 2, "gloo", 0.5)
    assert str(caught.value).startswith(f"the group of 2 at 127.0.0.1:{port} did not come together in 0.5 s (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rank", "world_size", "backend", "message"),
    [
        (2, 2, "gloo", "the group at host:1 cannot have rank 2 of 2"),
        (-1, 2, "gloo", "the group at host:1 cannot have rank -1 of 2"),
        (1, 2, "mpi", "with backend 'mpi': ranks count from 0, backends are gloo and nccl"),
    ],
)
def test_impossible_members_are_refused(rank, world_size, backend, message):
    with pytest.raises(WeightUpdateError, match=message):
        join("host", 1, rank, world_size, backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_nccl_without_a_gpu_is_refused():
    with pytest.raises(WeightUpdateError, match="cannot use nccl, which needs a GPU: join with backend gloo"):
        join("127.0.0.1", free_port(), 1, 2, "nccl", 0.5)


def test_an_nccl_group_is_built_so_that_waiting_for_a_peer_ends(monkeypatch):
    found = []

    class NCCL:
        class Options:
            pass

        def __init__(self, store, rank, world_size, options):
            found.append((os.environ["TORCH_NCCL_BLOCKING_WAIT"], options._timeout))

    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed, "ProcessGroupNCCL", NCCL, raising=False)
    join("127.0.0.1", free_port(), 0, 1, "gloo", 10.0).leave()
    assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "0"
    join("127.0.0.1", free_port(), 0, 1, "nccl", 10.0)
    assert found == [("1", timedelta(seconds=10))]


def test_on_a_gpu_a_broadcast_has_a_stream_of_its_own(monkeypatch):
    """Whatever else is queued there waits neither for the peer nor for the end."""
    done = []

    class Stream:
        def __init__(self, device):
            done.append(f"stream of {device}")

        def wait_stream(self, other):
            done.append(f"wait for {other}")

        def synchronize(self):
            done.append("synchronize")

    class Backend:
        def broadcast(self, tensors, options):
            done.append(f"broadcast from {options.rootRank}")
            return SimpleNamespace(wait=lambda: done.append("wait"))

    @contextmanager
    def using(stream):
        done.append("begin")
        yield
        done.append("end")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current one")
    monkeypatch.setattr(torch.cuda, "stream", using)
    tensor = SimpleNamespace(is_cuda=True, device="cuda:0")
    Group(Backend(), "cuda", "peer")._broadcast(tensor, "w")
    steps = ["begin", "broadcast from 0", "wait", "end", "synchronize"]
    assert done == ["stream of cuda:0", "wait for the current one", *steps]


def test_a_group_of_one_sends_to_no_one_and_knows_dtypes_and_its_end():
    group = join("127.0.0.1", free_port(), 0, 1, "gloo", 10.0)
    group.send(torch.ones(3))
    with pytest.raises(WeightUpdateError, match="tensor w is announced as 'nn': name a dtype as torch does"):
        group.receive(TensorSpec("w", "nn", (3,)))
    group.leave()
    with pytest.raises(WeightUpdateError, match="has been left: join it again"):
        group.send(torch.ones(3))
