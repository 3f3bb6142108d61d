"""Messages arrive as they were sent, both ways."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from server.channel import AsyncEnd, SyncEnd, decode, encode
from server.control import (
    AddTensors,
    BeginUpdate,
    CommitUpdate,
    Done,
    Pause,
    TensorSpec,
    UpdateWeights,
    WeightSource,
)
from server.errors import ConfigError
from server.messages import (
    Abort,
    EngineStats,
    Failed,
    Fatal,
    Generate,
    Ready,
    SamplingParams,
    StepReport,
    TokenLogprobs,
    TokenOutput,
)

SAMPLING = SamplingParams(
    temperature=0.5, seed=-(2**63), logit_bias={7: -1.5}, stop=("é", "b"), stop_token_ids=(1, 2), logprobs=3
)
SOURCE = WeightSource("inline", tensors=(TensorSpec("lm_head.weight", "bfloat16", (2, 3), "0f"),), data=(b"\x00\xff",))
BEGIN, COMMIT = BeginUpdate("u", SOURCE.tensors, is_delta=True, base_version="1"), CommitUpdate("u", "2", "retract")
MESSAGES = [
    Generate("r", [1, 2, 300_000], SAMPLING),
    Generate("r", [1], SamplingParams()),
    Abort("r"),
    Ready(10, 20, (1, 2), 3),
    Fatal("no memory"),
    Pause("p", "keep"),
    AddTensors("a", SOURCE),
    UpdateWeights("u", SOURCE, BEGIN, COMMIT),
    StepReport(
        [TokenOutput("r", [4, 5], [TokenLogprobs(-0.25, [4, 9], [-0.25, float("-inf")])], "stop", 5, 3, 4, 2)],
        [Failed("q", "InvalidRequest", "too long")],
        EngineStats(num_running=1, accepted_per_position=(4, 2), drafts_by_version={"1": ((5, 4), (4, 2))}),
        [Done("u", {"values": [0.5, -1.0], "name": "x"}), Done("p", {}, "another session is open", "Conflict")],
    ),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_wire(message: object) -> None:
    assert decode(encode(message)) == message


def test_both_ends_receive_in_order() -> None:
    async def talk() -> None:
        api = AsyncEnd()
        engine = SyncEnd(api.endpoint)
        for i in range(2000):  # more than a ZeroMQ queue holds by default
            engine.send(Fatal(str(i)))
        assert [(await api.receive()).message for _ in range(2000)] == [str(i) for i in range(2000)]
        for i in range(2000):
            api.send(Abort(str(i)))
        received: list[str] = []
        while len(received) < 2000:
            requests = await asyncio.to_thread(engine.receive, 5.0)
            assert requests, f"only {len(received)} messages came"
            received += [request.request_id for request in requests]
        assert received == [str(i) for i in range(2000)]
        engine.close()
        api.close()

    asyncio.run(talk())


def test_the_engine_end_waits_no_longer_than_asked() -> None:
    async def talk() -> list[object]:
        api = AsyncEnd()
        engine = SyncEnd(api.endpoint)
        received = engine.receive(0.0) + engine.receive(0.01)
        engine.close()
        api.close()
        return received

    assert asyncio.run(talk()) == []


def test_the_last_words_of_an_engine_arrive_after_it_closed() -> None:
    async def talk() -> object:
        api = AsyncEnd()

        def live_and_die() -> None:
            engine = SyncEnd(api.endpoint)
            engine.send(Fatal("last words"))
            engine.close()

        thread = threading.Thread(target=live_and_die)
        thread.start()
        reply = await asyncio.wait_for(api.receive(), 10)
        thread.join()
        api.close()
        return reply

    assert asyncio.run(talk()) == Fatal("last words")


@pytest.fixture
def temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for sockets, of which `tempfile` knows."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_the_socket_is_private_and_removed_on_close(temporary_directory: Path) -> None:
    async def open_and_close() -> None:
        api = AsyncEnd()
        (directory,) = temporary_directory.iterdir()
        assert directory.stat().st_mode & 0o077 == 0
        assert api.endpoint == f"ipc://{directory}/engine"
        api.close()

    if len(str(temporary_directory)) > 80:
        pytest.skip("the temporary directory's name is too long for a socket")
    asyncio.run(open_and_close())
    assert not os.listdir(temporary_directory)


def test_a_temporary_directory_with_a_long_name_is_an_error_that_names_the_mend(
    temporary_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = temporary_directory / ("x" * 110)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(ConfigError, match="TMPDIR"):
        AsyncEnd()
    assert not os.listdir(long)
