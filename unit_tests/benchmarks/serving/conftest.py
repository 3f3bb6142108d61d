"""Fake servers for the tests of the load generator."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from unit_tests.benchmarks.serving.fake_server import FakeModel, serving


@pytest.fixture
def serve() -> Iterator[Callable[[FakeModel], str]]:
    """Serves fake models over sockets until the test ends; gives their URLs."""
    with contextlib.ExitStack() as stack:
        yield lambda model: stack.enter_context(serving(model))
