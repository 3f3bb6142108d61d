"""Where requests wait for their grammar to be compiled, before the scheduler hears of them."""

import concurrent.futures
import logging
from collections.abc import Iterator
from concurrent.futures import Future

from server.backend.grammar_compiler import GrammarCompiler
from server.backend.matcher import Matcher
from server.backend.output_matcher import OutputMatcher
from server.errors import InvalidRequest, TandemError
from server.messages import Failed
from server.request import Request

# How long an engine that has nothing else to do waits at a time: new requests wait for it, too.
_WAIT_SECONDS = 0.01

log = logging.getLogger("tandem.engine")


class GrammarQueue:
    """Gives each request the matcher that belongs to it."""

    def __init__(self, compiler: GrammarCompiler, eos_ids: tuple[int, ...], vocab_size: int):
        self._compiler, self._eos_ids, self._vocab_size = compiler, eos_ids, vocab_size
        self._waiting: dict[str, tuple[Request, Future[Matcher] | None]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[str]:
        """Their ids."""
        return iter(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def clear(self) -> list[Request]:
        """Give them all up."""
        requests = [request for request, _ in self._waiting.values()]
        self._waiting.clear()
        return requests

    def add(self, request: Request) -> None:
        """Take a request whose output is masked."""
        constraint = request.sampling.constraint
        self._waiting[request.id] = request, None if constraint is None else self._compiler.compile(constraint)

    def remove(self, request_id: str) -> None:
        """Forget a request; others are ignored."""
        self._waiting.pop(request_id, None)

    def wait(self) -> None:
        """Return when a request is ready, or soon."""
        futures = [future for _, future in self._waiting.values() if future is not None]
        if len(futures) == len(self._waiting):
            concurrent.futures.wait(futures, _WAIT_SECONDS, concurrent.futures.FIRST_COMPLETED)

    def take(self, now: float) -> tuple[list[Request], list[Failed]]:
        """The requests that can go on, those whose deadline is over among them, and those that cannot be served."""
        ready, failed = [], []
        for request, future in list(self._waiting.values()):
            if future is not None and not future.done():
                if request.deadline >= now:
                    continue
                future = None
            del self._waiting[request.id]
            error = None if future is None else future.exception()
            if error is not None:
                failed.append(self._refusal(request, error))
                continue
            grammar = None if future is None else future.result().copy()
            request.matcher = OutputMatcher(request.sampling, grammar, self._eos_ids, self._vocab_size)
            ready.append(request)
        return ready, failed

    def _refusal(self, request: Request, error: BaseException) -> Failed:
        constraint = request.sampling.constraint
        assert constraint is not None
        if not isinstance(error, InvalidRequest):
            log.error("compiling a %s failed", constraint.kind, exc_info=error)
            message = f"compiling {constraint.field} failed: {error!r}; the server's log says where"
            return Failed(request.id, TandemError.__name__, message, constraint.field)
        message = f"{constraint.field} is no {constraint.kind} that can be served: {error.message}"
        return Failed(request.id, InvalidRequest.__name__, message, constraint.field)
