"""Looks now and then whether a request's state is what its tokens give: a shadow request computes it anew by prefill.

The state is copied where the host knows its position; the shadow runs when there is room and shares nothing with
others. Knows neither tensors nor what to do about a state that is off.
"""

import itertools
import random
from collections.abc import Callable, Iterable

from server.cache_ops import CacheOp, CompareState, SaveState
from server.messages import SamplingParams
from server.request import Request

# Behind everybody who waits.
_PRIORITY = 2**40


class Watchdog:
    """Every `interval` steps (0: never) one check, one at a time. `slot` is the checkpoint slot it has for itself,
    `read_error()` gives the relative error that the device found."""

    def __init__(self, interval: int, slot: int, tolerance: float, read_error: Callable[[], float]):
        self.interval, self.slot, self.tolerance, self._read_error = interval, slot, tolerance, read_error
        self.num_checks = 0
        self.worst_error = 0.0
        self._watched: Request | None = None
        self._shadow: Request | None = None
        self._num_steps = 0
        self._names = itertools.count()
        self._rng = random.Random(0)

    def begin(self, running: Iterable[Request], ops: list[CacheOp]) -> Request | None:
        """A new step: the shadow of a request that is checked from now on, if it is time and somebody of `running`, all
        that one kind of weights has computed, decodes."""
        self._num_steps += 1
        if not self.interval or self._num_steps % self.interval or self._shadow is not None:
            return None
        candidates = [request for request in running if request.is_decoding and request.num_computed > 1]
        if not candidates:
            return None
        self._watched = watched = self._rng.choice(candidates)
        assert watched.row is not None
        ops.append(SaveState(watched.row, self.slot, watched.num_computed))
        self._shadow = Request(
            id=f"watchdog-{next(self._names)}",
            prompt_ids=watched.known_ids(0, watched.num_computed),
            sampling=SamplingParams(temperature=0, max_tokens=1),
            stop_ids=frozenset(),
            max_output=1,
            seed=0,
            priority=_PRIORITY,
            is_plain=True,
            is_isolated=True,
        )
        return self._shadow

    def is_shadow(self, request: Request) -> bool:
        """The request is the check's own: nobody waits for its token."""
        return request is self._shadow

    def compare(self, request: Request, ops: list[CacheOp]) -> None:
        """A pass has computed the whole prompt of `request`: if it is the shadow, compare."""
        if request is self._shadow and request.row is not None:
            ops.append(CompareState(request.row, self.slot))

    def cancel(self) -> Request | None:
        """Give the check up; its shadow, if there is one, is of no use any more."""
        shadow, self._watched, self._shadow = self._shadow, None, None
        return shadow

    def finish(self) -> tuple[Request, float] | None:
        """The comparison is done: the watched request and its error, if that is not tolerable."""
        watched, error = self._watched, self._read_error()
        assert watched is not None
        self._watched = self._shadow = None
        self.num_checks += 1
        self.worst_error = max(self.worst_error, error)
        return None if error <= self.tolerance else (watched, error)
