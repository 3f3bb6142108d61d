"""What every handler works with, made once at start and passed to each."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from server.api.engine_client import EngineClient
from server.api.metrics import Metrics
from server.api.prompts import PromptReader
from server.api.sampling import Limits
from server.messages import SamplingParams
from server.tokenizer import Tokenizer

T = TypeVar("T")
# A few threads, so that short requests do not queue behind a long prompt.
_NUM_READERS = 4


@dataclass(frozen=True)
class Services:
    """One served model: its names and limits, its tokenizer, the way to its engine."""

    model_name: str
    created: int
    tokenizer: Tokenizer
    client: EngineClient
    limits: Limits
    prompts: PromptReader
    metrics: Metrics
    readers: ThreadPoolExecutor

    async def read(self, reader: Callable[[bytes], T], body: bytes) -> T:
        """`reader(body)` in the thread pool, so that no stream waits for it."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, reader, body)


def build_services(
    model_name: str, created: int, tokenizer: Tokenizer, client: EngineClient, defaults: SamplingParams
) -> Services:
    """The services for an engine that is ready; `created` is a Unix time in seconds."""
    ready = client.ready
    return Services(
        model_name=model_name,
        created=created,
        tokenizer=tokenizer,
        client=client,
        limits=Limits(
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            mtp_step=ready.mtp_step,
            defaults=defaults,
        ),
        prompts=PromptReader(tokenizer, ready.max_model_len, ready.vocab_size),
        metrics=Metrics(model_name, lambda: client.stats),
        readers=ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="reader"),
    )
