"""A process group through which a trainer broadcasts weights, beside whatever groups a process has.

Made as torch makes a group of that name out of a store, so that a trainer may come by way of torch.distributed. Rank 0
sends; the others must expect the same tensors in the same order.

The tests broadcast with gloo alone. NCCL, which needs a GPU for each member, has never been run here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import BroadcastOptions, ProcessGroupGloo

from models.errors import WeightUpdateError
from models.weight_update import TensorSpec

DEFAULT_NAME = "weight_update_group"
_DEVICES = {"gloo": "cpu", "nccl": "cuda"}


class Group:
    """One member of it. Failures, also a peer that stays away for the group's timeout, are WeightUpdateErrors."""

    def __init__(self, backend: Any, device: str, peer: str):
        self._backend, self._device, self._peer = backend, device, peer

    def receive(self, spec: TensorSpec) -> Tensor:
        """The tensor that rank 0 sends, which must be this one."""
        dtype = getattr(torch, spec.dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise WeightUpdateError(f"tensor {spec.name} is announced as {spec.dtype!r}: name a dtype as torch does")
        tensor = torch.empty(spec.shape, dtype=dtype, device=self._device)
        self._broadcast(tensor, spec.name)
        return tensor

    def send(self, tensor: Tensor) -> None:
        """Give a tensor to all others, as rank 0."""
        self._broadcast(tensor.detach().to(self._device).contiguous(), f"{tensor.dtype} {list(tensor.shape)}")

    def leave(self) -> None:
        """Let go of the group; idempotent."""
        if self._backend is not None:
            self._backend.shutdown()
        self._backend = None

    def _broadcast(self, tensor: Tensor, name: str) -> None:
        if self._backend is None:
            raise WeightUpdateError(f"the group at {self._peer} has been left: join it again")
        options = BroadcastOptions()
        options.rootRank = 0
        try:
            with _stream_of_its_own(tensor):
                self._backend.broadcast([tensor], options).wait()
        except RuntimeError as error:
            raise WeightUpdateError(
                f"the broadcast of {name} in the group at {self._peer} failed ({_first_line(error)}): all its "
                "members must join it again"
            ) from None


def join(
    address: str,
    port: int,
    rank: int,
    world_size: int,
    backend: str = "nccl",
    timeout: float = 300.0,
    name: str = DEFAULT_NAME,
) -> Group:
    """Meet the others of `world_size` processes at the store of rank 0. Raises WeightUpdateError, also when not all
    of them are there after `timeout` seconds."""
    peer = f"{address}:{port}"
    if backend not in _DEVICES or not 0 <= rank < world_size:
        raise WeightUpdateError(
            f"the group at {peer} cannot have rank {rank} of {world_size} with backend {backend!r}: ranks count from "
            "0, backends are gloo and nccl"
        )
    if backend == "nccl" and not torch.cuda.is_available():
        raise WeightUpdateError(f"the group at {peer} cannot use nccl, which needs a GPU: join with backend gloo")
    device, limit = _DEVICES[backend], timedelta(seconds=timeout)
    try:
        store: Any = TCPStore(address, port, world_size, is_master=rank == 0, timeout=limit)
        for prefix in (name, f"{name}/", f"{device}/"):
            store = PrefixStore(prefix, store)
        if backend == "gloo":
            return Group(ProcessGroupGloo(store, rank, world_size, limit), device, peer)
        # Else wait() knows no failure, and for a peer that stays away NCCL's watchdog ends the process.
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = limit
        return Group(distributed.ProcessGroupNCCL(store, rank, world_size, options), device, peer)
    except (RuntimeError, ValueError) as error:
        raise WeightUpdateError(
            f"the group of {world_size} at {peer} did not come together in {timeout:g} s ({_first_line(error)}): is "
            "rank 0 there, and are all ranks taken once?"
        ) from None


@contextmanager
def _stream_of_its_own(tensor: Tensor) -> Iterator[None]:
    """Work on a GPU that no other work of this process waits for, done at the end."""
    if not tensor.is_cuda:
        yield
        return
    stream = torch.cuda.Stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))  # which has made the tensor
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
