"""One streamed answer: its server-sent events, when they came, and how many tokens each of them brought.

With speculation several tokens come in one event. They are counted by the best that the server tells: usage in every
event (`continuous_usage_stats`), else the log-probabilities in it, else every event with text is one token. The answer
as a whole has as many tokens as its last usage says. Knows no HTTP; times are seconds of any one clock.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

DONE = b"[DONE]"
EMPTY = "empty answer"
CONTINUOUS, LOGPROBS, USAGE, EVENTS = "continuous usage", "logprobs", "usage", "events"


class RequestFailed(Exception):
    """A request brought no whole answer. `reason` is one of few, `detail` is what was seen."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class EventSplitter:
    """Cuts a stream of bytes, which come in any pieces, into the data of server-sent events."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, data: bytes) -> list[bytes]:
        """The events that end in `data`. Comments and other fields are left out."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class Event(NamedTuple):
    """What one event brought: whether there was text in it, its log-probabilities, and all tokens so far by usage."""

    seconds: float
    has_text: bool
    num_logprobs: int
    num_so_far: int | None


class Arrival(NamedTuple):
    """Tokens that came at a time."""

    seconds: float
    num_tokens: int


@dataclass
class Answer:
    """What request `turn` of conversation `index` got, sent at `sent`. Counts are None where the server tells nothing.

    `failure` is the reason, if it failed, `detail` what was seen then. The times need at least one arrival.
    """

    index: int
    turn: int
    sent: float
    text: str = ""
    thought: str = ""
    finish_reason: str | None = None
    is_done: bool = False
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    failure: str = ""
    detail: str = ""
    events: list[Event] = field(default_factory=list)

    def take(self, data: bytes, seconds: float) -> None:
        """Add an event. Raises RequestFailed for one that is an error or not as OpenAI's are."""
        if data == DONE:
            self.is_done = True
            return
        try:
            event = json.loads(data)
            if event.get("error"):
                raise RequestFailed("error in the stream", _message(event["error"]))
            self._take_usage(event.get("usage") or {})
            for choice in event.get("choices") or ():
                self._take_choice(choice, bool(event.get("usage")), seconds)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RequestFailed("broken event", data[:200].decode(errors="replace")) from error

    def _take_usage(self, usage: dict[str, Any]) -> None:
        if usage:
            self.prompt_tokens, self.completion_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")

    def _take_choice(self, choice: dict[str, Any], has_usage: bool, seconds: float) -> None:
        delta = choice.get("delta") or {"content": choice.get("text")}
        text, thought = delta.get("content") or "", delta.get("reasoning") or delta.get("reasoning_content") or ""
        self.text += text
        self.thought += thought
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        has_text = bool(text or thought or delta.get("tool_calls"))
        logprobs = choice.get("logprobs") or {}
        num_logprobs = len(logprobs.get("content") or logprobs.get("tokens") or ())
        self.events.append(Event(seconds, has_text, num_logprobs, self.completion_tokens if has_usage else None))

    @cached_property
    def event_counting(self) -> str:
        """What the tokens of one event are counted by. To be asked when all events are there."""
        spoken = [event for event in self.events if event.has_text]
        if all(event.num_so_far is not None for event in spoken or self.events):
            return CONTINUOUS
        return LOGPROBS if all(event.num_logprobs for event in spoken) else EVENTS

    @property
    def counting(self) -> str:
        """What the tokens of the whole answer are counted by."""
        return self.event_counting if self.completion_tokens is None else USAGE

    @cached_property
    def arrivals(self) -> list[Arrival]:
        """Every event that brought tokens."""
        if self.event_counting == LOGPROBS:
            return [Arrival(event.seconds, event.num_logprobs) for event in self.events if event.num_logprobs]
        if self.event_counting == EVENTS:
            return [Arrival(event.seconds, 1) for event in self.events if event.has_text]
        arrivals, num_before = [], 0
        for event in self.events:
            if event.num_so_far is not None and event.num_so_far > num_before:
                arrivals.append(Arrival(event.seconds, event.num_so_far - num_before))
                num_before = event.num_so_far
        return arrivals

    @property
    def num_tokens(self) -> int:
        """Output tokens."""
        counted = sum(arrival.num_tokens for arrival in self.arrivals)
        return counted if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft(self) -> float:
        """Seconds until the first token."""
        return self.arrivals[0].seconds - self.sent

    @property
    def e2e(self) -> float:
        """Seconds until the last token."""
        return self.arrivals[-1].seconds - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None where there is but one."""
        return (self.e2e - self.ttft) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def gaps(self) -> list[tuple[float, int]]:
        """Seconds between two events with tokens, and how many tokens came after them."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [(later.seconds - earlier.seconds, later.num_tokens) for earlier, later in pairs]


def error_message(body: str) -> str:
    """What the body of an error says: OpenAI's `error.message`, or what is like it, else the body as it is."""
    try:
        said = json.loads(body)
    except ValueError:
        return body
    inner = said.get("error", said) if isinstance(said, dict) else said
    return _message(inner) if inner else body


def _message(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
