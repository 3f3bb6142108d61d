"""Where passes run: one after the other in the order of submission, beside the host's own work or in place.

A CUDA device has its own queue, so there a pass only launches work and is done at once; on a CPU the queue is a thread.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Lane:
    """`is_threaded`: what is submitted runs in a thread of its own; else at once, in the caller's."""

    def __init__(self, is_threaded: bool):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tandem-device") if is_threaded else None

    def submit(self, function: Callable[..., T], *args: Any) -> "Future[T]":
        """Run function(*args) after all submitted before. Errors come with the result, without a thread at once."""
        if self._pool is not None:
            return self._pool.submit(function, *args)
        future: Future[T] = Future()
        future.set_result(function(*args))
        return future

    def close(self) -> None:
        """Wait for what was submitted, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown()


class Readback:
    """Tensors on their way to the host: copied without a wait, read when an event says that they have arrived."""

    def __init__(self, *tensors: Tensor):
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors[0].is_cuda:
            self._tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[Any]:
        """The tensors as lists; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._tensors]


class Trace:
    """Spans of host and device work in Chrome's trace format (load the file in chrome://tracing or Perfetto)."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def span(self, name: str, track: str, **args: Any) -> AbstractContextManager[None]:
        """Record what runs inside as `name` on the row `track`."""
        return _Span(self, name, track, args)


class NoTrace:
    """Records nothing."""

    def span(self, name: str, track: str, **args: Any) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()


class _Span(AbstractContextManager[None]):
    def __init__(self, trace: Trace, name: str, track: str, args: dict[str, Any]):
        self._trace, self._name, self._track, self._args = trace, name, track, args

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        end = time.perf_counter()
        event = {"name": self._name, "ph": "X", "pid": 0, "tid": self._track, "args": self._args}
        event |= {"ts": 1e6 * self._start, "dur": 1e6 * (end - self._start)}
        self._trace.events.append(event)
