"""Gives memory of an engine without requests back to the machine, and takes it again: for a trainer that shares it.

Tensors and their views stay the same objects; only their storages shrink to nothing, and grow again elsewhere. What
knows addresses forgets them: the C++ decoders of a CPU, and decode graphs, which are made anew once nothing is released
any more. What pages and states held is gone, so the caller flushes the prefix cache.
"""

import ctypes
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, UntypedStorage

from server.backend.device import MIB
from server.errors import ConfigError, Conflict

if TYPE_CHECKING:
    from server.backend.runner import Runner

WEIGHTS, KV_CACHE, CUDA_GRAPH = "weights", "kv_cache", "cuda_graph"


@dataclass
class ReleasedMemory:
    """What a runner has given back: `tags`, with their storages and the sizes these had.

    `are_discarded`: there are no weights, until an update brings all of them (`check_update`), after which whoever
    commits it calls `note_loaded`.
    """

    tags: set[str] = field(default_factory=set)
    are_discarded: bool = False
    sizes: dict[str, list[tuple[UntypedStorage, int]]] = field(default_factory=dict)
    saved: "FileCopy | PinnedCopy | None" = None

    @property
    def can_run(self) -> bool:
        """Requests may run: everything is there."""
        return not self.tags and not self.are_discarded

    def check_update(self, is_whole: bool) -> None:
        """Raises Conflict for a weight update that cannot be taken now; one that `is_whole` brings every tensor, the
        draft head's too."""
        if WEIGHTS in self.tags:
            raise Conflict("the weights' memory is released, so there is nothing to update: resume it first")
        if self.are_discarded and not is_whole:
            raise Conflict("the weights were discarded, the draft head's too: an update must bring all of them")

    def note_loaded(self) -> None:
        """A whole update has been committed."""
        self.are_discarded = False


class FileCopy:
    """Contents of storages of a CPU, in a temporary file without a name, which gives memory back unless TMPDIR lies in
    memory itself. Raises ConfigError where there is no room."""

    def __init__(self, storages: Sequence[UntypedStorage]):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `load`)
        try:
            for storage in storages:
                self._file.write(_buffer(storage))
            self._file.flush()
        except OSError as error:
            size = sum(storage.nbytes() for storage in storages) / MIB
            raise ConfigError(
                f"the weights' {size:.1f} MiB cannot be kept in a file in {tempfile.gettempdir()} ({error.strerror}): "
                "set TMPDIR to a directory with more room, or have the weights discarded"
            ) from error

    def load(self, storages: Sequence[UntypedStorage]) -> None:
        """Put the contents back into the same storages, as large as they were; ends the copy."""
        self._file.seek(0)
        for storage in storages:
            num_read = self._file.readinto(_buffer(storage))
            assert num_read == storage.nbytes(), "the file is shorter than what was written"
        self._file.close()


class PinnedCopy:
    """Contents of storages of a GPU, in pinned memory of the host. Raises ConfigError where there is none."""

    def __init__(self, storages: Sequence[UntypedStorage]):
        sources = [_as_bytes(storage) for storage in storages]
        try:
            self._copies = [torch.empty(len(source), dtype=torch.uint8, pin_memory=True) for source in sources]
        except RuntimeError as error:
            size = sum(map(len, sources)) / MIB
            raise ConfigError(
                f"the weights' {size:.1f} MiB cannot be kept in pinned host memory ({str(error).splitlines()[0]}): "
                "free memory of the host, or have the weights discarded"
            ) from error
        for copy, source in zip(self._copies, sources, strict=True):
            copy.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    def load(self, storages: Sequence[UntypedStorage]) -> None:
        """Put the contents back into the same storages, as large as they were."""
        for copy, storage in zip(self._copies, storages, strict=True):
            _as_bytes(storage).copy_(copy, non_blocking=True)
        torch.cuda.synchronize()


