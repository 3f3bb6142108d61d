"""Requests wait for their grammars outside of the scheduler; here the compiler is a list of promises."""

import math
from concurrent.futures import Future
from typing import Any

import pytest

from server.backend.grammar_queue import GrammarQueue
from server.errors import InvalidRequest
from server.messages import Constraint, Failed, Generate, SamplingParams
from server.request import Request

GRAMMAR = SamplingParams(constraint=Constraint("regex", "a", field="guided_regex"))


class FakeMatcher:
    """Allows everything."""

    def copy(self) -> "FakeMatcher":
        return FakeMatcher()

    def fill(self, masks: Any, row: int) -> None:
        """Leave the row as it is."""

    def error(self) -> str:
        """Nothing ever fails."""
        return ""


class FakeCompiler:
    """Keeps what it has promised."""

    def __init__(self) -> None:
        self.promises: list[Future[Any]] = []

    def compile(self, constraint: Constraint) -> "Future[Any]":
        self.promises.append(Future())
        return self.promises[-1]


@pytest.fixture
def compiler() -> FakeCompiler:
    return FakeCompiler()


@pytest.fixture
def queue(compiler: FakeCompiler) -> GrammarQueue:
    return GrammarQueue(compiler, (7,), 32)  # type: ignore[arg-type]


def make_request(name: str, sampling: SamplingParams = GRAMMAR, deadline: float = math.inf) -> Request:
    return Request.create(Generate(name, [1], sampling), (7,), 99, deadline)


def test_a_request_is_ready_when_its_grammar_is(queue: GrammarQueue, compiler: FakeCompiler) -> None:
    first, second = make_request("first"), make_request("second")
    queue.add(first)
    queue.add(second)
    assert queue.take(0.0) == ([], []) and len(queue) == 2
    compiler.promises[1].set_result(FakeMatcher())
    assert queue.take(0.0) == ([second], []) and second.matcher is not None
    compiler.promises[0].set_result(FakeMatcher())
    assert queue.take(0.0) == ([first], []) and len(queue) == 0


def test_without_a_grammar_it_is_ready_at_once(queue: GrammarQueue, compiler: FakeCompiler) -> None:
    request = make_request("a", SamplingParams(allowed_token_ids=(3,)))
    queue.add(request)
    queue.wait()
    assert queue.take(0.0) == ([request], []) and request.matcher is not None and not compiler.promises


def test_what_cannot_be_compiled_fails_with_the_field_that_asked(queue: GrammarQueue, compiler: FakeCompiler) -> None:
    queue.add(make_request("bad"))
    compiler.promises[0].set_exception(InvalidRequest("unclosed group"))
    ready, failed = queue.take(0.0)
    message = "guided_regex is no regex that can be served: unclosed group"
    assert ready == [] and failed == [Failed("bad", "InvalidRequest", message, "guided_regex")]
    assert len(queue) == 0


def test_what_nobody_foresaw_of_a_grammar_fails_its_request_alone(
    queue: GrammarQueue, compiler: FakeCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    good = make_request("good")
    for request in (make_request("bad"), good):
        queue.add(request)
    compiler.promises[0].set_exception(RecursionError("too deep"))
    compiler.promises[1].set_result(FakeMatcher())
    ready, (failed,) = queue.take(0.0)
    assert ready == [good] and (failed.request_id, failed.error, failed.param) == ("bad", "TandemError", "guided_regex")
    assert "too deep" in failed.message and "compiling a regex failed" in caplog.text


def test_an_aborted_request_and_one_that_is_late_wait_no_longer(queue: GrammarQueue) -> None:
    late = make_request("late", deadline=5.0)
    queue.add(make_request("gone"))
    queue.add(late)
    queue.remove("gone")
    queue.remove("gone")
    assert queue.take(5.0) == ([], [])
    assert queue.take(5.1) == ([late], [])  # the scheduler ends it
    assert len(queue) == 0


def test_a_wait_ends_though_nothing_becomes_ready(queue: GrammarQueue) -> None:
    queue.add(make_request("slow"))
    queue.wait()
    assert queue.take(0.0) == ([], [])


def test_all_are_given_up_at_once(queue: GrammarQueue) -> None:
    requests = [make_request("a"), make_request("b", SamplingParams(allowed_token_ids=(3,)))]
    for request in requests:
        queue.add(request)
    assert list(queue) == ["a", "b"] and "a" in queue and "c" not in queue
    assert queue.clear() == requests
    assert len(queue) == 0 and queue.take(0.0) == ([], [])
