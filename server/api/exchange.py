"""One HTTP request and its answer from outside: its id, its line in the log, its share of the metrics, its trace.

What was generated is read from the `Generation` that the endpoint leaves here. Never knows a prompt or an output.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_bodies import ANSWER_ID_HEADERS, CLIENT_CLOSED, REQUEST_ID_HEADER
from server.api.generation import Generation
from server.logs import log_fields

# What an id of a client must look like, which goes into the log and back to the client.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Asked for every few seconds, by machines.
_POLLED_ROUTES = ("/health", "/ready", "/ping", "/load", "/metrics")
_NO_ROUTE = "none"

log = logging.getLogger("tandem.requests")


@dataclass
class Exchange:
    """`route` is the path as the application declares it, `status` 0 until the answer begins; `generation` is what the
    endpoint has the engine do. Times are Unix times in nanoseconds, and seconds."""

    id: str
    method: str
    headers: Headers
    route: str = _NO_ROUTE
    status: int = 0
    generation: Generation | None = None
    started_ns: int = field(default_factory=time.time_ns)
    started_at: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """What the log says of it; None for what it does not have."""
        figures = {"id": self.id, "method": self.method, "route": self.route, "status": self.status}
        figures |= _describe(self.generation) if self.generation is not None else {}
        return figures | {"seconds": round(self.seconds, 4)}


def _describe(generation: Generation) -> dict[str, Any]:
    choices = generation.choices
    usage: dict[str, Any] = generation.usage()
    first_tokens = [seconds for choice in choices if (seconds := choice.clock.first_token_seconds) is not None]
    num_steps = sum(choice.num_steps for choice in choices)
    num_decoded = sum(max(0, choice.num_tokens - 1) for choice in choices)
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "ttft": round(min(first_tokens), 4) if first_tokens else None,
        "accept_length": round(num_decoded / num_steps, 2) if num_steps else None,
        "finish_reason": ",".join(sorted({choice.finish_reason or "abort" for choice in choices})),
    }


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that a request belongs to, made when it came in."""
    state = scope.setdefault("state", {})
    if "exchange" not in state:
        headers = Headers(scope=scope)
        wanted = headers.get(REQUEST_ID_HEADER, "")
        request_id = wanted if _REQUEST_ID.fullmatch(wanted) else uuid.uuid4().hex
        state["exchange"] = Exchange(request_id, scope["method"], headers)
    return state["exchange"]


class ExchangeRecorder:
    """Gives every request its id, and tells `observers` of every exchange that has ended."""

    def __init__(self, app: ASGIApp, observers: Sequence[Callable[[Exchange], None]]):
        self._app = app
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on the request, and the answer with the id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = exchange_of(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                MutableHeaders(scope=message).update(dict.fromkeys(ANSWER_ID_HEADERS, exchange.id))
            await send(message)

        status = 500
        try:
            await self._app(scope, receive, send_with_id)
            status = CLIENT_CLOSED  # without an error there is no answer only where nobody waits for one
        finally:
            exchange.status = exchange.status or status
            exchange.route = getattr(scope.get("route"), "path", _NO_ROUTE)
            exchange.seconds = time.perf_counter() - exchange.started_at
            for observe in self._observers:
                observe(exchange)


def log_exchange(exchange: Exchange) -> None:
    """One line, which nobody needs at level info for what machines poll."""
    level = logging.DEBUG if exchange.route in _POLLED_ROUTES else logging.INFO
    if log.isEnabledFor(level):
        log_fields(log, level, "finished", exchange.figures())
