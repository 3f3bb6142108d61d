"""A thread beside the engine's, for what takes long and may hang: a source that sends nothing, a peer that stays away.

One job at a time. Knows nothing of what jobs do.
"""

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """Its thread is made for the first job. A job that hangs neither holds up the process's end nor, once it is given
    up, the next job."""

    def __init__(self) -> None:
        self._pool: ThreadPool | None = None
        self._job: Future[Any] | None = None

    @property
    def is_free(self) -> bool:
        """No job runs."""
        return self._job is None or self._job.done()

    def submit(self, function: Callable[..., T], *args: Any) -> "Future[T]":
        """Run function(*args); whatever it raises comes with the result."""
        assert self.is_free
        if self._pool is None:
            self._pool = ThreadPool(1)  # the interpreter does not wait for its threads when it ends
            weakref.finalize(self, self._pool.close)
        future: Future[T] = Future()
        self._pool.apply_async(function, args, callback=future.set_result, error_callback=future.set_exception)
        self._job = future
        return future

    def give_up(self) -> None:
        """Leave the job and its thread to themselves: what it gives is nobody's."""
        if self._pool is not None:
            self._pool.close()
        self._pool = self._job = None
