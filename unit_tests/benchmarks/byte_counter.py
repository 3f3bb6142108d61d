"""Counts what interpreted kernels touch: the different bytes that each launch loads, and those that it stores."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter


class ByteCounter:
    """`total` of all launches so far; atomics are not counted."""

    def __init__(self) -> None:
        self._total = 0
        self._touched: dict[str, list[np.ndarray]] = {"load": [], "store": []}

    def begin(self) -> None:
        """A launch begins."""
        self._total = self.total
        self._touched = {"load": [], "store": []}

    def touch(self, what: str, pointers: Any, mask: Any) -> None:
        """The launch loads from or stores to these pointers where the mask holds."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64).ravel()
        self._touched[what].append((addresses[:, None] + np.arange(size)).ravel())

    @property
    def total(self) -> int:
        """Bytes."""
        return self._total + sum(len(np.unique(np.concatenate(parts))) for parts in self._touched.values() if parts)


@contextmanager
def count_bytes() -> Iterator[ByteCounter]:
    """Inside, every interpreted launch is counted."""
    counter, builder = ByteCounter(), interpreter.InterpreterBuilder
    init, load, store = interpreter.GridExecutor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def init_arguments(self: Any, args: Any, kwargs: Any) -> Any:
        counter.begin()
        return init(self, args, kwargs)

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        counter.touch("load", ptrs, mask)
        return load(self, ptrs, mask, other, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counter.touch("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", init_arguments)
        patch.setattr(builder, "create_masked_load", masked_load)
        patch.setattr(builder, "create_masked_store", masked_store)
        yield counter
