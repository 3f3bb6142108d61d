"""The text of an assistant's turn taken apart while it arrives: reasoning, content, tool calls, as Qwen3.5 writes them.

    REASONING</think>CONTENT<tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

What the pieces add up to depends on the text alone, never on how it was cut. Only what may still become markup is held
back. A call begins once `<function=NAME>` is complete; what only looked like one is text. Models forget markup, so
`<tool_call>` and everything that closes may be missing, and a call ends the reasoning. Knows text, never tokens.
"""

import itertools
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from server.api.tool_arguments import ArgumentWriter

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"
_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_SPACE = " \t\r\n"
_SPACES = re.compile(rf"[{_SPACE}]*")
_NAME = re.compile(r"[^\s<>\"'`]*")
_KEY = re.compile(r"[^>\n]*")
MAX_NAME_CHARS = 256


class _Markers:
    """Strings to look for together. Each has its one `<` at its start."""

    def __init__(self, *markers: str):
        self._markers = markers
        self._pattern = re.compile("|".join(map(re.escape, markers)))
        self._longest = max(map(len, markers))

    def search(self, text: str, start: int) -> tuple[int, str]:
        """(where text from `start` on ends that is no marker, the marker there: "" if more text must decide)."""
        found = self._pattern.search(text, start)
        if found is not None:
            return found.start(), found.group()
        begin = text.rfind("<", max(start, len(text) - self._longest + 1))
        may_begin = begin >= 0 and any(marker.startswith(text[begin:]) for marker in self._markers)
        return begin if may_begin else len(text), ""


_IN_TEXT = _Markers(_THINK, _END_THINK, _CALL, _END_CALL, _FUNCTION)
_IN_CALL = _Markers(_PARAMETER, _END_PARAMETER, _FUNCTION, _END_FUNCTION, _CALL, _END_CALL)
# A value that has the start of a call in it speaks of calls: that is likelier than two ends forgotten.
_IN_VALUE = _Markers(_PARAMETER, _END_PARAMETER, _END_FUNCTION, _END_CALL)


@dataclass(frozen=True)
class ReasoningPiece:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class ContentPiece:
    """More of the content."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """Call `index` of the message begins."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True)
class ToolArguments:
    """More of the JSON text of call `index`'s arguments."""

    index: int
    text: str


Piece = ReasoningPiece | ContentPiece | ToolCallStart | ToolArguments


