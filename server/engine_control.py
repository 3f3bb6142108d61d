"""Carries out what is asked of a running engine beside requests: pauses, weight updates, looks at the weights, memory.

Each command is a script, a generator that yields what it waits for. Scripts go on between two steps, all that can, the
oldest first; what takes long runs on a worker's thread while steps go on. Before weights or their name change there is
a moment in which nothing is in flight and everything emitted is told under the version that emitted it.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from server.backend.grammar_queue import GrammarQueue
from server.backend.memory_release import KV_CACHE, WEIGHTS, release, restore
from server.backend.runner import Runner
from server.backend.weight_sessions import Weights, WeightSession, check_open, result_of, still_open
from server.backend.worker import Worker
from server.control import (
    PAUSE_MODES,
    AddTensors,
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    Control,
    Done,
    FlushCache,
    JoinGroup,
    LeaveGroup,
    Pause,
    ReadWeights,
    ReleaseMemory,
    RestoreMemory,
    Resume,
    RollBackUpdate,
    SetVersion,
    UpdateWeights,
)
from server.errors import Conflict, InvalidRequest, TandemError
from server.messages import FINISH_ABORT, Failed, TokenOutput
from server.router.scheduler import Scheduler
from server.router.weight_versions import WeightVersions

T = TypeVar("T")
Condition = Callable[[], bool]
Waits = Generator[Condition, None, T]
Script = Waits[dict[str, Any]]

log = logging.getLogger("tandem.engine")


@dataclass(eq=False)
class _Open:
    """A command under way; `may_go_on` is what its script waits for."""

    control_id: str
    script: Script
    may_go_on: Condition


class EngineControl:
    """Owns pauses, the weight session and the versions. `drain()` gives what the step in flight emits; `flush_cache()`
    forgets prefixes. While it `is_frozen` the engine runs no step."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        grammars: GrammarQueue,
        drain: Callable[[], list[TokenOutput | Failed]],
        flush_cache: Callable[[], None],
    ):
        self._runner, self._scheduler, self._grammars = runner, scheduler, grammars
        self._drain, self._flush_cache = drain, flush_cache
        self._weights, self._worker = Weights(runner.store, runner.released), Worker()
        self.versions = WeightVersions(scheduler.counters, runner.draft is not None)
        self.is_paused = False
        self._num_resumes = self._num_holding = 0
        self._awaited: set[str] = set()  # those who compiled when requests began to be held back
        self._session: WeightSession | None = None
        self._joining: JoinGroup | None = None
        self._open: list[_Open] = []
        self._current: _Open | None = None  # its script is going on
        self._changing: _Open | None = None  # what was emitted is being told, then it changes the version
        self._outputs: list[TokenOutput | Failed] = []
        self._done: list[Done] = []

    # What the engine asks.

    @property
    def is_frozen(self) -> bool:
        """No step may run: the engine is paused, or some of its memory is given back."""
        return self.is_paused or not self._runner.released.can_run

    @property
    def is_changing(self) -> bool:
        """What has been emitted must be told: when the engine goes on, its weights or their name are others."""
        return self._changing is not None

    @property
    def is_waiting(self) -> bool:
        """A command is under way, so there may soon be something to do."""
        return bool(self._open)

    def has_work(self) -> bool:
        """A command can go on."""
        return any(each.may_go_on() for each in self._open)

    def add(self, command: Control) -> None:
        """Take a command; `advance` begins it."""
        self._open.append(_Open(command.control_id, self._script(command), _at_once))

    def advance(self) -> list[TokenOutput | Failed]:
        """Go on with every command that can; what requests emitted meanwhile."""
        for each in list(self._open):
            if self._changing in (None, each) and each.may_go_on():
                self._go_on(each)
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_done(self) -> list[Done]:
        """What became of commands, in the order in which they ended."""
        done, self._done = self._done, []
        return done

    # Scripts.

    def _go_on(self, each: _Open) -> None:
        self._current = each
        try:
            while True:
                each.may_go_on = next(each.script)
                if self.is_changing or not each.may_go_on():
                    return
        except StopIteration as end:
            self._done.append(Done(each.control_id, end.value))
        except TandemError as error:
            self._done.append(Done(each.control_id, {}, error.message, type(error).__name__))
        self._open.remove(each)
        if self._changing is each:
            self._changing = None

    def _script(self, command: Control) -> Script:
        match command:
            case Pause():
                return self._pause(command.mode)
            case Resume():
                return _do(self._resume)
            case BeginUpdate():
                return self._begin(command)
            case AddTensors():
                return self._add(command)
            case CommitUpdate():
                return self._commit(command)
            case RollBackUpdate():
                return _do(self._roll_back)
            case UpdateWeights():
                return self._update(command)
            case JoinGroup():
                return self._join(command)
            case LeaveGroup():
                return self._leave(command.group)
            case SetVersion():
                return self._rename(command.weight_version)
            case ReadWeights():
                return self._look(self._weights.read, command.name, command.num_values)
            case CheckWeights(action="reset"):
                return self._reset()
            case CheckWeights():
                return self._look(self._weights.check, command.action)
            case FlushCache():
                return self._flush(command.timeout)
            case ReleaseMemory():
                return self._release(command)
            case RestoreMemory():
                return self._restore(command.tags)

    def _pause(self, mode: str) -> Script:
        _check_mode(mode)
        with ExitStack() as held_back:
            if mode == "wait":
                num_resumes = self._num_resumes
                held_back.enter_context(self._holding_back())
                yield from self._outlast_requests(lambda: self._num_resumes != num_resumes)
            self._outputs += self._drain()
            num_requests = self._settle(mode)
            self.is_paused = True
        return {"num_requests": num_requests}

    def _resume(self) -> dict[str, Any]:
        self.is_paused = False
        self._num_resumes += 1
        self._scheduler.skip_time()
        return {}

    def _flush(self, timeout: float) -> Script:
        deadline = self._scheduler.clock() + timeout
        yield lambda: not self._needs_cache() or self._scheduler.clock() >= deadline
        self._scheduler.give_up_check()
        if self._needs_cache():
            raise Conflict(
                f"{len(self._scheduler.running)} requests run and {self._scheduler.num_waiting} wait, so the cache "
                "cannot be flushed: let them end, or pause with abort or retract"
            )
        self._flush_cache()
        return {}

    def _look(self, function: Callable[..., dict[str, Any] | None], *args: Any) -> Script:
        return (yield from self._work(None, function, *args)) or {}

    def _join(self, command: JoinGroup) -> Script:
        yield self._is_free
        job = self._worker.submit(self._weights.join, command)
        self._joining = command
        yield lambda: job.done() or self._joining is not command
        if self._joining is not command:
            raise Conflict(f"the group {command.group} was left before all its members had come")
        self._joining = None
        self._weights.groups[command.group] = result_of(job)
        return {}

    def _leave(self, name: str) -> Script:
        if self._joining is None or self._joining.group != name:
            return (yield from self._look(self._weights.leave, name))
        self._worker.give_up()
        self._joining = None
        return {}

    def _release(self, command: ReleaseMemory) -> Script:
        if self._session is not None and WEIGHTS in command.tags:
            raise Conflict("a weight session is open: commit it or roll it back before the weights are released")
        yield self._is_free
        self._outputs += self._drain()
        self._scheduler.give_up_check()
        if self._needs_cache():
            raise Conflict(
                f"{len(self._scheduler.running)} requests run and {self._scheduler.num_waiting} wait, so no memory can "
                "be released: let them end, or pause with abort or retract"
            )
        if KV_CACHE in command.tags:
            self._flush_cache()
        return {"num_bytes": release(self._runner, command.tags, command.discards_weights)}

    def _restore(self, tags: tuple[str, ...]) -> Script:
        yield self._is_free  # graphs are captured with nothing beside them
        num_bytes = restore(self._runner, tags)
        self._scheduler.skip_time()
        return {"num_bytes": num_bytes}

    def _rename(self, version: str) -> Script:
        yield from self._prepare_change()
        self.versions.rename(version)
        return {"weight_version": version}

    def _reset(self) -> Script:
        yield from self._prepare_change()
        result_of(self._worker.submit(self._weights.fill_randomly))
        self.versions.update("random", True, True)
        self._start_version()
        return {}

    # Weight sessions.

    def _begin(self, command: BeginUpdate) -> Script:
        session = self._open_session()
        yield from self._work(session, session.begin, command)
        return {}

    def _add(self, command: AddTensors) -> Script:
        session = self._need_unsealed_session()
        yield from self._work(session, session.add, command.source)
        return {}

    def _commit(self, command: CommitUpdate) -> Script:
        session = self._need_unsealed_session()
        _check_mode(command.in_flight)
        session.is_sealed = True
        yield from self._work(session, session.prepare)
        return (yield from self._exchange(session, command.weight_version, command.in_flight))

    def _update(self, command: UpdateWeights) -> Script:
        _check_mode(command.commit.in_flight)
        session = self._open_session()
        session.is_sealed = True
        named = yield from self._work(session, session.bring, command.source, command.begin)
        version = named if command.commit.weight_version is None else command.commit.weight_version
        return (yield from self._exchange(session, version, command.commit.in_flight))

    def _roll_back(self) -> dict[str, Any]:
        session = self._need_session()
        if session.is_working:
            self._worker.give_up()
        self._close_session()
        return {}

    def _exchange(self, session: WeightSession, version: str | None, in_flight: str) -> Script:
        """The prepared session's weights serve from now on."""
        with ExitStack() as held_back, self._closing_on_failure(session):
            if in_flight == "wait":
                held_back.enter_context(self._holding_back())
                yield from self._outlast_requests(lambda: not session.is_open)
            yield from self._prepare_change(session, ends_all=in_flight == "abort")
            started = time.perf_counter()
            report = result_of(self._worker.submit(session.commit))
            version = self.versions.count_on() if version is None else version
            self.versions.update(version, report.touched_target, report.touched_draft)
            self._start_version()
            if in_flight == "retract":
                self._scheduler.retract()
            seconds = time.perf_counter() - started
        self._close_session()
        log.info("weights %s serve: %d bytes exchanged in %.3f s", version, report.num_bytes, seconds)
        return {
            "mode": "delta" if session.is_delta else "full",
            "mtp_weight_version": self.versions.mtp_weight_version,
            "mtp_stale": self.versions.is_stale,
            "num_bytes": report.num_bytes,
            "commit_seconds": seconds,
        }

    def _open_session(self) -> WeightSession:
        if self._session is not None:
            raise Conflict("another weight session is open: commit it or roll it back first")
        self._session = WeightSession(self._weights, self.versions.weight_version)
        return self._session

    def _need_session(self) -> WeightSession:
        if self._session is None:
            raise Conflict("no weight session is open: begin one first")
        return self._session

    def _need_unsealed_session(self) -> WeightSession:
        session = self._need_session()
        if session.is_sealed:
            raise Conflict("the weight session that is open takes nothing more: wait until it has ended")
        return session

    def _close_session(self) -> None:
        assert self._session is not None
        self._session.close()
        self._session = None

    @contextmanager
    def _closing_on_failure(self, session: WeightSession) -> Iterator[None]:
        with ExitStack() as on_failure:
            on_failure.callback(lambda: self._close_session() if session.is_open else None)
            yield
            on_failure.pop_all()

    # What scripts wait for.

    def _work(self, session: WeightSession | None, function: Callable[..., T], *args: Any) -> Waits[T]:
        """What function(*args) gives on the worker's thread, in its turn. Of a session that fails or is closed by then
        nothing is kept."""
        yield lambda: self._is_free() or not still_open(session)
        if session is None:
            future = self._worker.submit(function, *args)
            yield future.done
            return result_of(future)
        with self._closing_on_failure(session):
            check_open(session)
            future = self._worker.submit(function, *args)
            session.is_working = True
            yield lambda: future.done() or not session.is_open
            check_open(session)
            session.is_working = False
            return result_of(future)

    def _prepare_change(self, session: WeightSession | None = None, ends_all: bool = False) -> Waits[None]:
        """Return when nothing is in flight and all that was emitted is told."""
        yield lambda: self._is_free() or not still_open(session)
        check_open(session)
        self._changing = self._current
        self._outputs += self._drain()
        if ends_all:
            self._settle("abort")
        yield _at_once

    def _is_free(self) -> bool:
        """The worker has no job, and no other command is about to change the version."""
        return self._worker.is_free and self._changing is None

    def _outlast_requests(self, is_called_off: Condition) -> Waits[None]:
        """Return when all requests that are not held back have ended. Raises Conflict where they cannot."""
        names = self._scheduler.in_flight() | self._awaited
        if self.is_frozen:
            num_begun = self._scheduler.num_begun
            if num_begun:
                raise Conflict(f"{num_begun} requests cannot end in a paused engine: resume it, or use another mode")
            return
        yield lambda: self.is_frozen or is_called_off() or not self._have_any(names)
        if is_called_off() or self._have_any(names):
            raise Conflict("the engine was paused or resumed, or the session closed, before all requests had ended")

    @contextmanager
    def _holding_back(self) -> Iterator[None]:
        """Requests that come meanwhile wait until the end of it."""
        if not self._num_holding:
            self._awaited = set(self._grammars)
            self._scheduler.hold_back(self._awaited)
        self._num_holding += 1
        try:
            yield
        finally:
            self._num_holding -= 1
            if not self._num_holding:
                self._scheduler.let_in()

    # Between two steps.

    def _settle(self, mode: str) -> int:
        """Do what a pause of this mode does to the requests, with nothing in flight; how many there were."""
        if mode == "abort":
            waiting = self._grammars.clear()
            self._outputs += [request.make_output(FINISH_ABORT, self._scheduler.clock()) for request in waiting]
            num_ended = self._scheduler.end_all()
            self._outputs += self._scheduler.take_notices()
            return num_ended + len(waiting)
        if mode == "retract":
            return self._scheduler.retract()
        return len(self._scheduler.running)

    def _start_version(self) -> None:
        self._flush_cache()
        self._scheduler.start_version()
        self._scheduler.skip_time()

    def _needs_cache(self) -> bool:
        """Some request holds pages, or soon will."""
        waits = self._scheduler.num_waiting or len(self._grammars)
        return bool(self._scheduler.running or (waits and not self.is_frozen))

    def _have_any(self, names: set[str]) -> bool:
        return any(name in self._scheduler or name in self._grammars for name in names)


def _do(function: Callable[..., dict[str, Any]], *args: Any) -> Script:
    """A script that waits for nothing."""
    yield from ()
    return function(*args)


def _at_once() -> bool:
    return True


def _check_mode(mode: str) -> None:
    if mode not in PAUSE_MODES:
        raise InvalidRequest(f"mode is {mode!r}, it must be one of {', '.join(PAUSE_MODES)}", "mode")
