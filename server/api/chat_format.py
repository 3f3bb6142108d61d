"""How /v1/chat/completions writes its choices: messages and their chunks, with reasoning and tool calls told apart.

Reasoning goes out under both names that clients know, `reasoning` and `reasoning_content`. Knows nothing of HTTP.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from server.api.generation import Choice, Delta, Job
from server.api.logprobs import chat_logprobs
from server.api.message_parser import (
    ContentPiece,
    MessageParser,
    Piece,
    ReasoningPiece,
    ToolCallStart,
    join_pieces,
)
from server.api.thinking import END_OF_THINKING, Reasoning
from server.api.tools import NAMED, Tools
from server.messages import FINISH_STOP
from server.tokenizer import Tokenizer

FINISH_TOOL_CALLS, FINISH_FUNCTION_CALL = "tool_calls", "function_call"
_START_OF_CALL = "<tool_call>"


@dataclass(frozen=True)
class MessageRules:
    """How the text of an answer becomes a message: `tools` it may call, whether it begins inside the reasoning, what
    becomes of that, and the text of an earlier message that it begins with."""

    tools: Tools | None = None
    starts_thinking: bool = False
    reasoning: Reasoning = field(default_factory=Reasoning)
    beginning: str = ""

    def make_parser(self) -> MessageParser:
        """One for an answer, which has its beginning still to read."""
        tools = self.tools
        return MessageParser(
            None if tools is None else tools.schemas,
            # The beginning has the start of the reasoning in it.
            self.starts_thinking and not self.beginning,
            self.reasoning.is_separate,
            tools is None or tools.is_parallel,
        )


class FirstCall:
    """Finds the end of a message that may have one call: the token that ends the call, if it is not among the first
    `min_tokens`."""

    def __init__(self, rules: MessageRules, min_tokens: int):
        self._parser, self._num_left = rules.make_parser(), min_tokens
        self._parser.push(rules.beginning)

    def ends_with(self, text: str) -> bool:
        """Whether the message ends with the next token, which has this text."""
        self._parser.push(text)
        self._num_left -= 1
        return self._parser.has_call and self._num_left <= 0


class MessageReader:
    """One message while it is generated. `num_reasoning_tokens` counts the tokens before the end of the reasoning."""

    def __init__(self, tokenizer: Tokenizer, rules: MessageRules):
        self._tools = rules.tools
        self._parser = rules.make_parser()
        self._beginning = rules.beginning
        self._shows_reasoning = rules.reasoning.is_included
        self._end_id = tokenizer.token_id(END_OF_THINKING)
        self._call_id = tokenizer.token_id(_START_OF_CALL)
        self._counts = rules.starts_thinking
        self._num_before_call = 0
        self.num_reasoning_tokens = 0

    def take(self, delta: Delta) -> list[Piece]:
        """What a delta adds to the message, neighbours of one kind joined."""
        pieces = self._parser.push(self._beginning + delta.text)
        self._beginning = ""
        if delta.finish_reason is not None:
            pieces += self._parser.finish(is_truncated=delta.finish_reason != FINISH_STOP)
        self._count(delta.token_ids)
        shown = (piece for piece in pieces if self._shows_reasoning or not isinstance(piece, ReasoningPiece))
        return join_pieces(shown)

    def finish_reason(self, reason: str | None) -> str | None:
        """The message's finish reason for the generation's."""
        calls = self._parser.num_calls > 0 and self._tools is not None and self._tools.choice != NAMED
        if not calls or reason != FINISH_STOP:
            return reason
        return FINISH_FUNCTION_CALL if self._tools is not None and self._tools.is_older else FINISH_TOOL_CALLS

    def _count(self, token_ids: Iterable[int]) -> None:
        """Text may be held back, so it is the tokens that tell where the reasoning ends, and the text whether a call
        has ended it."""
        for token_id in token_ids if self._counts else ():
            if token_id == self._end_id:
                self._counts = False
                return
            if token_id == self._call_id:
                self._num_before_call = self.num_reasoning_tokens
            self.num_reasoning_tokens += 1
        if self._counts and self._parser.num_calls:
            self._counts = False
            self.num_reasoning_tokens = self._num_before_call


class ChatFormat:
    """Writes chat messages and their chunks. `num_top` alternatives per token, None for no log-probabilities."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    prompt_in_choice = False

    def __init__(self, tokenizer: Tokenizer, job: Job, rules: MessageRules):
        self._tokenizer = tokenizer
        self._num_top = job.sampling.logprobs
        self._tokens_as_ids = job.tokens_as_ids
        self._rules = rules
        self._is_older = rules.tools is not None and rules.tools.is_older
        self._readers: dict[int, MessageReader] = {}

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of all choices so far that are reasoning."""
        return sum(reader.num_reasoning_tokens for reader in self._readers.values())

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """A role chunk first, then one for each piece of the message; the last one carries the finish reason.

        Pieces have chunks of their own because many clients look at one field of a chunk only.
        """
        is_first = delta.index not in self._readers
        reader = self._reader(delta.index)
        chunks = [_chunk(delta.index, _write(piece, self._is_older)) for piece in reader.take(delta)]
        logprobs = self._logprobs(delta)
        if not chunks and (delta.finish_reason is not None or logprobs is not None):
            chunks.append(self.empty_chunk(delta.index))
        if logprobs is not None:
            entries = logprobs["content"]
            if _ends_with_a_token(delta) and len(entries) > 1:  # no chunk of text has what is not in the text
                chunks.append(self.empty_chunk(delta.index) | {"logprobs": {"content": entries[-1:]}})
                entries = entries[:-1]
            chunks[0]["logprobs"] = {"content": entries}
        if delta.finish_reason is not None:
            chunks[-1].update(finish_reason=reader.finish_reason(delta.finish_reason), stop_reason=delta.stop_reason)
        return [_chunk(delta.index, {"role": "assistant", "content": ""}), *chunks] if is_first else chunks

    def empty_chunk(self, index: int) -> dict[str, Any]:
        """The chunk of a step that adds nothing to the message."""
        return _chunk(index, {})

    def choice(self, choice: Choice, deltas: list[Delta]) -> dict[str, Any]:
        """A whole message."""
        reader = self._reader(choice.index)
        pieces = [piece for delta in deltas for piece in reader.take(delta)]
        entries = [entry for delta in deltas if (part := self._logprobs(delta)) for entry in part["content"]]
        return {
            "index": choice.index,
            "message": write_message(pieces, self._is_older),
            "logprobs": None if self._num_top is None else {"content": entries},
            "finish_reason": reader.finish_reason(deltas[-1].finish_reason),
            "stop_reason": deltas[-1].stop_reason,
        }

    def _reader(self, index: int) -> MessageReader:
        if index not in self._readers:
            self._readers[index] = MessageReader(self._tokenizer, self._rules)
        return self._readers[index]

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self._num_top is None or not delta.token_ids:
            return None
        return chat_logprobs(self._tokenizer, delta, self._num_top, self._tokens_as_ids)


def _ends_with_a_token(delta: Delta) -> bool:
    """Whether its last token is one that ends the answer."""
    return delta.finish_reason == FINISH_STOP and not isinstance(delta.stop_reason, str)


def write_message(pieces: Iterable[Piece], is_older: bool = False) -> dict[str, Any]:
    """The message that the pieces add up to; null for what it does not have. In the `is_older` form its one call is a
    `function_call`."""
    reasoning, content, calls = [], [], []
    arguments: dict[int, list[str]] = {}
    for piece in pieces:
        if isinstance(piece, ReasoningPiece):
            reasoning.append(piece.text)
        elif isinstance(piece, ContentPiece):
            content.append(piece.text)
        elif isinstance(piece, ToolCallStart):
            calls.append(piece)
        else:
            arguments.setdefault(piece.index, []).append(piece.text)
    thoughts = "".join(reasoning) if reasoning else None
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(content) if content or not (reasoning or calls) else None,
        "refusal": None,
        "annotations": [],
        "reasoning": thoughts,
        "reasoning_content": thoughts,
    }
    if calls and is_older:
        message["function_call"] = {"name": calls[0].name, "arguments": "".join(arguments.get(0, ()))}
    elif calls:
        message["tool_calls"] = [_write_call(call, "".join(arguments.get(call.index, ()))) for call in calls]
    return message


def _write_call(call: ToolCallStart, arguments: str) -> dict[str, Any]:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _write(piece: Piece, is_older: bool) -> dict[str, Any]:
    """The `delta` of a chunk."""
    if isinstance(piece, ReasoningPiece):
        return {"reasoning": piece.text, "reasoning_content": piece.text}
    if isinstance(piece, ContentPiece):
        return {"content": piece.text}
    if isinstance(piece, ToolCallStart):
        if is_older:
            return {"function_call": {"name": piece.name, "arguments": ""}}
        return {"tool_calls": [{"index": piece.index, **_write_call(piece, "")}]}
    if is_older:
        return {"function_call": {"arguments": piece.text}}
    return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}


def _chunk(index: int, message: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": message, "logprobs": None, "finish_reason": None}
