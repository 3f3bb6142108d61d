"""Puts load on one server: so many conversations at a time, or so many that begin per second.

Time is the event loop's. Knows neither HTTP nor what is asked.
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.openai_server import Counters
from benchmarks.serving.answer import Answer
from benchmarks.serving.datasets import Conversation, Prompt

Numbered = Iterator[tuple[int, Conversation]]


class Asker(Protocol):
    """What sends requests: `benchmarks.serving.client.Client`, or a fake in the tests."""

    async def ask(self, index: int, turn: int, prompt: Prompt) -> Answer:
        """Request `turn` of conversation `index`, answered or failed."""


@dataclass(frozen=True)
class Load:
    """`concurrency`: `value` conversations at a time. `request_rate`: so many begin per second, with gaps of a gamma
    distribution of the shape `burstiness`: 1 is a Poisson process, less is more bursty, more is more even."""

    kind: str
    value: float
    burstiness: float = 1.0

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"

    def gaps(self, seed: str) -> Iterator[float]:
        """Seconds between two beginnings; the mean is 1 / rate."""
        if math.isinf(self.value):
            yield from itertools.repeat(0.0)
        rng = random.Random(seed)
        while True:
            yield rng.gammavariate(self.burstiness, 1 / (self.value * self.burstiness))


@dataclass
class Round:
    """What a server gave for one piece of load. `num_cut` requests had no answer when the run was broken off;
    `client_cpu_seconds` is what this process took of the cores, which a server on the same ones had to do without."""

    answers: list[Answer] = field(default_factory=list)
    num_started: int = 0
    seconds: float = 0.0
    client_cpu_seconds: float = 0.0
    counters: Counters = field(default_factory=dict)

    @property
    def num_cut(self) -> int:
        """Requests without an answer."""
        return self.num_started - len(self.answers)


@dataclass
class LoadRun:
    """One load on one server: begins no conversation after `duration` seconds, and ends when all have ended.

    `seed` is that of the gaps between beginnings; `on_end` is called after every conversation.
    """

    asker: Asker
    conversations: Numbered
    load: Load
    duration: float | None
    seed: str
    on_end: Callable[[], object]
    round: Round = field(default_factory=Round)
    _deadline: float | None = None

    async def run(self, stop: asyncio.Event) -> Round:
        """Serve it all, or what is there when `stop` is set; what is in flight then is cancelled."""
        now = asyncio.get_running_loop().time
        start, cpu = now(), time.process_time()
        self._deadline = None if self.duration is None else start + self.duration
        driving = asyncio.ensure_future(self._arrive() if self.load.kind == "request_rate" else self._take_turns())
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait((driving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if driving.done():
                driving.result()
        finally:
            for task in (driving, stopping):
                task.cancel()
            await asyncio.wait((driving, stopping))
        self.round.seconds = now() - start
        self.round.client_cpu_seconds = time.process_time() - cpu
        return self.round

    async def _take_turns(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(int(self.load.value)):
                group.create_task(self._converse_on())

    async def _converse_on(self) -> None:
        while not self._is_over():
            numbered = next(self.conversations, None)
            if numbered is None:
                return
            await self._converse(*numbered)

    async def _arrive(self) -> None:
        now = asyncio.get_running_loop().time
        due, gaps = now(), self.load.gaps(self.seed)
        async with asyncio.TaskGroup() as group:
            while not self._is_over():
                numbered = next(self.conversations, None)
                if numbered is None:
                    return
                group.create_task(self._converse(*numbered))
                due += next(gaps)
                await asyncio.sleep(max(0.0, due - now()))

    def _is_over(self) -> bool:
        return self._deadline is not None and asyncio.get_running_loop().time() >= self._deadline

    async def _converse(self, index: int, conversation: Conversation) -> None:
        said: list[str] = []
        for turn in range(len(conversation.turns)):
            self.round.num_started += 1
            answer = await self.asker.ask(index, turn, conversation.prompt(said))
            self.round.answers.append(answer)
            if answer.failure:
                break
            said.append(answer.text)
        self.on_end()
