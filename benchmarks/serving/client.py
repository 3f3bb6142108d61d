"""Asks one server over HTTP and times the stream of its answer. Knows neither load nor data sets."""

import argparse
import asyncio
import json
from typing import Any, Self

import httpx

from benchmarks.openai_server import RunFailed, one_line
from benchmarks.serving.answer import EMPTY, Answer, EventSplitter, RequestFailed, error_message
from benchmarks.serving.datasets import CHAT, Prompt

# What to ask a server for, from the most telling on; some refuse what they do not know.
_STREAM_OPTIONS: tuple[dict[str, bool], ...] = (
    {"include_usage": True, "continuous_usage_stats": True},
    {"include_usage": True},
    {},
)
_REFUSALS = ("HTTP 400", "HTTP 422")
_PROBE_TOKENS = 16
_PROBE = "How many are three and four?"  # vLLM 0.32 on a CPU ends at a prompt of one token
# Servers close connections that nobody uses, some after 5 seconds; one that is just being closed must not be taken.
_KEEPALIVE_SECONDS = 2.0


class Client:
    """Sends requests to the server at `url` as `args` say; the times of answers are those of the event loop's clock."""

    def __init__(
        self,
        url: str,
        model: str,
        headers: dict[str, str],
        args: argparse.Namespace,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        self.url = url
        self.stream_options: dict[str, bool] = _STREAM_OPTIONS[0]
        self._args = args
        self._path = "/v1/chat/completions" if args.endpoint == CHAT else "/v1/completions"
        self._fixed = {"model": model, "stream": True, "temperature": args.temperature}
        if args.ignore_eos:
            self._fixed["ignore_eos"] = True
        self._http = httpx.AsyncClient(
            headers=headers | {"accept-encoding": "identity"},
            timeout=None,  # that of a whole request is asyncio's
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_SECONDS),
            trust_env=False,  # nothing between: it is timed
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ask(self, index: int, turn: int, prompt: Prompt) -> Answer:
        """Request `turn` of conversation `index`, answered or failed."""
        body = json.dumps(self._body(index, prompt)).encode()
        answer = Answer(index, turn, asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(self._args.timeout):
                await self._stream(body, answer)
        except RequestFailed as failed:
            answer.failure, answer.detail = failed.reason, failed.detail
        except TimeoutError:
            answer.failure, answer.detail = "timeout", f"no whole answer within {self._args.timeout:g} s (--timeout)"
        except httpx.ConnectError as error:
            answer.failure, answer.detail = "cannot connect", one_line(error)
        except httpx.HTTPError as error:
            answer.failure, answer.detail = "connection lost", f"{type(error).__name__}: {one_line(error)}"
        return answer

    async def probe(self) -> None:
        """Find what the server tells of its tokens. Raises RunFailed if it answers no request at all."""
        for options in _STREAM_OPTIONS:
            self.stream_options = options
            answer = await self.ask(0, 0, Prompt.saying(_PROBE, _PROBE_TOKENS, self._args.endpoint))
            if answer.failure not in _REFUSALS:
                break
        if answer.failure not in ("", EMPTY):
            raise RunFailed(f"{self.url}{self._path}, asked once: {answer.failure}: {answer.detail}")

    async def takes_token_ids(self) -> bool:
        """Whether a prompt may be a list of token ids."""
        answer = await self.ask(0, 0, Prompt({"prompt": [1, 2, 3]}, _PROBE_TOKENS))
        return not answer.failure

    def _body(self, index: int, prompt: Prompt) -> dict[str, Any]:
        body = self._fixed | prompt.content | {"max_tokens": prompt.max_tokens}
        if self._args.temperature > 0:
            body["seed"] = self._args.seed + index
        if self.stream_options:
            body["stream_options"] = self.stream_options
        return body | self._args.extra_body

    async def _stream(self, body: bytes, answer: Answer) -> None:
        now, splitter = asyncio.get_running_loop().time, EventSplitter()
        async with self._http.stream("POST", self.url + self._path, content=body) as response:
            if response.status_code != httpx.codes.OK:
                said = (await response.aread()).decode(errors="replace")
                raise RequestFailed(f"HTTP {response.status_code}", one_line(error_message(said)))
            async for data in response.aiter_bytes():
                seconds = now()
                for event in splitter.push(data):
                    answer.take(event, seconds)
        for event in splitter.push(b"\n"):
            answer.take(event, now())
        if answer.finish_reason is None and not answer.is_done:
            raise RequestFailed("stream ended early", f"after {len(answer.events)} events")
        if not answer.arrivals:
            raise RequestFailed(EMPTY, f"no tokens, finish_reason {answer.finish_reason}")
