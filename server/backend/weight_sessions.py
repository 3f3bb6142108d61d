"""What is asked of the weights that serve, in terms of commands: sessions that bring new ones, and looks at them.

Sessions and looks may run beside the engine's steps; `WeightSession.commit` and `Weights.fill_randomly` come between
two of them.
"""

import logging
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from models.errors import CheckpointError
from models.weight_store import WeightStore
from models.weight_transfer import disk, groups, receiver
from models.weight_transfer.wire import DELTA, FULL, Transfer
from models.weight_update import TensorSpec, UpdateReport, WeightUpdate, combine_checksums
from models.weights import fill_randomly, normalise_name
from server import control
from server.backend.memory_release import WEIGHTS, ReleasedMemory
from server.control import BeginUpdate, JoinGroup, WeightSource
from server.errors import Conflict, InvalidRequest, TandemError

# After so long without a byte, or without the other members of a group, a source is given up.
SOURCE_SECONDS = 60.0

T = TypeVar("T")

log = logging.getLogger("tandem.engine")


def as_tandem_error(error: BaseException) -> TandemError:
    """What a command is told of an error of any kind."""
    if isinstance(error, TandemError):
        return error
    if isinstance(error, CheckpointError):
        return InvalidRequest(str(error))
    return TandemError(f"{type(error).__name__}: {error}")


def result_of(job: "Future[T]") -> T:
    """What a job gave, or a TandemError; waits for it."""
    error = job.exception()
    if error is None:
        return job.result()
    told = as_tandem_error(error)
    if type(told) is TandemError:
        log.error("a command failed", exc_info=error)
    raise told


