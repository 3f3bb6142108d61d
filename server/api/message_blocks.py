"""A message as blocks, one after the other: reasoning, content, a call. Built up from the pieces of a parser.

The blocks depend on the message alone, never on how it was cut. Knows no endpoint.
"""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from server.api.message_parser import ContentPiece, Piece, ReasoningPiece, ToolCallStart
from server.messages import FINISH_STOP

REASONING, CONTENT, CALL = "reasoning", "content", "call"
OPENED, GREW, CLOSED = "opened", "grew", "closed"


@dataclass
class Block:
    """Block `index` of a message. `call` begins it if it is one; `parts` are its text, or the JSON of its arguments.

    `is_whole` once it has ended by itself: the last block of an answer that was cut off never is.
    """

    index: int
    kind: str
    call: ToolCallStart | None
    parts: list[str] = field(default_factory=list)
    is_open: bool = True
    is_whole: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def text(self) -> str:
        """All there is of it."""
        return "".join(self.parts)


Step = tuple[str, Block, str]


class Blocks:
    """The blocks of one message while it is generated, in order."""

    def __init__(self) -> None:
        self.all: list[Block] = []

    def take(self, pieces: Iterable[Piece], finish_reason: str | None) -> Iterator[Step]:
        """What happens to the blocks, (OPENED, GREW or CLOSED, block, its new text); a finish reason ends them."""
        for piece in pieces:
            kind = _kind(piece)
            if isinstance(piece, ToolCallStart) or not self.all or self.all[-1].kind != kind:
                yield from self._close(True)
                self.all.append(Block(len(self.all), kind, piece if isinstance(piece, ToolCallStart) else None))
                yield OPENED, self.all[-1], ""
            if not isinstance(piece, ToolCallStart):
                self.all[-1].parts.append(piece.text)
                yield GREW, self.all[-1], piece.text
        if finish_reason is not None:
            yield from self._close(finish_reason == FINISH_STOP)

    def _close(self, is_whole: bool) -> Iterator[Step]:
        if self.all and self.all[-1].is_open:
            block = self.all[-1]
            block.is_open, block.is_whole = False, is_whole
            yield CLOSED, block, ""


def _kind(piece: Piece) -> str:
    if isinstance(piece, ReasoningPiece):
        return REASONING
    return CONTENT if isinstance(piece, ContentPiece) else CALL
