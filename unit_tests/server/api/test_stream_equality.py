"""A stream says what the whole answer says, wherever steps cut its tokens and whatever strings end it."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest

from server.config import EngineConfig
from server.messages import Failed, TokenOutput
from server.tokenizer import Tokenizer
from unit_tests.server.api.conftest import InlineChannel, Serving
from unit_tests.server.api.test_completion_prompts import complete
from unit_tests.server.api.test_transport import DEADLINE_SECONDS, Connection
from unit_tests.server.fake_engine import EOS_ID, MAX_MODEL_LEN, FakeEngine

ALPHABET = "aä中字😀👩‍🚀🇪🇺é \nthe"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class RaggedEngine(FakeEngine):
    """Steps of any number of tokens, none of them the same for two requests."""

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self.rng = random.Random(0)

    def count_next_tokens(self, is_first: bool) -> int:
        """1..9."""
        return self.rng.randint(1, self.ready.mtp_step + 1)


class WaitingEngine(FakeEngine):
    """Computes nothing more after a step until its channel is told to go on."""

    channel: InlineChannel

    def step(self) -> list[TokenOutput | Failed]:
        """One step, then a pause."""
        outputs = super().step()
        self.channel.paused = bool(outputs)
        return outputs


@pytest.fixture
def ragged(tokenizer: Tokenizer) -> Iterator[Serving]:
    """A serving whose steps are cut at random."""
    serving = Serving(RaggedEngine(EngineConfig(mtp_step=8)), tokenizer)
    with serving.listening():
        yield serving


def make_text(rng: random.Random, longest: int) -> str:
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, longest)))


def make_stops(rng: random.Random, text: str) -> list[str]:
    """Parts of the text, of its beginning again behind its end, and strings that are not there."""
    twice = text + text
    starts = [rng.randrange(len(text)) for _ in range(rng.randint(1, 3))]
    return [*(twice[start : start + rng.randint(1, 5)] for start in starts), make_text(rng, 3) + "#"]


def cut(text: str, stops: list[str], keeps_stop: bool) -> str:
    """`text` up to the stop string that ends first, and of those the longest."""
    found = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not found:
        return text
    end, length = min(found)
    return text[:end] if keeps_stop else text[: end + length]


def check(text: str, whole: str, stops: list[str], keeps_stop: bool) -> None:
    assert text == whole
    assert "\ufffd" not in text
    assert keeps_stop or not any(stop in text for stop in stops)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_streamed_completions_are_the_whole_ones(ragged: Serving, seed: int) -> None:
    rng, tokenizer = random.Random(seed), ragged.tokenizer
    for _ in range(100):
        prompt = make_text(rng, 20)
        ids = tokenizer.encode(prompt)
        max_tokens = len(ids) * rng.randint(1, 3)
        assert EOS_ID not in ids and len(ids) + max_tokens <= MAX_MODEL_LEN
        stops, keeps_stop = make_stops(rng, prompt) if rng.random() < 0.8 else [], rng.random() < 0.3
        fields = {"prompt": prompt, "max_tokens": max_tokens, "stop": stops, "include_stop_str_in_output": keeps_stop}
        expected = cut(tokenizer.decode((ids * 3)[:max_tokens]), stops, keeps_stop)
        fields |= {"logprobs": rng.choice([None, 1]), "return_token_ids": rng.random() < 0.5}
        whole, streamed = (complete(ragged, stream, **fields) for stream in (False, True))
        check(streamed["text"], expected, stops, keeps_stop)
        for name in ("text", "finish_reason", "stop_reason", "logprobs"):
            assert whole[name] == streamed[name], name


@pytest.mark.slow
def test_streamed_chats_are_the_whole_ones(ragged: Serving) -> None:
    rng = random.Random(9)
    for _ in range(100):
        content = make_text(rng, 12)
        stops, keeps_stop = make_stops(rng, content), rng.random() < 0.3
        fields: dict[str, Any] = {"max_tokens": 60, "stop": stops, "include_stop_str_in_output": keeps_stop}
        message = ragged.chat(content, **fields)["choices"][0]["message"]["content"]
        body = {"messages": [{"role": "user", "content": content}], **fields}
        chunks = [c for event in ragged.events(CHAT, **body) for c in event["choices"]]
        check("".join(c["delta"].get("content") or "" for c in chunks), message, stops, keeps_stop)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_a_step_gave_is_sent_before_the_next_one_is_computed(tokenizer: Tokenizer, path: str) -> None:
    serving = Serving(WaitingEngine(EngineConfig(mtp_step=0)), tokenizer)
    serving.engine.channel = serving.channel
    prompt = {"prompt": "fox", "messages": [{"role": "user", "content": "fox"}]}
    connection = Connection(serving, path, stream=True, max_tokens=4, return_token_ids=True, **prompt)

    async def talk() -> None:
        async with serving.delivering(), asyncio.timeout(DEADLINE_SECONDS):
            answering = asyncio.create_task(connection.run())
            for num_steps in range(1, 5):
                while connection.text().count('"token_ids":[') < num_steps:
                    await asyncio.sleep(0)
                assert serving.engine.stats().num_steps == num_steps
                serving.channel.paused = False
            await answering

    asyncio.run(talk())
    assert connection.text().endswith("data: [DONE]\n\n")
