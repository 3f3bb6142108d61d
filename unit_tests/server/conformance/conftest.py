"""Two real servers of the demo checkpoint, without drafts and with three in every step, and a client for each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from benchmarks.serving.launch import launched_servers
from server.config import DEMO_MODEL
from unit_tests.server.conformance.answers import Answer, ask, assert_same

START_SECONDS = 300
_FLAGS = f"--model {DEMO_MODEL} --dtype float32 --num-threads 1"
_COMMANDS = (f"{_FLAGS} --mtp-step 0", f"{_FLAGS} --mtp-step 3 --speculation fixed")


@dataclass(frozen=True)
class Pair:
    """Clients of the two servers."""

    plain: openai.OpenAI
    drafting: openai.OpenAI

    def ask(self, endpoint: str, is_streamed: bool = True, **fields: Any) -> Answer:
        """What both say, whole and streamed; all of it must be equal."""
        expected = ask(self.plain, endpoint, **fields)
        for stream in (False, True) if is_streamed else (False,):
            assert_same(ask(self.drafting, endpoint, stream, **fields), expected)
        return expected


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Both servers, for all tests."""
    with launched_servers(_COMMANDS, START_SECONDS) as urls:
        clients = [openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) for url in urls]
        yield Pair(*clients)


@pytest.fixture(params=["plain", "drafting"])
def client(pair: Pair, request: pytest.FixtureRequest) -> openai.OpenAI:
    """The client of either server."""
    return getattr(pair, request.param)
