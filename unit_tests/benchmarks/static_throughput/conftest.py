"""A preset that an engine is made of in no time."""

from collections.abc import Iterator

import pytest

from benchmarks import random_checkpoint
from benchmarks.static_throughput.presets import Preset, open_preset
from unit_tests.benchmarks.test_gpu_suite import NANO


@pytest.fixture
def nano(monkeypatch: pytest.MonkeyPatch) -> Iterator[Preset]:
    """Two layers of random weights."""
    monkeypatch.setitem(random_checkpoint.OTHER_PRESETS, "nano", NANO)
    with open_preset("nano", 1, "cpu") as preset:
        yield preset
