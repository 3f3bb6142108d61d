"""What handlers share."""

import asyncio
import threading

from server.config import ServerConfig
from server.messages import SamplingParams


def test_reading_happens_off_the_event_loop(make_serving) -> None:
    services = make_serving().services
    reader_thread = asyncio.run(services.read(lambda body: (threading.current_thread(), body), b"x"))
    assert reader_thread[0] is not threading.main_thread()
    assert reader_thread[1] == b"x"


def test_a_slow_reader_does_not_hold_up_another(make_serving) -> None:
    services = make_serving().services
    released = threading.Event()

    async def talk() -> bytes:
        slow = asyncio.create_task(services.read(lambda _: released.wait(10), b""))
        fast = await asyncio.wait_for(services.read(lambda body: body, b"fast"), 10)
        released.set()
        assert await slow is True
        return fast

    assert asyncio.run(talk()) == b"fast"


def test_limits_are_the_engines(make_serving) -> None:
    serving = make_serving(
        defaults=SamplingParams(temperature=0.5), config=ServerConfig(logprobs_mode="processed_logprobs")
    )
    ready, limits = serving.engine.ready, serving.services.limits
    assert (limits.max_model_len, limits.vocab_size) == (ready.max_model_len, ready.vocab_size)
    assert limits.defaults == SamplingParams(temperature=0.5, logprobs_mode="processed_logprobs")
