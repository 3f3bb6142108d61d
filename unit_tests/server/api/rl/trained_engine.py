"""A fake engine that takes commands: it has versions and pauses, sessions and memory, but no weights."""

from typing import Any

from server.config import EngineConfig
from server.control import (
    AddTensors,
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    Control,
    Done,
    FlushCache,
    Pause,
    ReadWeights,
    ReleaseMemory,
    RestoreMemory,
    Resume,
    RollBackUpdate,
    SetVersion,
    UpdateWeights,
)
from server.messages import FINISH_ABORT, EngineStats, Failed, TokenOutput
from unit_tests.server.fake_engine import FakeEngine

BAD_PATH = "/nowhere"
CHECKSUMS = {"model.norm.weight": "aa", "mtp.norm.weight": "bb"}


class TrainedEngine(FakeEngine):
    """Records the `commands` it gets. `refusals` has an error and its kind for commands that are to fail, by class.
    While `is_slow`, updates are never done."""

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self.commands: list[Control] = []
        self.refusals: dict[type, tuple[str, str]] = {}
        self.is_slow = False
        self.is_paused = self.has_session = False
        self.version = self.mtp_version = "default"
        self.num_updates = 0
        self.released: set[str] = set()
        self._done: list[Done] = []
        self._ended: list[TokenOutput | Failed] = []

    def control(self, command: Control) -> None:
        """Carry the command out at once."""
        self.commands.append(command)
        if self.is_slow and isinstance(command, UpdateWeights):
            return
        error, kind = self.refusals.get(type(command)) or self._find_mistake(command)
        values = {} if error else self._carry_out(command)
        self._done.append(Done(command.control_id, values, error, kind))

    def take_done(self) -> list[Done]:
        """What has come of commands."""
        done, self._done = self._done, []
        return done

    def has_work(self) -> bool:
        """A paused engine has none, once it has said what it ended."""
        return bool(self._ended) or (not self.is_paused and super().has_work())

    def step(self) -> list[TokenOutput | Failed]:
        """What a command has ended, and the next tokens unless it is paused."""
        ended, self._ended = self._ended, []
        return ended + ([] if self.is_paused else super().step())

    def stats(self) -> EngineStats:
        """With the versions."""
        plain = super().stats()
        return EngineStats(
            num_running=plain.num_running,
            num_pages=plain.num_pages,
            num_free_pages=plain.num_free_pages,
            num_steps=plain.num_steps,
            weight_version=self.version,
            mtp_weight_version=self.mtp_version,
            mtp_stale=self.version != self.mtp_version,
            is_paused=self.is_paused,
            is_frozen=self.is_paused or bool(self.released),
            released_tags=tuple(self.released),
            num_weight_updates=self.num_updates,
            drafts_by_version={"default": ((8, 8), (6, 4)), self.version: ((4, 4), (3, 1))},
        )

    def _find_mistake(self, command: Control) -> tuple[str, str]:
        needs_session = isinstance(command, AddTensors | CommitUpdate | RollBackUpdate)
        if needs_session and not self.has_session:
            return "no weight session is open", "Conflict"
        if isinstance(command, BeginUpdate | UpdateWeights) and self.has_session:
            return "a weight session is open: finish it, or roll it back", "Conflict"
        if isinstance(command, UpdateWeights) and command.source.path == BAD_PATH:
            return f"{BAD_PATH} has no safetensors", "CheckpointError"
        if isinstance(command, FlushCache | ReleaseMemory) and self._running:
            return f"{len(self._running)} requests run", "Conflict"
        return "", ""

    def _carry_out(self, command: Control) -> dict[str, Any]:
        match command:
            case Pause(mode=mode):
                return self._pause(mode)
            case Resume():
                self.is_paused = False
            case BeginUpdate():
                self.has_session = True
            case RollBackUpdate():
                self.has_session = False
            case CommitUpdate() | UpdateWeights():
                self._commit(command.commit if isinstance(command, UpdateWeights) else command)
                return {"mode": "full", "num_tensors": 2, "num_bytes": 10}
            case SetVersion(weight_version=version):
                self.version = version
            case ReadWeights(num_values=count):
                return {"values": [0.5, 1.0, -2.0][:count], "dtype": "float32", "shape": [3]}
            case CheckWeights(action=action):
                return {"different": ["mtp.norm.weight"]} if action == "compare" else self._checksums(action)
            case ReleaseMemory(tags=tags):
                self.released.update(tags)
            case RestoreMemory(tags=tags):
                self.released.difference_update(tags)
        return {}

    def _checksums(self, action: str) -> dict[str, Any]:
        return {} if action == "reset" else {"checksum": "cc", "checksums": CHECKSUMS}

    def _pause(self, mode: str) -> dict[str, Any]:
        self.is_paused, count = True, len(self._running)
        if mode == "abort":
            self._end_all()
        return {"num_requests": count}

    def _end_all(self) -> None:
        for running in self._running.values():
            self._ended.append(self._output(running, [], FINISH_ABORT, None))
        self._running.clear()

    def _commit(self, command: CommitUpdate) -> None:
        if command.in_flight == "abort":
            self._end_all()
        self.has_session = False
        self.num_updates += 1
        self.version = command.weight_version or str(self.num_updates)
