"""Carries out what the router decided about pages, checkpoints and the host tier. No policy.

A host entry has a checksum, made when it is written, and the generation of weights it was computed with: an entry that
does not match is never used.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.cache import GDNCheckpoints
from server.backend.request_table import RequestTable
from server.cache_ops import (
    CacheOp,
    ClearPage,
    CompareState,
    CopyPage,
    DropHost,
    LoadPage,
    LoadState,
    RestoreState,
    SaveState,
    StorePage,
    StoreState,
)


@dataclass(frozen=True)
class HostEntry:
    """Bytes in host memory, with what proves that they are the ones that were written, under the weights of today."""

    data: Tensor
    checksum: int
    generation: int


class CacheMover:
    """Owns the checkpoints and the host entries. `run` is called where passes run, `is_intact` from the host's thread.

    Slot 0 is padding, or the watchdog's. `state_error` is what the last comparison found.
    """

    def __init__(self, table: RequestTable, num_checkpoints: int):
        self.table = table
        self.kv = table.cache.kv.data
        self.checkpoints = GDNCheckpoints.allocate(table.cache.gdn, num_checkpoints + 1)
        self.entries: dict[int, HostEntry] = {}
        self.generation = 0
        self.state_error = 0.0

    def run(self, ops: Sequence[CacheOp]) -> None:
        """Carry out `ops` in order."""
        for op in ops:
            self._run_one(op)

    def is_intact(self, handle: int) -> bool:
        """The entry holds what was written, computed with the present weights. True for one that is still on its way:
        its writer runs before whoever reads it."""
        entry = self.entries.get(handle)
        return entry is None or (entry.generation == self.generation and entry.checksum == _checksum(entry.data))

    def start_generation(self) -> None:
        """The weights are others now: what was stored before is stale."""
        self.generation += 1

    def _run_one(self, op: CacheOp) -> None:
        gdn = self.table.cache.gdn
        match op:
            case CopyPage(source, target):
                self.kv[:, :, target] = self.kv[:, :, source]
            case ClearPage(page):
                self.kv[:, :, page] = 0
            case SaveState(row, slot, position):
                stand = self.table.seq_len[row] - self.table.accept_len[row]
                self.checkpoints.save(slot, gdn, row, position, stand)
            case CompareState(row, slot):
                expected, seen = gdn.state[:, row], self.checkpoints.state[:, slot]
                self.state_error = float((seen - expected).norm() / expected.norm().clamp(min=1e-30))
            case RestoreState(slot, row, position):
                self.checkpoints.restore(slot, gdn, row, position)
            case StorePage(page, handle):
                self._store(handle, self.kv[:, :, page])
            case LoadPage(handle, page):
                self.kv[:, :, page] = self.entries[handle].data.view(self.kv.dtype).view_as(self.kv[:, :, page])
            case StoreState(slot, handle):
                self._store(handle, *(part[:, slot] for part in self._state_parts()))
            case LoadState(handle, slot):
                self._load_state(self.entries[handle].data, slot)
            case DropHost(handle):
                self.entries.pop(handle, None)

    def _state_parts(self) -> tuple[Tensor, Tensor]:
        return self.checkpoints.state, self.checkpoints.conv_window

    def _store(self, handle: int, *parts: Tensor) -> None:
        data = torch.cat([part.contiguous().flatten().view(torch.uint8).cpu() for part in parts])
        self.entries[handle] = HostEntry(data, _checksum(data), self.generation)

    def _load_state(self, data: Tensor, slot: int) -> None:
        start = 0
        for part in self._state_parts():
            end = start + part[:, slot].nbytes
            part[:, slot] = data[start:end].view(part.dtype).view_as(part[:, slot])
            start = end


def _checksum(data: Tensor) -> int:
    return zlib.crc32(data.numpy().data)
