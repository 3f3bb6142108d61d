"""Triton's interpreter with products that sum every row by itself, as a GPU's do.

It multiplies tiles by numpy's BLAS, which on some processors sums a row in another order beside other rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter


@contextmanager
def multiply_row_by_row() -> Iterator[None]:
    """Within it `tl.dot` gives a row the same bits in any tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _create_dot)
        yield


def _create_dot(_builder: Any, a: Any, b: Any, d: Any, _precision: Any, _max_num_imprecise_acc: Any) -> Any:
    """a [.., M, K] times b [.., K, N] plus d, as M products of one row."""
    products = np.matmul(a.data[..., None, :], b.data[..., None, :, :], dtype=d.data.dtype)
    return interpreter.TensorHandle(products[..., 0, :] + d.data, d.dtype.scalar)
