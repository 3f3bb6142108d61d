"""The line about throughput has what happened since the last one, and is not written while nothing happens."""

import asyncio
import logging

import pytest

from server.api.throughput import describe_interval, log_throughput
from server.messages import EngineStats

BEFORE = EngineStats(
    num_steps=10,
    num_prompt_tokens=1000,
    num_cached_tokens=100,
    num_output_tokens=500,
    num_verify_steps=200,
    num_proposed=300,
    num_accepted=250,
)
AFTER = EngineStats(
    num_running=3,
    num_waiting=4,
    num_pages=100,
    num_free_pages=75,
    num_steps=20,
    num_prompt_tokens=1400,
    num_cached_tokens=200,
    num_output_tokens=600,
    num_verify_steps=250,
    num_proposed=400,
    num_accepted=325,
)


def test_figures_are_those_of_the_interval() -> None:
    assert describe_interval(BEFORE, AFTER, 2.0) == {
        "prompt_tokens_per_s": 150.0,
        "output_tokens_per_s": 50.0,
        "running": 3,
        "waiting": 4,
        "kv_usage": 0.25,
        "prefix_hit_rate": 0.25,
        "accept_length": 2.5,
        "acceptance_rate": 0.75,
    }


def test_shares_of_nothing_are_absent() -> None:
    figures = describe_interval(EngineStats(), EngineStats(), 1.0)
    assert [name for name, value in figures.items() if value is None] == [
        "kv_usage",
        "prefix_hit_rate",
        "accept_length",
        "acceptance_rate",
    ]


def test_a_line_is_written_when_the_engine_has_made_steps_and_only_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tandem.throughput")
    reads: list[int] = []

    def read_stats() -> EngineStats:
        reads.append(0)
        return BEFORE if len(reads) < 4 else AFTER

    async def run() -> None:
        task = asyncio.create_task(log_throughput(read_stats, 0.001))
        while len(reads) < 8:
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(run())
    (line,) = [record for record in caplog.records if record.name == "tandem.throughput"]
    assert line.fields["running"] == 3 and line.fields["output_tokens_per_s"] > 0
