"""The engine loop over a real channel, with a fake engine."""

import asyncio
import itertools
import logging
import multiprocessing
import os
import threading
from types import SimpleNamespace

import pytest
import tqdm

from server import engine_process
from server.channel import AsyncEnd
from server.config import ENGINE_ENVIRONMENT, EngineConfig
from server.control import Control, Pause, Resume
from server.engine_process import KEEP_SECONDS, run, take_turn
from server.messages import (
    Abort,
    EngineStats,
    Fatal,
    Generate,
    Ready,
    Reply,
    Request,
    SamplingParams,
    StepReport,
)
from unit_tests.server.fake_engine import LONG_ID, RAISE_ID, REFUSE_ID, FakeEngine

FAKE = "unit_tests.server.fake_engine:FakeEngine"


def _generate(request_id: str, prompt: list[int]) -> Generate:
    return Generate(request_id, prompt, SamplingParams(max_tokens=4))


def test_a_turn_without_work_and_messages_says_nothing() -> None:
    assert take_turn(FakeEngine(EngineConfig()), []) is None
    assert take_turn(FakeEngine(EngineConfig()), [], is_due=True) is None


def test_an_abort_alone_gives_a_report_so_that_the_gauges_fall() -> None:
    engine = FakeEngine(EngineConfig(mtp_step=0))
    whole = [Generate(name, [5] * 9, SamplingParams(max_tokens=9), told_whole=True) for name in "ab"]
    assert take_turn(engine, whole) is None
    for name, num_left in (("a", 1), ("b", 0)):
        report = take_turn(engine, [Abort(name)])
        assert report is not None
        assert (report.stats.num_running, report.outputs) == (num_left, [])


def test_requests_that_come_while_there_is_work_are_told_of_later_others_at_once() -> None:
    engine = FakeEngine(EngineConfig(mtp_step=0))
    whole = [Generate(name, [5] * 9, SamplingParams(max_tokens=9), told_whole=True) for name in "abc"]
    assert take_turn(engine, whole[:1]) is None
    assert take_turn(engine, whole[1:2]) is None
    report = take_turn(engine, [], is_due=True)
    assert report is not None and report.stats.num_running == 2
    assert [output.token_ids for output in report.outputs] == [[5, 5, 5], [5, 5]]
    engine.has_work = lambda: False  # type: ignore[method-assign]
    report = take_turn(engine, whole[2:])
    assert report is not None and report.stats.num_running == 3


def test_a_refused_request_fails_and_the_others_go_on() -> None:
    requests = [_generate("bad", [REFUSE_ID]), _generate("good", [5])]
    report = take_turn(FakeEngine(EngineConfig()), requests)
    assert report is not None
    assert [(f.request_id, f.error) for f in report.failed] == [("bad", "InvalidRequest")]
    assert [output.request_id for output in report.outputs] == ["good"]


def _replies(config: EngineConfig, prompt: list[int]) -> list[object]:
    """Everything the engine process says until Fatal, with one request sent after Ready."""

    async def talk() -> list[object]:
        api = AsyncEnd()
        engine = asyncio.create_task(asyncio.to_thread(_run_to_exit, config, api.endpoint))
        replies: list[object] = []
        while not (replies and isinstance(replies[-1], Fatal)):
            replies.append(await asyncio.wait_for(api.receive(), 10))
            if isinstance(replies[-1], Ready):
                api.send(_generate("r", prompt))
        assert await engine == 1
        api.close()
        return replies

    return asyncio.run(talk())


def _run_to_exit(config: EngineConfig, endpoint: str) -> object:
    with pytest.raises(SystemExit) as exit:
        run(config, endpoint, "info", FAKE)
    return exit.value.code


def test_a_checkpoint_error_at_start_is_told_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    (fatal,) = _replies(EngineConfig(chunked_prefill_size=13), [5])
    assert isinstance(fatal, Fatal)
    assert "truncated" in fatal.message
    assert not caplog.records


@pytest.mark.parametrize(
    ("chunked_prefill_size", "prompt"), [(14, [5]), (16, [RAISE_ID])], ids=["at start", "in a step"]
)
def test_a_bug_is_logged_with_its_traceback_and_told(
    caplog: pytest.LogCaptureFixture, chunked_prefill_size: int, prompt: list[int]
) -> None:
    replies = _replies(EngineConfig(chunked_prefill_size=chunked_prefill_size), prompt)
    assert isinstance(replies[-1], Fatal)
    assert replies[-1].message.startswith("RuntimeError: a bug")
    assert any(record.exc_info for record in caplog.records if record.levelno >= logging.ERROR)


