"""One change of the weights that serve: tensors are checked and laid ready while the old ones serve, then exchanged.

Laid ready means in the memory's own dtype and layout, norms as 1 + w, quantized weights as words and scales, so that
the exchange is nothing but copies. Parameters keep their memory, and whoever holds its address (CUDA graphs, the C++
decoder, a tied head) sees the new weights.
"""

import copy
import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.quantized_linear import QuantizedWeight
from models.errors import CheckpointError, WeightUpdateError
from models.safetensors_file import FLOAT_TYPES, FileTensor
from models.weight_slot import WeightSlot, row_blocks
from models.weights import WeightCoverage, fused_name, normalise_name

if TYPE_CHECKING:
    from models.weight_store import WeightStore

# So many numbers torch copies on the calling thread, which then never waits for one that has no processor; and they
# stay in the processor's cache on their way. A GPU wants more at a time.
BLOCK_NUMBERS, GPU_BLOCK_NUMBERS = 2**15 - 1, 2**23
_WORD = torch.int64
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_TYPES.values()}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an update, by checkpoint name: `dtype` as torch spells it ("bfloat16"), and the SHA-256 of its
    bytes, row-major and little-endian, as they are after the update; empty: not told."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str = ""


@dataclass(frozen=True)
class UpdateReport:
    """What a commit changed: whether tensors of the target and of the draft head came, and how many bytes of memory
    were exchanged."""

    touched_target: bool
    touched_draft: bool
    num_bytes: int


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, row-major, as a hexadecimal number."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def combine_checksums(checksums: dict[str, str]) -> str:
    """One SHA-256 for many tensors: that of the sorted lines "name sha256"."""
    lines = [f"{name} {checksum}\n" for name, checksum in checksums.items()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row-major; of one that lies so in host memory its own."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


@contextmanager
def update_errors() -> Iterator[None]:
    """What is wrong with a checkpoint is here wrong with an update."""
    try:
        yield
    except WeightUpdateError:
        raise
    except CheckpointError as error:
        raise WeightUpdateError(str(error)) from error


@dataclass(frozen=True)
class Exchange:
    """Numbers that serve, flat, and those that will be in their place: all of them, or those at `indices`."""

    serving: Tensor
    staged: Tensor
    indices: Tensor | None = None

    def blocks(self) -> "Iterator[Exchange]":
        """The same in parts."""
        step = GPU_BLOCK_NUMBERS if self.serving.is_cuda else BLOCK_NUMBERS
        if self.indices is None:
            for serving, staged in zip(*(part.split(step) for part in self._as_words()), strict=True):
                yield Exchange(serving, staged)
        else:
            for indices, staged in zip(self.indices.split(step), self.staged.split(step), strict=True):
                yield Exchange(self.serving, staged, indices)

    def _as_words(self) -> tuple[Tensor, Tensor]:
        """Both memories as numbers of 8 bytes, where they are made of them."""
        is_odd = self.serving.nbytes % 8 or self.serving.storage_offset() * self.serving.itemsize % 8
        return (self.serving, self.staged) if is_odd else (self.serving.view(_WORD), self.staged.view(_WORD))

    def run(self) -> None:
        """Exchange the two. If that fails the serving numbers are as they were; a second run takes it back."""
        indices = self.indices if self.indices is None else self.indices.to(self.serving.device)
        held = self.serving.clone() if indices is None else self.serving.index_select(0, indices)
        with ExitStack() as undo:
            undo.callback(self._write, held, indices)
            self._write(self.staged, indices)
            self.staged.copy_(held)
            undo.pop_all()

    def _write(self, values: Tensor, indices: Tensor | None) -> None:
        if indices is None:
            self.serving.copy_(values)
        else:
            self.serving.index_copy_(0, indices, values.to(self.serving.device))


class WeightUpdate:
    """One session: any number of `add` and `add_delta`, from any threads, then `prepare`, `commit`, `close`.

    They raise WeightUpdateError, after which only `close` makes sense. Until `commit` has returned the old weights
    serve.
    """

    def __init__(
        self,
        store: "WeightStore",
        tensors: Sequence[TensorSpec],
        is_partial: bool,
        is_delta: bool,
        needs_mtp: bool,
        result_sha256: str,
    ):
        self._store, self._is_partial, self._is_delta = store, is_partial or is_delta, is_delta
        self._needs_mtp, self._result_sha256 = needs_mtp, result_sha256
        self._generation, self._is_declared = store.generation, len(tensors) > 0
        self._is_prepared = self._is_closed = False
        self._failure = ""
        self._lock = threading.Lock()
        self._arrived = self._coverage()
        self._declared: dict[str, TensorSpec] = {}
        self._hashes: dict[str, str] = {}
        self._staged: dict[str, list[Exchange]] = {}
        self._shadows: dict[QuantizedWeight, QuantizedWeight] = {}
        with self._working():
            self._declare(tensors)

    def add(self, name: str, tensor: Tensor | FileTensor) -> None:
        """Take a whole tensor; it is copied. One in a file is read block by block, and not at all if it is skipped."""
        with self._working():
            slot = self._place(name, tensor.shape, tensor.dtype)
            if slot is None:
                return
            shadow, digest = self._shadow(slot), hashlib.sha256()
            for rows, values in row_blocks(tensor):
                if self._is_hashed(slot.name):
                    digest.update(bytes_of(values))
                shadow.load_rows(rows, values)
            is_shared = isinstance(slot.param, QuantizedWeight)  # and exchanged with the others of its memory
            self._stage(slot, [] if is_shared else _exchanges(slot, shadow), digest.hexdigest())

    def skips(self, name: str) -> bool:
        """Whether `add` does not look at what is in such a tensor."""
        return self._arrived.skip_reason(normalise_name(name)) is not None

    @torch.no_grad()
    def add_delta(self, name: str, indices: Tensor, values: Tensor) -> None:
        """Take the numbers of a tensor that change: where they lie in it, flat and ascending, and what they become."""
        with self._working():
            if not self._is_delta:
                raise WeightUpdateError(
                    f"tensor {name} is a delta, and the session is one for whole tensors: send full"
                )
            known = self._arrived.slots.get(normalise_name(name))
            slot = self._place(name, () if known is None else known.checkpoint_shape, values.dtype)
            if slot is None:
                return
            self._check_dtype(slot, values.dtype)
            result, indices, values = self._store.export_slot(slot).cpu(), indices.cpu(), values.cpu()
            _check_indices(name, indices, values, result.numel())
            indices = indices.long()
            result.view(-1)[indices] = values
            digest = hash_tensor(result) if self._is_hashed(slot.name) else ""
            self._stage(slot, _sparse(slot, result, indices, values), digest)

    def prepare(self) -> None:
        """Everything has come: see that it is complete and what its result will be. Nothing that serves changes."""
        with self._working():
            missing = [spec.name for name, spec in self._declared.items() if name not in self._arrived.placed]
            unfinished = sorted(self._arrived.placed - self._staged.keys())
            if missing or unfinished:
                raise WeightUpdateError(
                    f"{len(missing) + len(unfinished)} tensors have not come, the first is "
                    f"{[*missing, *unfinished][0]}: send all that were declared before the commit"
                )
            self._finish(self._arrived)
            self._arrived.log_skipped()
            if self._result_sha256:
                self._check_result()
            self._is_prepared = True

    @torch.no_grad()
    def commit(self) -> UpdateReport:
        """Exchange the weights, between two steps. If anything raises, all those that serve are as they were."""
        with self._working():
            if not self._is_prepared:
                raise WeightUpdateError("the update is not prepared: prepare it, or begin a new one")
            exchanges = [exchange for staged in self._staged.values() for exchange in staged]
            exchanges += [exchange for pair in self._shadows.items() for exchange in _quantized_exchanges(*pair)]
            with ExitStack() as undo:
                for block in (block for exchange in exchanges for block in exchange.blocks()):
                    block.run()
                    undo.callback(block.run)
                self._store.record(self._new_dtypes())
                undo.pop_all()
        touched_target = not all(name.startswith("mtp.") for name in self._arrived.placed)
        num_bytes = sum(exchange.staged.nbytes for exchange in exchanges)
        return UpdateReport(touched_target, self._arrived.has_draft_come, num_bytes)

    def close(self) -> None:
        """Forget what came. The weights that serve stay as they are."""
        with self._lock:
            self._is_closed = True
            self._staged, self._shadows = {}, {}

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Refuse work in a session that is over; one in which anything goes wrong is."""
        self._check_open()
        if self._failure:
            raise WeightUpdateError(f"the weight session has failed ({self._failure}): begin a new one")
        if self._generation != self._store.generation:
            raise WeightUpdateError("the served weights have changed since the session began: begin a new one")
        with ExitStack() as stack:
            stack.push(self._note_failure)
            with update_errors():
                yield

    def _check_open(self) -> None:
        if self._is_closed:
            raise WeightUpdateError("the weight session is closed: begin a new one")

    def _note_failure(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if kind is not None and not self._failure:
            self._failure = str(error) or kind.__name__

    def _coverage(self) -> WeightCoverage:
        return WeightCoverage(self._store.target, self._store.draft, "update")

    def _declare(self, tensors: Sequence[TensorSpec]) -> None:
        if self._is_delta and self._store.is_quantized:
            raise WeightUpdateError(
                "the served weights are quantized, so no single number of them can change: send full"
            )
        coverage = self._coverage()
        for spec in tensors:
            slot = coverage.place(spec.name, spec.shape, _dtype(spec))
            name = normalise_name(spec.name)
            if slot is not None:
                self._declared[name] = spec
                if self._is_delta:
                    self._check_dtype(slot, _dtype(spec))
            elif spec.sha256:
                self._hashes[name] = spec.sha256.lower()  # not looked at, but a part of the sender's result
        if tensors:
            self._finish(coverage)

    def _place(self, name: str, shape: Sequence[int], dtype: torch.dtype | str) -> WeightSlot | None:
        with self._lock:
            self._is_prepared = False
            slot = self._arrived.place(name, shape, dtype)
        if slot is None or not self._is_declared:
            return slot
        spec, dtype = self._declared.get(slot.name), FLOAT_TYPES.get(str(dtype), dtype)
        if spec is None:
            raise WeightUpdateError(f"tensor {name} is not among the {len(self._declared)} that were declared: add it")
        if dtype != _dtype(spec):
            raise WeightUpdateError(
                f"tensor {name} is {dtype} and was declared as {spec.dtype}: send what was declared"
            )
        return slot

    def _check_dtype(self, slot: WeightSlot, dtype: torch.dtype | str) -> None:
        """A delta has the numbers of the tensor that it changes."""
        served = self._store.dtype_of(slot)
        if dtype != served:
            raise WeightUpdateError(
                f"the delta of tensor {slot.name} is {dtype}, and it is served as {served}: send full"
            )

    def _shadow(self, slot: WeightSlot) -> WeightSlot:
        """Memory for what came. Parts of a quantized weight share a copy of it, for their rows lie in one tile."""
        if not isinstance(slot.param, QuantizedWeight):
            return slot.shadow()
        with self._lock:
            if slot.param not in self._shadows:
                self._shadows[slot.param] = copy.deepcopy(slot.param)
            return replace(slot, param=self._shadows[slot.param])

    def _is_hashed(self, name: str) -> bool:
        return bool(self._result_sha256 or (name in self._declared and self._declared[name].sha256))

    def _stage(self, slot: WeightSlot, exchanges: list[Exchange], digest: str) -> None:
        expected = self._declared[slot.name].sha256 if slot.name in self._declared else ""
        if expected and digest != expected.lower():
            reason = "its delta was made for other weights than those that serve, or " if self._is_delta else ""
            raise WeightUpdateError(
                f"tensor {slot.name} has SHA-256 {digest[:16]}..., {expected[:16]}... was declared: "
                f"{reason}its bytes changed on the way: send full"
            )
        with self._lock:
            self._check_open()
            self._hashes[slot.name] = digest
            self._staged[slot.name] = exchanges

    def _finish(self, coverage: WeightCoverage) -> None:
        if self._needs_mtp and coverage.has_draft and not coverage.has_draft_come:
            raise WeightUpdateError(
                "the update has no mtp.* tensor, but a draft head is served: send its weights along"
            )
        coverage.finish(self._is_partial, self._needs_mtp)

    def _check_result(self) -> None:
        hashes = {name: digest for name, digest in self._hashes.items() if fused_name(name) == name}
        for name in self._arrived.slots:
            if fused_name(name) == name and name not in hashes:
                self._check_hashable(name)
                hashes[name] = hash_tensor(self._result(name))
        result = combine_checksums(hashes)
        if result != self._result_sha256.lower():
            raise WeightUpdateError(
                f"the update would give weights of SHA-256 {result[:16]}..., {self._result_sha256[:16]}... was "
                "declared: it was made for other weights than those that serve, or lacks some: send full"
            )

    def _check_hashable(self, name: str) -> None:
        """A quantized tensor counts as it came, and of one that came in parts nobody has kept that."""
        is_quantized = isinstance(self._arrived.slots[name].param, QuantizedWeight)
        if is_quantized and any(fused_name(part) == name for part in self._arrived.placed):
            raise WeightUpdateError(
                f"tensor {name} is served quantized and came in parts, so result_sha256 cannot be checked: send it "
                "whole, or leave result_sha256 out"
            )

    def _result(self, name: str) -> Tensor:
        """A tensor as it will be that did not come in one piece, but perhaps in some of its experts."""
        values = self._store.export_slot(self._arrived.slots[name]).cpu()
        values = values.to(self._new_dtypes().get(name, values.dtype))
        for part, exchanges in self._staged.items():
            if fused_name(part) == name:
                for exchange in exchanges:
                    numbers = values[self._arrived.slots[part].index].view(-1)
                    numbers[... if exchange.indices is None else exchange.indices] = exchange.staged.to(values.dtype)
        return values

    def _new_dtypes(self) -> dict[str, torch.dtype]:
        """Those of the tensors that came; where only some experts did, one that has room for the others, too."""
        dtypes, slots = dict(self._arrived.dtypes), self._arrived.slots
        for name in dtypes:
            if not self._arrived.is_filled(name):
                dtypes[name] = torch.promote_types(dtypes[name], self._store.dtype_of(slots[name]))
        return dtypes


def _dtype(spec: TensorSpec) -> torch.dtype | str:
    name = spec.dtype.removeprefix("torch.")
    return DTYPES.get(name, name)


def _exchanges(slot: WeightSlot, shadow: WeightSlot) -> list[Exchange]:
    return [Exchange(*pair) for pair in zip(slot.memory(), shadow.memory(), strict=True)]


def _quantized_exchanges(weight: QuantizedWeight, shadow: QuantizedWeight) -> list[Exchange]:
    pairs = ((weight.words, shadow.words), (weight.scales, shadow.scales))
    return [Exchange(serving.data.view(-1), staged.data.view(-1)) for serving, staged in pairs]


def _sparse(slot: WeightSlot, result: Tensor, indices: Tensor, values: Tensor) -> list[Exchange]:
    """The exchange of a few numbers; a norm, which lies in memory as 1 + w and as w, is small: of all of it."""
    if slot.unshifted is not None:
        shadow = slot.shadow()
        shadow.load(result)
        return _exchanges(slot, shadow)
    [serving] = slot.memory()
    return [Exchange(serving, values.to(serving.dtype, copy=True), indices)]


def _check_indices(name: str, indices: Tensor, values: Tensor, numel: int) -> None:
    """Raises WeightUpdateError unless they are ascending places in a tensor of `numel` numbers, one for each value."""
    if (
        indices.is_floating_point()
        or indices.dtype == torch.bool
        or indices.dim() != 1
        or values.shape != indices.shape
    ):
        raise WeightUpdateError(
            f"the delta of tensor {name} has {indices.dtype} indices {list(indices.shape)} for {list(values.shape)} "
            "values: send one integer for each value"
        )
    places = indices.long()
    if len(places) and not (places[0] >= 0 and places[-1] < numel):
        raise WeightUpdateError(
            f"the delta of tensor {name} has indices from {places[0]} to {places[-1]}, there are {numel}: send full"
        )
    unsorted = (places[1:] <= places[:-1]).nonzero()
    if len(unsorted):
        first = int(unsorted[0])
        raise WeightUpdateError(
            f"the delta of tensor {name} has index {places[first + 1]} behind {places[first]}: sort them, each once"
        )