def release(runner: "Runner", tags: Sequence[str], discards_weights: bool = False) -> int:
    """Give back the memory of `tags`, of an engine without requests; returns its bytes.

    Weights are kept: of a GPU in the host's memory, of a CPU in a file; with discards_weights they are not. Decode
    graphs go with any tag, because they know where weights and caches lie. Raises Conflict for what is released
    already, and ConfigError where weights cannot be kept; nothing has changed then.
    """
    released = runner.released
    if again := [tag for tag in tags if tag in released.tags]:
        raise Conflict(f"the memory of {again[0]} is released already: resume it first")
    sizes = {tag: [(storage, storage.nbytes()) for storage in _storages(runner, tag)] for tag in tags}
    assert all(storage.resizable() for pairs in sizes.values() for storage, _ in pairs), "NumPy has seen it"
    if WEIGHTS in tags:
        if not (discards_weights or released.are_discarded):
            kind = PinnedCopy if runner.table.device == "cuda" else FileCopy
            released.saved = kind([storage for storage, _ in sizes[WEIGHTS]])
        released.are_discarded |= discards_weights
    num_bytes = 0
    if tags and not released.tags and runner.decode is not None:
        num_bytes = runner.decode.release()
    for storage, size in (pair for pairs in sizes.values() for pair in pairs):
        storage.resize_(0)
        num_bytes += size
    released.sizes |= sizes
    released.tags |= set(tags)
    _trim(runner.table.device)
    return num_bytes


def restore(runner: "Runner", tags: Sequence[str]) -> int:
    """Take the memory of those of `tags` again that are released; returns its bytes.

    Weights have their values again, and those that were discarded are zero, as caches are. Raises ConfigError where
    memory runs out: `released.tags` are then what is still to be restored, by the same call if need be.
    """
    released = runner.released
    tags = [tag for tag in dict.fromkeys(tags) if tag in released.tags]
    num_bytes = 0
    for tag in tags:
        num_bytes += _restore_one(released, tag)
    for model in (runner.target, runner.draft):
        if model is not None:
            model.forget_addresses()
    if tags and not released.tags and runner.decode is not None:
        released.tags.add(CUDA_GRAPH)
        num_bytes += runner.decode.restore()
        released.tags.remove(CUDA_GRAPH)
    return num_bytes


def _restore_one(released: ReleasedMemory, tag: str) -> int:
    sizes = released.sizes.get(tag, [])
    num_bytes, storages = sum(size for _, size in sizes), [storage for storage, _ in sizes]
    try:
        for storage, size in sizes:
            storage.resize_(size)
    except RuntimeError as error:
        for storage in storages:
            storage.resize_(0)
        raise ConfigError(
            f"out of memory for {tag}, which takes {num_bytes / MIB:.1f} MiB ({str(error).splitlines()[0]}): free the "
            "device of other processes and resume again"
        ) from error
    if tag == WEIGHTS and released.saved is not None:
        released.saved.load(storages)
        released.saved = None
    else:
        for storage in storages:
            _as_bytes(storage).zero_()
    released.sizes.pop(tag, None)
    released.tags.remove(tag)
    return num_bytes


def _storages(runner: "Runner", tag: str) -> list[UntypedStorage]:
    """What holds the tensors of a tag, each once."""
    tensors: Iterable[Tensor] = ()
    if tag == WEIGHTS:
        models = [model for model in (runner.target, runner.draft) if model is not None]
        tensors = (weight for model in models for weight in model.parameters())
    elif tag == KV_CACHE:
        tensors = _cache_tensors(runner)
    storages = (tensor.untyped_storage() for tensor in tensors)
    return list({storage.data_ptr(): storage for storage in storages if storage.nbytes()}.values())


def _cache_tensors(runner: "Runner") -> Iterator[Tensor]:
    """Everything that belongs to requests and is larger than a few numbers for each."""
    table, cache, checkpoints = runner.table, runner.table.cache, runner.mover.checkpoints
    yield from (cache.kv.data, cache.gdn.state, *cache.gdn.ring, cache.gdn.conv_ring)
    yield from (checkpoints.state, checkpoints.conv_window)
    if cache.history is not None:
        yield from (cache.history.hidden, cache.history.token_ids)
    if cache.scratch is not None:
        yield from cache.scratch
    if table.output_counts is not None and table.in_prompt is not None:
        yield from (table.output_counts, table.in_prompt)


def _as_bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _buffer(storage: UntypedStorage) -> "ctypes.Array[ctypes.c_char]":
    """The same memory for files. Not by NumPy, which would fix the storage's size for ever."""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())


def _trim(device: str) -> None:
    """Have the allocator give the machine what it keeps for later."""
    if device == "cuda":
        torch.cuda.empty_cache()
    elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
