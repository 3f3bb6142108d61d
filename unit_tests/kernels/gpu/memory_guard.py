"""Watches what interpreted kernels touch: a load or store outside the tensors they were given is an error.

The interpreter itself reads and writes host memory wherever a pointer leads, silently.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


class MemoryGuard:
    """Knows the memory of the tensors of the launch under way."""

    def __init__(self) -> None:
        self._starts = self._ends = np.zeros(0, np.int64)

    def enter(self, arguments: Any) -> None:
        """A launch begins with these arguments."""
        storages = [one.untyped_storage() for one in _flatten(arguments) if isinstance(one, torch.Tensor)]
        spans = sorted({(one.data_ptr(), one.nbytes()) for one in storages})
        self._starts = np.array([start for start, _ in spans], np.int64)
        self._ends = np.array([start + size for start, size in spans], np.int64)

    def check(self, pointers: Any, mask: Any, what: str) -> None:
        """Raises IndexError if an unmasked pointer leaves the tensors."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        index = np.searchsorted(self._starts, addresses, side="right") - 1
        is_inside = (index >= 0) & (addresses + size <= self._ends[index])
        if not is_inside.all():
            raise IndexError(f"a kernel {what} {int((~is_inside).sum())} values outside its tensors")


@contextmanager
def guard_memory() -> Iterator[None]:
    """Inside, every interpreted launch is watched."""
    guard, builder = MemoryGuard(), interpreter.InterpreterBuilder
    init, load, store = interpreter.GridExecutor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def init_arguments(self: Any, args: Any, kwargs: Any) -> Any:
        result = init(self, args, kwargs)
        guard.enter(result)
        return result

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        guard.check(ptrs, mask, "loads")
        return load(self, ptrs, mask, other, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        guard.check(ptrs, mask, "stores")
        return store(self, ptrs, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", init_arguments)
        patch.setattr(builder, "create_masked_load", masked_load)
        patch.setattr(builder, "create_masked_store", masked_store)
        yield


def _flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _flatten(one)
    else:
        yield value
