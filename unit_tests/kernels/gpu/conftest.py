"""No kernel may touch memory that is not its own."""

from collections.abc import Iterator

import pytest

from unit_tests.kernels.gpu.memory_guard import guard_memory


@pytest.fixture(autouse=True)
def guarded_memory() -> Iterator[None]:
    """Every launch of every test here is watched."""
    with guard_memory():
        yield
