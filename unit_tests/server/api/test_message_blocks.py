"""Blocks of a message: which there are, and that they do not depend on how the message was cut."""

import random

from server.api.message_blocks import CALL, CLOSED, CONTENT, GREW, OPENED, REASONING, Block, Blocks
from server.api.message_parser import ContentPiece, MessageParser, Piece, ReasoningPiece, ToolArguments, ToolCallStart
from unit_tests.server.api.conftest import CALL as CALL_TEXT

PIECES: list[Piece] = [
    ReasoningPiece("a"),
    ReasoningPiece("b"),
    ContentPiece("c"),
    ToolCallStart(0, "call_0", "weather"),
    ToolArguments(0, "{}"),
    ToolCallStart(1, "call_1", "clock"),
    ContentPiece("d"),
]


def shape(blocks: Blocks) -> list[tuple[str, str | None, str, bool]]:
    """What matters of blocks."""
    return [(b.kind, b.call.name if b.call else None, b.text, b.is_whole) for b in blocks.all]


def test_every_block_opens_once_grows_and_closes_before_the_next() -> None:
    blocks = Blocks()
    steps = [(step, block.index, text) for step, block, text in blocks.take(PIECES, "stop")]
    assert steps[:4] == [(OPENED, 0, ""), (GREW, 0, "a"), (GREW, 0, "b"), (CLOSED, 0, "")]
    assert [(step, index) for step, index, _ in steps if step != GREW] == [
        (step, index) for index in range(5) for step in (OPENED, CLOSED)
    ]
    assert shape(blocks) == [
        (REASONING, None, "ab", True),
        (CONTENT, None, "c", True),
        (CALL, "weather", "{}", True),
        (CALL, "clock", "", True),
        (CONTENT, None, "d", True),
    ]


def test_the_last_block_of_an_answer_that_was_cut_off_is_not_whole() -> None:
    blocks = Blocks()
    assert [step for step, _, _ in blocks.take(PIECES[:3], None)][-1] == GREW
    assert blocks.all[-1].is_open
    (step,) = blocks.take([], "length")
    assert step[0] == CLOSED
    assert [block.is_whole for block in blocks.all] == [True, False]
    assert list(Blocks().take([], "stop")) == []


def test_blocks_do_not_depend_on_how_the_text_was_cut() -> None:
    text = f"Look.\n</think>\n\nHello.\n\n{CALL_TEXT}\n{CALL_TEXT}\nand\n"
    rng = random.Random(0)
    shapes = set()
    for _ in range(50):
        parser, blocks, at = MessageParser({"weather": {}}, True), Blocks(), 0
        while at < len(text):
            size = rng.randint(1, 12)
            list(blocks.take(parser.push(text[at : at + size]), None))
            at += size
        list(blocks.take(parser.finish(), "stop"))
        shapes.add(tuple(shape(blocks)))
    assert len(shapes) == 1
    kinds = [kind for kind, _, _, _ in shapes.pop()]
    assert kinds == [REASONING, CONTENT, CALL, CALL, CONTENT]


def test_blocks_have_ids_of_their_own() -> None:
    assert Block(0, CONTENT, None).id != Block(0, CONTENT, None).id