class Weights:
    """Of one runner. The groups it has joined are by name."""

    def __init__(self, store: WeightStore, released: ReleasedMemory):
        self.store, self.released = store, released
        self.groups: dict[str, groups.Group] = {}
        self._snapshot: dict[str, str] | None = None

    def join(self, command: JoinGroup) -> groups.Group:
        """A new group that this is a member of, for `groups`. Raises Conflict, and WeightUpdateError."""
        name, peer = command.group, (command.address, command.port, command.rank, command.world_size)
        if name in self.groups:
            raise Conflict(f"the group {name} has been joined already: leave it first")
        return groups.join(*peer, command.backend, SOURCE_SECONDS, name)

    def leave(self, name: str) -> None:
        """Leave a group. Raises Conflict."""
        self.group(name).leave()
        del self.groups[name]

    def abandon(self, name: str) -> None:
        """Leave a group in which something is still awaited: what comes would else be taken for the next update's."""
        # On a thread of its own, for the group's end may wait for the same.
        threading.Thread(target=self.groups.pop(name).leave, daemon=True).start()

    def group(self, name: str) -> groups.Group:
        """One that was joined. Raises Conflict."""
        if name not in self.groups:
            raise Conflict(f"the group {name} has not been joined: join it first")
        return self.groups[name]

    def read(self, name: str, num_values: int) -> dict[str, Any]:
        """The beginning of a tensor. Raises WeightUpdateError for an unknown one."""
        self._check_there()
        tensor = self.store.export(name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {"values": tensor.flatten()[:num_values].tolist(), "dtype": dtype, "shape": list(tensor.shape)}

    def check(self, action: str) -> dict[str, Any]:
        """Checksums; with `action` snapshot they are kept, with compare named where they differ from those kept."""
        if action == "compare" and self._snapshot is None:
            raise Conflict("there is no snapshot of the weights to compare with: take one first")
        self._check_there()
        checksums = self.store.checksums()
        if action == "snapshot":
            self._snapshot = checksums
        if action == "compare" and self._snapshot is not None:
            return {"different": sorted(name for name, found in checksums.items() if found != self._snapshot[name])}
        return {"checksum": combine_checksums(checksums), "checksums": checksums}

    def fill_randomly(self) -> None:
        """Weights that mean nothing."""
        self._check_there()
        fill_randomly(self.store.target, self.store.draft, secrets.randbits(31))
        self.store.record({})

    def _check_there(self) -> None:
        if WEIGHTS in self.released.tags or self.released.are_discarded:
            raise Conflict("the weights' memory is released: resume it, and update the weights if they were discarded")


@dataclass(eq=False)
class WeightSession:
    """One update on its way: begun, brought, prepared, committed; `served_version` was there when it was opened. It may
    be closed at any time, also while a source still brings something."""

    weights: Weights
    served_version: str
    update: WeightUpdate | None = None
    is_open: bool = True
    is_working: bool = False  # one of its calls has not returned
    is_sealed: bool = False  # it is being committed, or brings itself what it needs
    is_delta: bool = False
    is_whole: bool = False
    awaited_group: str = ""  # it has not sent all that was announced
    left_group: str = ""  # for that reason

    def begin(self, begin: BeginUpdate) -> None:
        """Check what is declared. Raises InvalidRequest, Conflict, WeightUpdateError."""
        if begin.is_delta and begin.base_version is None:
            raise InvalidRequest("an update that is a delta needs the version it was made for", "base_version")
        self._check_base(begin.base_version)
        self.is_delta, self.is_whole = begin.is_delta, not (begin.is_partial or begin.is_delta)
        self.weights.released.check_update(self.is_whole)
        self.update = self.weights.store.begin(
            tensors=[TensorSpec(spec.name, spec.dtype, spec.shape, spec.sha256) for spec in begin.tensors],
            is_partial=begin.is_partial,
            is_delta=begin.is_delta,
            needs_mtp=begin.needs_mtp or self.weights.released.are_discarded,
            result_sha256=begin.result_sha256,
        )

    def add(self, source: WeightSource) -> None:
        """Bring what a source has, which is no stream. Raises InvalidRequest, Conflict, WeightUpdateError."""
        with self._awaiting(source.group):
            self._take(source)

    def bring(self, source: WeightSource, begin: BeginUpdate) -> str | None:
        """Begin, add and prepare at once; gives the version, if the source names it."""
        if source.kind != "stream":
            with self._awaiting(source.group):
                self.begin(begin)
                self._take(source)
            self.prepare()
            return None
        transfer = self._begin_transfer(source, begin)
        receiver.receive(transfer, source.url, SOURCE_SECONDS, self._begun)
        self.prepare()
        return transfer.version

    def prepare(self) -> None:
        """Everything has come: check it. Raises WeightUpdateError."""
        self._begun.prepare()

    def commit(self) -> UpdateReport:
        """Between two steps, exchange the weights; if it raises the old ones serve."""
        self.weights.released.check_update(self.is_whole)
        report = self._begun.commit()
        if self.is_whole:
            self.weights.released.note_loaded()
        return report

    def close(self) -> None:
        """Forget what came, and leave a group that something is still awaited of."""
        self.is_open, name = False, self.awaited_group
        if name in self.weights.groups:
            self.weights.abandon(name)
            self.left_group = name
        if self.update is not None:
            self.update.close()

    def _check_base(self, version: str | None) -> None:
        if version not in (None, self.served_version):
            message = f"the update was made for version {version!r}, but {self.served_version!r} serves: send full"
            raise InvalidRequest(message, "base_version")

    @property
    def _begun(self) -> WeightUpdate:
        if self.update is None or not self.is_open:
            raise Conflict("the weight session is closed: begin a new one")
        return self.update

    @contextmanager
    def _awaiting(self, group: str) -> Iterator[None]:
        """A group, if one is named, has been told to send: unless all of it comes, `close` leaves the group."""
        self.awaited_group = group
        try:
            yield
        except (CheckpointError, TandemError) as error:
            if group not in self.weights.groups:
                raise
            told = as_tandem_error(error)
            raise type(told)(f"{told.message}; the group {group} was left: join it again", told.param) from error
        self.awaited_group = ""

    def _take(self, source: WeightSource) -> None:
        match source.kind:
            case "disk":
                disk.stage_directory(source.path, self._begun)
            case "inline":
                for data in source.data:
                    disk.stage_bytes(data, self._begun)
            case "group":
                group = self.weights.group(source.group)
                for spec in source.tensors:
                    self._begun.add(spec.name, group.receive(TensorSpec(spec.name, spec.dtype, spec.shape)))
            case _:
                raise InvalidRequest(f"weights cannot come from {source.kind!r}, only from disk, inline or group")

    def _begin_transfer(self, source: WeightSource, begin: BeginUpdate) -> Transfer:
        """Order one that can be taken: where a delta is refused, a full one if the source may send that."""
        strategies = source.strategies
        if self.weights.store.is_quantized and FULL in strategies:
            strategies = (FULL,)
        transfer = self._order(source, strategies)
        try:
            self.begin(self._declare(begin, transfer))
        except (CheckpointError, TandemError):
            if transfer.mode == FULL or FULL not in strategies:
                raise
            transfer = self._order(source, (FULL,))
            self.begin(self._declare(begin, transfer))
        return transfer

    def _order(self, source: WeightSource, strategies: tuple[str, ...]) -> Transfer:
        return receiver.fetch(source.url, self.served_version, source.num_streams, SOURCE_SECONDS, strategies)

    def _declare(self, begin: BeginUpdate, transfer: Transfer) -> BeginUpdate:
        """What the publisher declares. Its result is that of its own tensors: of the served ones, if they are all."""
        specs = [place.spec for place in transfer.tensors]
        has_draft_come = any(normalise_name(spec.name).startswith("mtp.") for spec in specs)
        has_all = has_draft_come or self.weights.store.draft is None
        is_delta = transfer.mode == DELTA
        return replace(
            begin,
            tensors=tuple(control.TensorSpec(spec.name, spec.dtype, spec.shape, spec.sha256) for spec in specs),
            is_delta=is_delta,
            base_version=transfer.base_version if is_delta else None,
            result_sha256=begin.result_sha256 or (transfer.result_sha256 if has_all else ""),
        )


def still_open(session: WeightSession | None) -> bool:
    """What goes on in the session, if there is one, may go on."""
    return session is None or session.is_open


def check_open(session: WeightSession | None) -> None:
    """Raise Conflict if the session was closed."""
    if session is not None and not session.is_open:
        left = f"; the group {session.left_group} was left: join it again" if session.left_group else ""
        raise Conflict(f"the weight session was closed meanwhile: begin a new one{left}")
