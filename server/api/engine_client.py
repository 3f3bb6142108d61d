"""The api's view of the engine: hands requests over, gives each its outputs, aborts what nobody waits for.

Every submitted request ends: with a finish reason, with an error, or with an Abort when its `Outputs` is closed first.
Commands are awaited one by one, however long they take.
Used from one event loop. Knows token ids, never text; knows nothing of HTTP.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, Self

from server import errors
from server.control import Control, Done, RestoreMemory, Resume, RollBackUpdate
from server.errors import EngineDead, InvalidRequest, ModelFailure, QueueFull, RequestTimeout, TandemError
from server.messages import (
    FINISH_ABORT,
    Abort,
    EngineStats,
    Fatal,
    Generate,
    Ready,
    Reply,
    Request,
    SamplingParams,
    StepReport,
    TokenOutput,
)

log = logging.getLogger("tandem.api")


class Channel(Protocol):
    """What the client needs of a channel: `server.channel.AsyncEnd`, or a fake in the tests."""

    def send(self, message: Request) -> None:
        """Queue a message for the engine; never blocks."""

    async def receive(self) -> Reply:
        """The next message of the engine."""


class EngineClient:
    """Requests in flight and who waits for them.

    `failure` is what new requests are refused with: None while the engine serves; while it drains, commands that let
    requests go on still pass. `stats` is the engine's last word, and `observe` is told every one.
    """

    def __init__(self, channel: Channel, ready: Ready, max_requests: int):
        self._channel = channel
        self._max_requests = max_requests
        self._in_flight: dict[str, Outputs] = {}
        self._names: dict[str, str] = {}
        self._commands: dict[str, asyncio.Future[Done]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.ready = ready
        self.stats = EngineStats()
        self.observe: Callable[[EngineStats], None] = lambda _stats: None
        self.failure: EngineDead | None = None
        self._is_draining = False

    @property
    def num_in_flight(self) -> int:
        """Requests that have neither ended nor been aborted."""
        return len(self._in_flight)

    async def run(self) -> None:
        """Deliver the engine's messages until it says Fatal; then every request has failed."""
        while True:
            reply = await self._channel.receive()
            if isinstance(reply, StepReport):
                self._deliver(reply)
                await asyncio.sleep(0)  # receiving what is already there does not yield: let the streams write
            elif isinstance(reply, Fatal):
                log.error("the engine failed: %s", reply.message)
                self.fail(EngineDead(f"the engine failed: {reply.message}"))
                return

    def check_room(self, count: int) -> None:
        """Raise what `submit` of `count` requests would raise now."""
        if self.failure is not None:
            raise self.failure
        if count > self._max_requests:
            raise InvalidRequest(
                f"the request has {count} choices, the limit is {self._max_requests} (--max-queue); "
                "send fewer prompts or a smaller n"
            )
        if self.num_in_flight + count > self._max_requests:
            raise QueueFull(
                f"{self.num_in_flight} requests are in the server and {count} would join, the limit is "
                f"{self._max_requests} (--max-queue); try again later"
            )

    def submit(self, requests: Sequence[Generate], names: Sequence[str] = ()) -> "Outputs":
        """Start the requests; their outputs come mixed, in order of arrival. `find` knows them by their `names`.

        Raises QueueFull, EngineDead, or InvalidRequest for more than can ever fit.
        """
        self.check_room(len(requests))
        outputs = Outputs(self, [request.request_id for request in requests])
        for request in requests:
            self._in_flight[request.request_id] = outputs
            self._channel.send(request)
        self._names.update(zip((request.request_id for request in requests), names, strict=False))
        self._idle.clear()
        return outputs

    async def control(self, command: Control) -> Done:
        """What has come of a command. It is carried out even if nobody waits for that any more. Raises EngineDead."""
        lets_go_on = isinstance(command, Resume | RollBackUpdate | RestoreMemory)
        if self.failure is not None and not (self._is_draining and lets_go_on):
            raise self.failure
        done: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._commands[command.control_id] = done
        try:
            self._channel.send(command)
            return await done
        finally:
            del self._commands[command.control_id]

    def abort(self, request_id: str) -> None:
        """End a request that is in flight; nothing more will come from it. Others are ignored."""
        if request_id in self._in_flight:
            self._forget(request_id)
            self._channel.send(Abort(request_id))

    def find(self, is_wanted: Callable[[str], bool]) -> list[str]:
        """The requests in flight whose name is wanted."""
        return [request_id for request_id, name in self._names.items() if is_wanted(name)]

    def end(self, request_ids: Iterable[str]) -> None:
        """End requests that are in flight with what they have, as if their time were over. Others are ignored."""
        for request_id in request_ids:
            outputs = self._in_flight.get(request_id)
            if outputs is not None:
                self.abort(request_id)
                outputs.end(request_id)

    def refuse(self, failure: EngineDead) -> None:
        """Admit no more requests; those in flight go on."""
        if self.failure is None:
            self.failure, self._is_draining = failure, True

    def fail(self, failure: EngineDead) -> None:
        """Admit no more requests, and end those in flight with `failure`."""
        self.failure, self._is_draining = failure, False
        for request_id, outputs in list(self._in_flight.items()):
            self._forget(request_id)
            outputs.put(failure)
        for done in self._commands.values():
            if not done.done():
                done.set_exception(failure)

    async def check_generates(self, seconds: float) -> None:
        """Have one token generated, unless the engine is paused or its memory is released. Raises EngineDead if in this
        time there is neither that nor, where others are before it, one of theirs."""
        if self.stats.is_frozen:
            return
        prompt, sampling = [self.ready.eos_token_ids[0]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        num_before = self.stats.num_output_tokens
        try:
            with self.submit([Generate(f"probe-{uuid.uuid4().hex}", prompt, sampling)]) as outputs:
                await asyncio.wait_for(anext(outputs), seconds)
            return
        except QueueFull:
            await asyncio.sleep(seconds)
        except (TimeoutError, RequestTimeout):
            pass
        except ModelFailure as error:
            raise EngineDead(f"the engine cannot generate: {error.message}") from error
        if self.stats.num_output_tokens == num_before and not self.stats.is_frozen:
            raise EngineDead(f"the engine has generated nothing in {seconds:g} seconds")

    async def wait_idle(self) -> None:
        """Return when no request is in flight."""
        await self._idle.wait()

    def _deliver(self, report: StepReport) -> None:
        if report.stats.weight_version != self.stats.weight_version:
            for outputs in set(self._in_flight.values()):
                outputs.put(WeightsChanged(report.stats.weight_version))
        self.stats = report.stats
        self.observe(report.stats)
        for output in report.outputs:
            self._route(output.request_id, output, ends=output.finish_reason is not None)
        for failed in report.failed:
            error: TandemError = getattr(errors, failed.error)(failed.message, failed.param)
            self._route(failed.request_id, error, ends=True)
        for done in report.done:
            waiting = self._commands.get(done.control_id)
            if waiting is not None and not waiting.done():
                waiting.set_result(done)

    def _route(self, request_id: str, item: TokenOutput | TandemError, ends: bool) -> None:
        outputs = self._in_flight.get(request_id)
        if outputs is not None:  # else aborted while the output was on its way
            outputs.put(item)
            if ends:
                self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        del self._in_flight[request_id]
        self._names.pop(request_id, None)
        if not self._in_flight:
            self._idle.set()


@dataclass(frozen=True)
class WeightsChanged:
    """Stands between the outputs of two versions of the weights."""

    weight_version: str


class Outputs:
    """The outputs of requests that were submitted together; leaving the `with` block aborts those that still run.
    `weight_version` is that of the weights which made the last one."""

    def __init__(self, client: EngineClient, request_ids: Sequence[str]):
        self._client = client
        self._open = set(request_ids)
        self._items: asyncio.Queue[TokenOutput | WeightsChanged | TandemError] = asyncio.Queue()
        self._last: dict[str, TokenOutput] = {}
        self.weight_version = client.stats.weight_version

    def put(self, item: TokenOutput | WeightsChanged | TandemError) -> None:
        """Add an output, or the error that ends them all."""
        self._items.put_nowait(item)
        if isinstance(item, TokenOutput):
            self._last[item.request_id] = item

    def end(self, request_id: str) -> None:
        """Add an output that ends one of the requests where it is."""
        last = self._last.get(request_id, TokenOutput(request_id, []))
        told = replace(last, token_ids=[], logprobs=[], prompt_logprobs=[], drafted_steps=[], age=0.0)
        self.put(replace(told, finish_reason=FINISH_ABORT))

    def abort(self, request_id: str) -> None:
        """End one of the requests early."""
        self._open.discard(request_id)
        self._client.abort(request_id)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenOutput:
        """The next output; raises the error of the first request that failed. Ends when all requests have."""
        while self._open:
            item = await self._items.get()
            if isinstance(item, TandemError):
                raise item
            if isinstance(item, WeightsChanged):
                self.weight_version = item.weight_version
            elif item.request_id in self._open:
                if item.finish_reason is not None:
                    self._open.discard(item.request_id)
                return item
        raise StopAsyncIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for request_id in list(self._open):
            self.abort(request_id)