def test_progress_bars_leave_no_semaphore_behind_when_the_engine_is_killed() -> None:
    tqdm.tqdm.set_lock(multiprocessing.RLock())
    _replies(EngineConfig(chunked_prefill_size=13), [5])
    assert isinstance(tqdm.tqdm.get_lock(), type(threading.RLock()))


def test_torch_finds_what_serving_wants_unless_the_user_wants_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENGINE_ENVIRONMENT:
        monkeypatch.setenv(name, "7")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    _replies(EngineConfig(chunked_prefill_size=13), [5])
    assert {name: os.environ[name] for name in ENGINE_ENVIRONMENT} == {
        **dict.fromkeys(ENGINE_ENVIRONMENT, "7"),
        "THP_MEM_ALLOC_ENABLE": "1",
    }


def test_the_loop_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk() -> list[object]:
        api = AsyncEnd()
        lives = iter([True, True, True, False])
        monkeypatch.setattr(engine_process, "_parent_lives", lambda: next(lives))
        engine = asyncio.create_task(asyncio.to_thread(run, EngineConfig(), api.endpoint, "info", FAKE))
        replies = [await asyncio.wait_for(api.receive(), 10)]
        api.send(_generate("r", [5, 6, 7, 8]))
        replies.append(await asyncio.wait_for(api.receive(), 10))
        await asyncio.wait_for(engine, 10)
        api.close()
        return replies

    ready, report = asyncio.run(talk())
    assert isinstance(ready, Ready)
    assert isinstance(report, StepReport)


class ChangingEngine(FakeEngine):
    """Its weights change with the command after the one that begins the change."""

    is_changing = False
    version = "old"

    def control(self, command: Control) -> None:
        super().control(command)
        self.is_changing = isinstance(command, Pause)
        if not self.is_changing:
            self.version = "new"

    def stats(self) -> EngineStats:
        return EngineStats(weight_version=self.version)


def test_what_old_weights_made_is_told_before_they_change() -> None:
    engine = ChangingEngine(EngineConfig(mtp_step=0))
    whole = Generate("a", [5, 6, 7, 8, 9], SamplingParams(max_tokens=9), told_whole=True)
    reports = [take_turn(engine, requests) for requests in ([whole], [], [], [Pause("p")], [Resume("r")])]
    told = [
        (report.stats.weight_version, [token for output in report.outputs for token in output.token_ids])
        for report in reports
        if report is not None
    ]
    assert told == [("old", [5, 6, 7, 8]), ("new", [])]
    done = [done.control_id for report in reports if report is not None for done in report.done]
    assert done == ["p", "r"]


def test_what_is_kept_back_is_told_when_the_engine_has_no_work_any_more() -> None:
    engine = FakeEngine(EngineConfig(mtp_step=0))
    whole = Generate("a", [5, 6, 7], SamplingParams(max_tokens=9), told_whole=True)
    for requests in ([whole], [], []):
        take_turn(engine, requests)
    engine.has_work = lambda: False  # type: ignore[method-assign]
    report = take_turn(engine, [Pause("p")])
    assert report is not None and [output.token_ids for output in report.outputs] == [[5, 6, 7]]


class ScriptedChannel:
    """Brings messages turn by turn, and remembers what is sent."""

    def __init__(self, *turns: list[Request]):
        self._turns = list(turns)
        self.sent: list[Reply] = []

    def receive(self, timeout_seconds: float) -> list[Request]:
        return self._turns.pop(0) if self._turns else []

    def send(self, message: Reply) -> None:
        self.sent.append(message)


def test_what_is_kept_back_is_told_every_tenth_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    moments, lives = itertools.count(), iter([True] * 12 + [False])
    monkeypatch.setattr(engine_process, "time", SimpleNamespace(monotonic=lambda: next(moments) * KEEP_SECONDS / 4))
    monkeypatch.setattr(engine_process, "_parent_lives", lambda: next(lives))
    channel = ScriptedChannel([Generate("a", [LONG_ID, 5], SamplingParams(), told_whole=True)])
    engine_process.serve(FakeEngine(EngineConfig(mtp_step=0)), channel)  # type: ignore[arg-type]
    reports = [message for message in channel.sent if isinstance(message, StepReport)]
    assert [len(output.token_ids) for report in reports for output in report.outputs] == [4, 4, 4]
    assert len(reports) == 3
