"""What every handler works with, made once at start and passed to each."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from server.api.engine_client import EngineClient
from server.api.metrics import Metrics
from server.api.prompts import PromptReader
from server.api.sampling import Limits
from server.api.transport import BodyReader
from server.config import EngineConfig, ServerConfig
from server.messages import SamplingParams
from server.tokenizer import Tokenizer

A = TypeVar("A")
T = TypeVar("T")
# A few threads, so that short requests do not queue behind a long prompt.
_NUM_READERS = 4
# Bytes of a body that is read in a millisecond or two at the most: as a rule its way to a thread and back takes longer.
# A template of a request's own may take any time.
_SHORT_BODY = 4096


@dataclass(frozen=True)
class Services:
    """One served model: its names (the first is the one in answers) and limits, its tokenizer, the way to its engine,
    and the settings of both processes."""

    model_names: tuple[str, ...]
    created: int
    tokenizer: Tokenizer
    client: EngineClient
    limits: Limits
    prompts: PromptReader
    metrics: Metrics
    readers: ThreadPoolExecutor
    bodies: BodyReader
    config: ServerConfig
    engine_config: EngineConfig

    @property
    def model_name(self) -> str:
        """The model's name in answers."""
        return self.model_names[0]

    async def read(self, reader: Callable[[bytes], T], body: bytes, adds_more: bool = False) -> T:
        """`reader(body)`, apart if the body is long, or if it `adds_more` to read, as long as that may be."""
        if len(body) <= _SHORT_BODY and not (adds_more or self.config.trust_request_chat_template):
            return reader(body)
        return await self.do_apart(reader, body)

    async def do_apart(self, work: Callable[[A], T], matter: A) -> T:
        """`work(matter)` in the thread pool, so that no stream waits for it."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, work, matter)


def build_services(
    model_name: str,
    created: int,
    tokenizer: Tokenizer,
    client: EngineClient,
    defaults: SamplingParams,
    config: ServerConfig | None = None,
    engine_config: EngineConfig | None = None,
) -> Services:
    """The services for an engine that is ready; `created` is a Unix time in seconds. The model is served as
    `model_name` unless the settings have names for it."""
    ready, config = client.ready, config or ServerConfig()
    names = config.served_model_name or (model_name,)
    metrics = Metrics(names[0], lambda: client.stats, ready)
    client.observe = metrics.observe_step
    return Services(
        model_names=names,
        created=created,
        tokenizer=tokenizer,
        client=client,
        limits=Limits(
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            mtp_step=ready.mtp_step,
            defaults=replace(defaults, logprobs_mode=config.logprobs_mode),
            max_logprobs=ready.vocab_size if config.max_logprobs < 0 else config.max_logprobs,
        ),
        prompts=PromptReader(
            tokenizer,
            ready.max_model_len,
            ready.vocab_size,
            config.default_chat_template_kwargs or {},
            config.trust_request_chat_template,
        ),
        metrics=metrics,
        readers=ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="reader"),
        bodies=BodyReader(config.client_timeout),
        config=config,
        engine_config=engine_config or EngineConfig(),
    )
