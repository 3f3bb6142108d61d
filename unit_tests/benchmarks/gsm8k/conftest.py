"""Fake servers and data for the tests of the GSM8K harness."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from unit_tests.benchmarks.gsm8k.fake_server import FakeServer
from unit_tests.benchmarks.gsm8k.splits import write_splits


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    """Starts fake servers, and stops them after the test."""
    started = []

    def start(*args: Any) -> FakeServer:
        started.append(FakeServer(*args))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory with train.jsonl and test.jsonl."""
    return write_splits(tmp_path / "data")