class MessageParser:
    """One message. `tools` has the `parameters` schema of every tool by name; None leaves calls in the text.

    It begins inside the reasoning if `starts_thinking`. Without `separates_reasoning` all reasoning and its markup is
    content. Without `is_parallel` only the first call counts, the others give nothing.
    """

    def __init__(
        self,
        tools: Mapping[str, dict[str, Any]] | None,
        starts_thinking: bool,
        separates_reasoning: bool = True,
        is_parallel: bool = True,
    ):
        self._tools = tools
        self._separates = separates_reasoning
        self._is_parallel = is_parallel
        self.is_thinking = starts_thinking and separates_reasoning
        self.num_calls = 0
        self._text, self._at = "", 0  # what has come, and how much of it is consumed
        self._read: Callable[[], bool] = self._read_text
        self._pieces: list[Piece] = []
        self._is_fresh = False  # markup has ended and no content has begun: spaces do not count
        self._has_content = False
        self._spaces: list[str] = []  # after content: they count if more of it follows
        self._opening: list[str] = []  # what may begin a call
        self._name: list[str] = []  # of the function or parameter that is being read
        self._is_in_block = False  # a call's `</tool_call>` has not come
        self._is_silent = False  # the call that is being read does not count
        self._arguments = ArgumentWriter({})

    @property
    def has_call(self) -> bool:
        """Whether the last call has begun and ended."""
        return self.num_calls > 0 and not self._is_in_block

    def push(self, text: str) -> list[Piece]:
        """What is certain now that `text` has come."""
        self._text, self._at = self._text[self._at :] + text, 0
        while self._read():
            pass
        return self._take_pieces()

    def finish(self, is_truncated: bool = False) -> list[Piece]:
        """What was held back, once nothing more comes.

        An open call of a message that ended by itself is completed. Of one that was cut off the arguments stay
        unfinished, and a call without its whole name is left out, be it no more than the beginning of its marker.
        """
        rest = self._text[self._at :]
        if self._read in (self._read_block, self._read_name):
            if is_truncated:
                self._spaces = []
            else:
                self._say("".join(self._opening + self._name) + rest)
        elif self._read == self._read_text:
            begins_call = is_truncated and self._tools is not None and len(rest) > 1 and _CALL.startswith(rest)
            if begins_call:
                self._spaces = []
            ends_call = self._is_in_block and _END_CALL.startswith(rest)
            self._say("" if begins_call or ends_call else rest)
        elif not is_truncated:
            if self._read == self._read_value:
                self._write(self._arguments.push(rest) + self._arguments.close())
            self._write(self._arguments.finish())
        if self._spaces:
            self._pieces.append(ContentPiece("".join(self._spaces)))
        return self._take_pieces()

    def _take_pieces(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _next(self, markers: _Markers) -> tuple[str, str]:
        """Consumes (text that is no marker, the marker after it or "" where the text ends or may become one)."""
        end, marker = markers.search(self._text, self._at)
        before, self._at = self._text[self._at : end], end + len(marker)
        return before, marker

    # Each of these consumes what it can, and tells whether what is left may be read on (by another, maybe).

    def _read_text(self) -> bool:
        before, marker = self._next(_IN_TEXT)
        self._say(before)
        if marker:
            self._meet(marker)
        return bool(marker)

    def _read_block(self) -> bool:
        """After `<tool_call>`: spaces, then `<function=`."""
        spaces = _SPACES.match(self._text, self._at)
        assert spaces is not None
        self._opening.append(spaces.group())
        self._at = spaces.end()
        if self._text.startswith(_FUNCTION, self._at):
            self._at += len(_FUNCTION)
            self._open_function()
            return True
        if _FUNCTION.startswith(self._text[self._at : self._at + len(_FUNCTION)]):
            return False
        self._reject()
        return True

    def _read_name(self) -> bool:
        """After `<function=`: the name, then `>`."""
        ends = self._read_until(_NAME)
        name = "".join(self._name)
        is_wrong = ends and (not name or self._text[self._at] != ">")
        if is_wrong or len(name) > MAX_NAME_CHARS:
            self._reject()
            return True
        if ends:
            self._at += 1
            self._begin_call(name)
        return ends

    def _read_parameters(self) -> bool:
        """Between `<function=NAME>` and `</function>`, outside of values."""
        _, marker = self._next(_IN_CALL)
        if marker:
            self._meet_in_call(marker)
        return bool(marker)

    def _read_key(self) -> bool:
        """After `<parameter=`: the name, then `>`."""
        ends = self._read_until(_KEY)
        if ends:
            self._at += 1
            self._write(self._arguments.open("".join(self._name).strip()))
            self._read = self._read_value
        return ends

    def _read_value(self) -> bool:
        before, marker = self._next(_IN_VALUE)
        self._write(self._arguments.push(before))
        if marker:
            self._write(self._arguments.close())
            self._meet_in_call(marker)
        return bool(marker)

    def _read_until(self, name: re.Pattern[str]) -> bool:
        """Consumes more of a name; whether it ends here."""
        found = name.match(self._text, self._at)
        assert found is not None
        self._name.append(found.group())
        self._at = found.end()
        return self._at < len(self._text)

    def _meet(self, marker: str) -> None:
        """A marker in the reasoning or the content."""
        if marker == _CALL and self._tools is not None:
            self._open_block()
        elif self.is_thinking:
            if marker == _END_THINK:
                self._leave_text()
            elif marker != _THINK:
                self._say(marker)
        elif marker == _FUNCTION and self._tools is not None:
            self._opening = []
            self._open_function()
        elif marker == _END_CALL and self._is_in_block:
            self._is_in_block = False
        elif marker == _THINK and self._separates and not self._has_content:
            self._leave_text()
            self.is_thinking = True
        elif marker != _END_THINK or not self._separates:
            self._say(marker)

    def _meet_in_call(self, marker: str) -> None:
        if marker == _PARAMETER:
            self._name = []
            self._read = self._read_key
            return
        self._read = self._read_parameters
        if marker == _END_PARAMETER:
            return
        self._write(self._arguments.finish())
        self._read = self._read_text
        if marker == _END_CALL:
            self._is_in_block = False
        elif marker != _END_FUNCTION:
            self._meet(marker)

    def _open_block(self) -> None:
        self._opening = [_CALL]
        self._name = []
        self._read = self._read_block

    def _open_function(self) -> None:
        self._opening.append(_FUNCTION)
        self._name = []
        self._read = self._read_name

    def _reject(self) -> None:
        """What looked like a call is text."""
        self._read = self._read_text
        self._say("".join(self._opening + self._name))

    def _begin_call(self, name: str) -> None:
        assert self._tools is not None
        self._leave_text()
        self._is_in_block = True
        self._is_silent = self.num_calls > 0 and not self._is_parallel
        self._arguments = ArgumentWriter(self._tools.get(name, {}))
        self._read = self._read_parameters
        if not self._is_silent:
            self._pieces.append(ToolCallStart(self.num_calls, f"call_{uuid.uuid4().hex}", name))
            self.num_calls += 1

    def _leave_text(self) -> None:
        self.is_thinking = False
        self._is_fresh = True
        self._spaces = []

    def _write(self, arguments: str) -> None:
        if arguments and not self._is_silent:
            self._pieces.append(ToolArguments(self.num_calls - 1, arguments))

    def _say(self, text: str) -> None:
        if self.is_thinking:
            if text:
                self._pieces.append(ReasoningPiece(text))
            return
        if self._is_fresh:
            text = text.lstrip(_SPACE)
        if not text:
            return
        self._is_fresh = False
        # Spaces before a call are markup.
        certain = text if self._tools is None else text.rstrip(_SPACE)
        if certain:
            self._pieces.append(ContentPiece("".join(self._spaces) + certain))
            self._spaces = []
            self._has_content = self._has_content or not certain.isspace()
        if len(certain) < len(text):
            self._spaces.append(text[len(certain) :])


def join_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with neighbours of one kind, and of one call, joined."""
    joined: list[Piece] = []
    for _, group in itertools.groupby(pieces, lambda piece: (type(piece), getattr(piece, "index", None))):
        first, *others = group
        if not isinstance(first, ToolCallStart):
            first = replace(first, text=first.text + "".join(other.text for other in others))  # type: ignore[union-attr]
        joined.append(first)
    return joined
