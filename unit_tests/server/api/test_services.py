"""What handlers share."""

import asyncio
import threading

import pytest

from server.config import ServerConfig
from server.messages import SamplingParams

LONG = b" " * 5000


@pytest.mark.parametrize(
    ("body", "adds_more", "trusts", "is_apart"),
    [(b"x", False, False, False), (b"x", True, False, True), (b"x", False, True, True), (LONG, False, False, True)],
)
def test_long_bodies_are_read_off_the_event_loop_and_all_where_that_may_take_any_time(
    body: bytes, adds_more: bool, trusts: bool, is_apart: bool, make_serving
) -> None:
    services = make_serving(config=ServerConfig(trust_request_chat_template=trusts)).services
    thread, seen = asyncio.run(services.read(lambda body: (threading.current_thread(), body), body, adds_more))
    assert (thread is not threading.main_thread()) == is_apart
    assert seen == body


def test_a_slow_reader_does_not_hold_up_another(make_serving) -> None:
    services = make_serving().services
    released = threading.Event()

    async def talk() -> bytes:
        slow = asyncio.create_task(services.read(lambda _: released.wait(10), LONG))
        fast = await asyncio.wait_for(services.read(lambda body: body[:4], LONG), 10)
        released.set()
        assert await slow is True
        return fast

    assert asyncio.run(talk()) == LONG[:4]


def test_limits_are_the_engines(make_serving) -> None:
    serving = make_serving(
        defaults=SamplingParams(temperature=0.5), config=ServerConfig(logprobs_mode="processed_logprobs")
    )
    ready, limits = serving.engine.ready, serving.services.limits
    assert (limits.max_model_len, limits.vocab_size) == (ready.max_model_len, ready.vocab_size)
    assert limits.defaults == SamplingParams(temperature=0.5, logprobs_mode="processed_logprobs")
