"""OpenAI's asynchronous client: many requests at once are what each is alone, and leaving some harms none."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from unit_tests.server.conformance.answers import (
    CHAT,
    COMPLETIONS,
    STRANGE_QUESTION,
    Answer,
    arguments,
    ask,
    assert_same,
    read_stream,
    read_whole,
    say,
)

pytestmark = pytest.mark.slow
NUM_REQUESTS = 16


@asynccontextmanager
async def asynchronous(client: openai.OpenAI) -> AsyncIterator[openai.AsyncOpenAI]:
    """An asynchronous client of the same server."""
    async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as other:
        yield other


async def ask_async(client: openai.AsyncOpenAI, endpoint: str, stream: bool, **fields: Any) -> Answer:
    """As `ask`."""
    resource = client.chat.completions if endpoint == CHAT else client.completions
    call = arguments(endpoint, return_token_ids=True, **fields)
    if not stream:
        return read_whole((await resource.create(**call)).model_dump())
    chunks = await resource.create(**call, stream=True, stream_options={"include_usage": True})
    return read_stream([chunk.model_dump() async for chunk in chunks])


def make_request(index: int) -> tuple[str, dict[str, Any]]:
    """Endpoint and fields of request `index`, all of them different."""
    endpoint = (CHAT, COMPLETIONS)[index % 2]
    shapes = ({}, {"presence_penalty": 1.5, "top_k": 20}, {"n": 2, "stop": ["a"]}, {"logit_bias": {"40": 2}})
    law = {"temperature": index % 3 / 1.5, "seed": index}
    prompt = say(endpoint, f"{STRANGE_QUESTION} {index}")
    return endpoint, {**prompt, "max_tokens": 5 + index, **shapes[index // 2 % 4], **law}


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """The result, within a minute."""
    return asyncio.run(asyncio.wait_for(work, 60))


@pytest.mark.parametrize("stream", [False, True])
def test_many_at_once_are_what_each_is_alone(client: openai.OpenAI, stream: bool) -> None:
    requests = [make_request(index) for index in range(NUM_REQUESTS)]

    async def ask_all() -> list[Answer]:
        async with asynchronous(client) as other:
            return await asyncio.gather(*(ask_async(other, endpoint, stream, **f) for endpoint, f in requests))

    for (endpoint, fields), answer in zip(requests, run(ask_all()), strict=True):
        assert_same(answer, ask(client, endpoint, **fields))


def test_requests_that_are_given_up_hold_nobody_up(client: openai.OpenAI) -> None:
    """More than there are rows, as soon as one of them has begun to answer."""

    async def give_up() -> Answer:
        async with asynchronous(client) as other:
            fields, has_begun = {"max_tokens": 3000, "ignore_eos": True}, asyncio.Event()

            async def read_on() -> None:
                async for _ in await other.completions.create(**arguments(COMPLETIONS, **fields), stream=True):
                    has_begun.set()

            tasks = [asyncio.create_task(read_on()) for _ in range(20)]
            tasks += [asyncio.create_task(ask_async(other, COMPLETIONS, False, **fields)) for _ in range(20)]
            await has_begun.wait()
            for task in tasks:
                task.cancel()
            assert all(
                isinstance(result, asyncio.CancelledError)
                for result in await asyncio.gather(*tasks, return_exceptions=True)
            )
            return await ask_async(other, CHAT, False, temperature=0, max_tokens=10)

    assert_same(run(give_up()), ask(client, CHAT, temperature=0, max_tokens=10))


def test_errors_are_the_same_exceptions(client: openai.OpenAI) -> None:
    async def ask_wrongly(**fields: Any) -> None:
        async with asynchronous(client) as other:
            await ask_async(other, CHAT, False, **fields)

    with pytest.raises(openai.BadRequestError, match="temperature is 3"):
        run(ask_wrongly(temperature=3))
    with pytest.raises(openai.NotFoundError, match="nobody"):
        run(ask_wrongly(model="nobody"))
