"""The HTTP application with a fake engine in the same process, and without sockets."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from models.training import demo_tokenizer
from server.api.app import build_app
from server.api.engine_client import EngineClient
from server.api.exchange import Exchange
from server.api.services import Services, build_services
from server.config import EngineConfig, ServerConfig
from server.engine_process import KEEP_SECONDS, Engine, take_turn
from server.messages import Reply, Request, SamplingParams
from server.tokenizer import Tokenizer
from unit_tests.server.api.scripted_engine import ScriptedEngine
from unit_tests.server.fake_engine import FakeEngine


class InlineChannel:
    """A channel whose other end is an engine that steps when it is listened to. `sent` records the api's messages."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._inbox: list[Request] = []
        self._told_at = time.monotonic()
        self.sent: list[Request] = []
        self.paused = False

    def send(self, message: Request) -> None:
        """Keep the message for the next turn."""
        self.sent.append(message)
        self._inbox.append(message)

    async def receive(self) -> Reply:
        """The report of the next turn that has something to say."""
        while True:
            await asyncio.sleep(0)
            if self.paused:
                continue
            requests, self._inbox = self._inbox, []
            is_due = time.monotonic() - self._told_at >= KEEP_SECONDS
            self._told_at = time.monotonic() if is_due else self._told_at
            report = take_turn(self._engine, requests, is_due)
            if report is not None:
                return report
            await asyncio.sleep(0.001)  # an idle engine blocks on its socket; this loop must not spin


class Serving:
    """One served engine, a fake one for most tests: the parts, and a client."""

    def __init__(
        self,
        engine: Any,
        tokenizer: Tokenizer,
        max_requests: int = 64,
        defaults: SamplingParams | None = None,
        config: ServerConfig | None = None,
        observers: Sequence[Callable[[Exchange], None]] = (),
        engine_config: EngineConfig | None = None,
    ):
        self.engine = engine
        self.channel = InlineChannel(self.engine)
        self.tokenizer = tokenizer
        self.client = EngineClient(self.channel, self.engine.ready, max_requests)
        self.services: Services = build_services(
            "tiny", 1700000000, tokenizer, self.client, defaults or SamplingParams(), config, engine_config
        )
        self.app: FastAPI = build_app(self.services, observers)
        self.http: TestClient

    @contextmanager
    def listening(self) -> Iterator[None]:
        """With `http`, a client that sees whole answers."""
        with TestClient(self.app, raise_server_exceptions=False) as self.http:
            assert self.http.portal is not None
            delivering = self.http.portal.start_task_soon(self.client.run)
            try:
                yield
            finally:
                delivering.cancel()

    @asynccontextmanager
    async def delivering(self) -> AsyncIterator[None]:
        """Inside an event loop of the test's own."""
        task = asyncio.create_task(self.client.run())
        try:
            yield
        finally:
            task.cancel()

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """A completion that must succeed."""
        answer = self.http.post("/v1/completions", json={"prompt": prompt, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(self, content: Any, **fields: Any) -> dict[str, Any]:
        """A chat answer that must succeed."""
        body = {"messages": [{"role": "user", "content": content}], **fields}
        answer = self.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The payloads of a stream that must succeed, [DONE] checked and left out."""
        answer = self.http.post(path, json={**fields, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def gauge(self, name: str) -> float:
        """The value of a metric without labels of its own."""
        lines = self.http.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name + "{")).split()[-1])


class ScriptedServing(Serving):
    """A serving whose model says what it is told."""

    engine: ScriptedEngine

    def say(self, text: str, ends: bool = True) -> None:
        """What the model answers from now on, and whether it ends by itself."""
        tokens = self.tokenizer.encode(text + demo_tokenizer.END_OF_TURN)
        self.engine.script = tokens if ends else tokens[:-1]

    def prompt(self) -> str:
        """The text of the last prompt."""
        return self.tokenizer.decode(self.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
ARGUMENTS = '{"city": "Oslo", "days": 3}'


@pytest.fixture(scope="session")
def markup_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One that has tokens for the markup, and the demo's chat template."""
    folder = tmp_path_factory.mktemp("markup")
    texts = ["the quick brown fox", "naïve café 中文 字符 😀", CALL, "user assistant system tool"]
    demo_tokenizer.save_tokenizer(demo_tokenizer.train_tokenizer(texts, 400), folder, 4096)
    return Tokenizer(folder)


@pytest.fixture
def scripted(markup_tokenizer: Tokenizer) -> Iterator[ScriptedServing]:
    """A serving with a scripted model that listens."""
    engine = ScriptedEngine(markup_tokenizer.vocab_size, markup_tokenizer.encode(demo_tokenizer.END_OF_TURN)[0])
    serving = ScriptedServing(engine, markup_tokenizer)
    with serving.listening():
        yield serving


@pytest.fixture
def make_serving(tokenizer: Tokenizer) -> Callable[..., Serving]:
    """Makes servings with settings of their own; they do not listen yet."""

    def make(mtp_step: int = 2, **settings: Any) -> Serving:
        return Serving(FakeEngine(EngineConfig(mtp_step=mtp_step)), tokenizer, **settings)

    return make


@pytest.fixture
def serving(make_serving: Callable[..., Serving]) -> Iterator[Serving]:
    """A serving of three tokens per step that listens."""
    made = make_serving()
    with made.listening():
        yield made
