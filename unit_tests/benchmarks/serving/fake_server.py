"""An OpenAI-compatible server that says what a test wants, when it wants: over sockets, or in virtual time."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

Piece = tuple[float, bytes]  # seconds to wait, then what is sent
Reply = tuple[int, list[Piece]]


def event(payload: object) -> bytes:
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"


@dataclass
class FakeModel:
    """Answers with `num_tokens` tokens, `per_event` in an event; the first comes after `first_seconds`, the others
    `step_seconds` apart. `tells` is what it says of their number: "continuous", "final", "logprobs" or nothing.

    `fail` may give another reply to the request of that number (from 0); stream options and prompts in `refuses` are
    answered 400. `requests` has the bodies in the order in which they came.
    """

    num_tokens: int = 8
    per_event: int = 2
    first_seconds: float = 0.0
    step_seconds: float = 0.0
    tells: str = "continuous"
    name: str = "fake"
    word: str = "t"
    refuses: tuple[str, ...] = ()
    metrics: Callable[[], str | None] = lambda: None
    fail: Callable[[int], Reply | None] = lambda number: None
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def get(self, path: str, headers: dict[str, str]) -> Reply:
        self.headers.append(headers)
        if path == "/v1/models":
            return 200, [(0.0, json.dumps({"data": [{"id": self.name}]}).encode())]
        text = self.metrics() if path == "/metrics" else None
        return (404, [(0.0, b"{}")]) if text is None else (200, [(0.0, text.encode())])

    def post(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        self.requests.append(body)
        self.headers.append(headers)
        failure = self.fail(len(self.requests) - 1) or self._refusal(body)
        return failure or (200, list(self._stream(path, body)))

    def _refusal(self, body: dict[str, Any]) -> Reply | None:
        if body["model"] != self.name:
            return refuse(404, f"The model {body['model']} does not exist")
        asked = {*body.get("stream_options", {}), *(["ids"] if isinstance(body.get("prompt"), list) else [])}
        refused = sorted(asked.intersection(self.refuses))
        return refuse(400, f"unknown: {refused[0]}") if refused else None

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[Piece]:
        num_tokens = body["max_tokens"] if body.get("ignore_eos") else min(self.num_tokens, body["max_tokens"])
        for start in range(0, num_tokens, self.per_event):
            tokens = [f" {self.word}{n}" for n in range(start, min(start + self.per_event, num_tokens))]
            is_last = start + self.per_event >= num_tokens
            choice = self._choice(
                path, tokens, ("stop" if num_tokens == self.num_tokens else "length") if is_last else None
            )
            chunk: dict[str, Any] = {"choices": [choice]}
            if self.tells == "continuous" and body.get("stream_options", {}).get("continuous_usage_stats"):
                chunk["usage"] = self._usage(start + len(tokens))
            yield (self.step_seconds if start else self.first_seconds), event(chunk)
        if self.tells != "nothing" and body.get("stream_options", {}).get("include_usage"):
            yield 0.0, event({"choices": [], "usage": self._usage(num_tokens)})
        yield 0.0, event(b"[DONE]")

    def _choice(self, path: str, tokens: list[str], finish_reason: str | None) -> dict[str, Any]:
        text = "".join(tokens)
        if path == "/v1/chat/completions":
            logprobs: Any = {"content": [{"token": token} for token in tokens]}
            said: dict[str, Any] = {"delta": {"content": text}}
        else:
            logprobs, said = {"tokens": tokens}, {"text": text}
        logprobs = logprobs if self.tells == "logprobs" else None
        return {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish_reason}

    def _usage(self, num_tokens: int) -> dict[str, Any]:
        return {
            "prompt_tokens": 10,
            "completion_tokens": num_tokens,
            "prompt_tokens_details": {"cached_tokens": 4},
        }


def refuse(status: int, message: str) -> Reply:
    return status, [(0.0, json.dumps({"error": {"message": message, "code": status}}).encode())]


def metrics_text(steps: int, proposed: list[int], accepted: list[int], tokens: int, prefix: str = "vllm:") -> str:
    """What /metrics says of speculation and output tokens."""
    lines = [
        f"{prefix}spec_decode_num_drafts_total {steps}",
        f"{prefix}spec_decode_num_draft_tokens_total {sum(proposed)}",
        f"{prefix}spec_decode_num_accepted_tokens_total {sum(accepted)}",
        f"vllm:generation_tokens_total {tokens}",
    ]
    for position, count in enumerate(accepted):
        lines.append(f'{prefix}spec_decode_num_accepted_tokens_per_pos_total{{position="{position}"}} {count}')
    return "\n".join(lines) + "\n"


class VirtualNetwork(httpx.AsyncBaseTransport):
    """Leads to the models by host name; pieces come when they should by the clock of the event loop."""

    def __init__(self, **models: FakeModel):
        self.models = models
        self.num_open = self.most_open = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(await request.aread())
        status, pieces = self.models[request.url.host].post(request.url.path, body, dict(request.headers))
        return httpx.Response(status, stream=_Pieces(self, pieces))


class _Pieces(httpx.AsyncByteStream):
    def __init__(self, network: VirtualNetwork, pieces: list[Piece]):
        self.network, self.pieces = network, pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.network.num_open += 1
        self.network.most_open = max(self.network.most_open, self.network.num_open)
        try:
            for seconds, data in self.pieces:
                await asyncio.sleep(seconds)
                yield data
        finally:
            self.network.num_open -= 1


def _make_app(model: FakeModel) -> Callable[..., Any]:
    async def app(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        data = b""
        while (message := await receive()).get("more_body"):
            data += message["body"]
        data += message.get("body", b"")
        path, headers = scope["path"], {name.decode(): value.decode() for name, value in scope["headers"]}
        is_post = scope["method"] == "POST"
        status, pieces = model.post(path, json.loads(data), headers) if is_post else model.get(path, headers)
        await send({"type": "http.response.start", "status": status, "headers": []})
        for seconds, piece in pieces:
            await asyncio.sleep(seconds)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


@contextlib.contextmanager
def serving(model: FakeModel) -> Iterator[str]:
    """The URL at which the model is served, by a thread."""
    config = uvicorn.Config(_make_app(model), port=0, log_config=None, lifespan="off")
    listener = config.bind_socket()
    server = uvicorn.Server(config)
    listener.listen(128)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()
        listener.close()
