"""No kernel may touch memory that is not its own, and no product of a row may depend on its neighbours."""

from collections.abc import Iterator

import pytest

from unit_tests.kernels.gpu.memory_guard import guard_memory
from unit_tests.kernels.gpu.row_products import multiply_row_by_row


@pytest.fixture(autouse=True)
def guarded_memory() -> Iterator[None]:
    """Every launch of every test here is watched."""
    with guard_memory():
        yield


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """A row's bits depend on the kernel alone."""
    with multiply_row_by_row():
        yield
