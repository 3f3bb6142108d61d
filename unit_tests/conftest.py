"""Settings of every test: one thread, and a reason where a test needs a device that is not there."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which happens later
os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # read when triton is: kernels run on the CPU, one program after the other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` without a CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
