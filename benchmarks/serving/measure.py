"""Puts every load on every server, in rounds: in each one the servers take turns, and all are asked the same.

No two rounds ask the same, as a server would have the prompts in its prefix cache.
"""

import argparse
import asyncio
import gc
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import httpx
from tqdm import tqdm

from benchmarks.openai_server import Server, growth
from benchmarks.serving.client import Client
from benchmarks.serving.datasets import COMPLETIONS, MEANINGLESS, Conversation, Dataset, make_dataset
from benchmarks.serving.load import Load, LoadRun, Numbered, Round

MIN_PROMPTS = 32
PROMPTS_PER_CLIENT = 8
MIN_WARMUPS = 4


@dataclass(frozen=True)
class Contestant:
    """A server, the name it goes by, and what asks it."""

    name: str
    server: Server
    client: Client


@dataclass(frozen=True)
class Result:
    """What came of one load: the rounds of each server."""

    load: Load
    rounds: list[list[Round]]


@dataclass
class Measured:
    """All results. `num_asked` conversations of the data set were used, `prompt_unit` is what lengths count."""

    dataset: Dataset
    prompt_unit: str
    results: list[Result] = field(default_factory=list)
    num_asked: int = 0
    is_partial: bool = False


@asynccontextmanager
async def contestants_for(
    servers: Sequence[tuple[str, Server]],
    args: argparse.Namespace,
    transport: httpx.AsyncBaseTransport | None = None,
) -> AsyncIterator[list[Contestant]]:
    """The servers by name, each with a client that knows what it tells. `transport` takes the place of the network.
    Raises RunFailed for one that answers nothing."""
    async with AsyncExitStack() as stack:
        contestants = []
        for name, server in servers:
            client = Client(server.url, args.model or server.model, server.headers, args, transport)
            contestants.append(Contestant(name, server, await stack.enter_async_context(client)))
            await client.probe()
        yield contestants


async def measure(
    contestants: Sequence[Contestant], dataset: Dataset, args: argparse.Namespace, stop: asyncio.Event
) -> Measured:
    """Measure it all, or what there is until `stop` is set."""
    takes_ids = await _take_token_ids(contestants, args)
    measured = Measured(make_dataset(args, takes_ids) if takes_ids else dataset, "tokens" if takes_ids else "words")
    conversations = _Numbered(measured.dataset.conversations)
    for load in args.loads:
        measured.results.append(Result(load, [[] for _ in contestants]))
        await _run_load(measured.results[-1], contestants, conversations, args, stop)
    measured.num_asked, measured.is_partial = conversations.num_used, stop.is_set()
    return measured


async def _take_token_ids(contestants: Sequence[Contestant], args: argparse.Namespace) -> bool:
    if args.dataset not in MEANINGLESS or args.endpoint != COMPLETIONS:
        return False
    return all([await one.client.takes_token_ids() for one in contestants])


class _Numbered(Iterator[tuple[int, Conversation]]):
    """Conversations with their numbers from 0; `num_used` were taken."""

    def __init__(self, conversations: Iterator[Conversation]):
        self._conversations = conversations
        self.num_used = 0

    def __next__(self) -> tuple[int, Conversation]:
        self.num_used += 1
        return self.num_used - 1, next(self._conversations)

    def copies(self, count: int | None, num_copies: int) -> tuple[Numbered, ...]:
        """The next so many, several times over; None: without end."""
        return itertools.tee(itertools.islice(self, count), num_copies)


async def _run_load(
    result: Result,
    contestants: Sequence[Contestant],
    conversations: _Numbered,
    args: argparse.Namespace,
    stop: asyncio.Event,
) -> None:
    load = result.load
    await _warm_up(load, contestants, conversations, args, stop)
    for number in range(args.rounds):
        copies = conversations.copies(_num_prompts(load, args), len(contestants))
        # Backwards in every other round: what a server still does after its turn is not always at the same one's cost.
        direction = 1 if number % 2 == 0 else -1
        for place in range(len(contestants)):
            which = (number + direction * place) % len(contestants)
            if stop.is_set():
                return
            one, name = contestants[which], f"{load} {contestants[which].name} round {number + 1}/{args.rounds}"
            with tqdm(desc=name, total=_num_prompts(load, args), leave=False) as bar:
                seed = f"{args.seed} {load} {number}"
                run = LoadRun(one.client, copies[which], load, args.duration, seed, bar.update)
                before = one.server.read_counters()
                gc.collect()
                gc.freeze()  # a collection that looks at all that is loaded would keep every stream waiting
                result.rounds[which].append(await run.run(stop))
                run.round.counters = growth(before, one.server.read_counters())


async def _warm_up(
    load: Load,
    contestants: Sequence[Contestant],
    conversations: _Numbered,
    args: argparse.Namespace,
    stop: asyncio.Event,
) -> None:
    """A few requests that count for nothing, as many at a time as the load has."""
    is_closed = load.kind == "concurrency"
    size = args.num_warmups if args.num_warmups is not None else max(MIN_WARMUPS, int(load.value) if is_closed else 0)
    together = Load("concurrency", load.value if is_closed else max(1, size))
    for one, copy in zip(contestants, conversations.copies(size, len(contestants)), strict=True):
        with tqdm(desc=f"{load} {one.name} warm-up", total=size, leave=False) as bar:
            if not stop.is_set():
                await LoadRun(one.client, copy, together, None, "", bar.update).run(stop)


def _num_prompts(load: Load, args: argparse.Namespace) -> int | None:
    """Conversations of one round: by default 8 for each client, or those of 8 seconds, at least 32."""
    if args.num_prompts is not None or args.duration is not None:
        count: int | None = args.num_prompts
        return count
    return max(MIN_PROMPTS, int(PROMPTS_PER_CLIENT * load.value)) if load.value < float("inf") else MIN_PROMPTS
