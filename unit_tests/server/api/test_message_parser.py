"""The parser of an assistant's turn: what its pieces are, and that they do not depend on how the text was cut."""

import itertools
import json
import random
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.message_parser import (
    MAX_NAME_CHARS,
    ContentPiece,
    MessageParser,
    Piece,
    ReasoningPiece,
    ToolArguments,
    ToolCallStart,
    join_pieces,
)

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "where": {"type": "object"},
            "unit": {"type": ["string", "null"]},
        },
    },
    "stop": {},
}
CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
OSLO = ("weather", '{"city": "Oslo"}')
MARKERS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=", "</function>"),
    *("<parameter=", "</parameter>"),
)


@dataclass
class Message:
    """What the pieces of a message add up to."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)


def add_up(pieces: Iterable[Piece]) -> Message:
    """The message; a call's pieces must come after its start and with its index."""
    message = Message()
    for piece in pieces:
        if isinstance(piece, ReasoningPiece):
            message.reasoning += piece.text
        elif isinstance(piece, ContentPiece):
            message.content += piece.text
        elif isinstance(piece, ToolCallStart):
            assert piece.index == len(message.calls)
            assert re.fullmatch("call_[0-9a-f]{32}", piece.call_id)
            message.calls.append((piece.name, ""))
        else:
            assert piece.index == len(message.calls) - 1
            name, arguments = message.calls[-1]
            message.calls[-1] = (name, arguments + piece.text)
    return message


def feed(parser: MessageParser, parts: Iterable[str], is_truncated: bool = False) -> list[Piece]:
    """All pieces of a message."""
    pieces = [piece for part in parts for piece in parser.push(part)]
    return pieces + parser.finish(is_truncated)


def parse(text: str, starts_thinking: bool = False, is_truncated: bool = False, **settings: Any) -> Message:
    """The message of a text, which must be the same for any pieces of the text."""
    rng = random.Random(len(text))
    messages = []
    for cut in ([text], list(text), _cut(text, [rng.randrange(len(text) + 1) for _ in range(len(text) // 4)])):
        parser = MessageParser(settings.get("tools", TOOLS), starts_thinking, **_without_tools(settings))
        messages.append(add_up(feed(parser, cut, is_truncated)))
    assert messages[0] == messages[1] == messages[2]
    return messages[0]


def _without_tools(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "tools"}


def _cut(text: str, places: Sequence[int]) -> list[str]:
    return [text[start:end] for start, end in itertools.pairwise([0, *sorted(places), len(text)])]


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("hm</think>yes", "hm", "yes"),
        ("hm\n</think>\n\nyes\n", "hm\n", "yes\n"),
        ("<think>\nhm</think>yes", "\nhm", "yes"),
        ("hm</think>", "hm", ""),
        ("hm</think>\n\n", "hm", ""),
        ("hm", "hm", ""),
        ("", "", ""),
        ("</think>yes", "", "yes"),
        ("hm</think>yes</think> and no", "hm", "yes and no"),
        ("hm</think></think>\nyes", "hm", "yes"),
        ("a < b, <b>, </thin", "a < b, <b>, </thin", ""),
        ("hm</think>a <think> is a tag", "hm", "a <think> is a tag"),
        ("hm</think><think>once more</think>yes", "hmonce more", "yes"),
        ("`<function=weather>` in thought</think>yes", "`<function=weather>` in thought", "yes"),
        ("</tool_call> in thought</think>yes", "</tool_call> in thought", "yes"),
    ],
)
def test_reasoning_ends_at_its_mark(text: str, reasoning: str, content: str) -> None:
    assert parse(text, starts_thinking=True) == Message(reasoning, content)


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("\n\nyes \n", "", "\n\nyes \n"),
        (" \n", "", " \n"),
        ("yes</think>no", "", "yesno"),
        ("<think>hm</think>\n\nyes", "hm", "yes"),
        ("\n<think>hm</think>yes", "hm", "yes"),
        ("a<think>hm</think>yes", "", "a<think>hmyes"),
    ],
)
def test_without_an_open_thought_all_is_content_but_for_a_thought_that_comes_first(
    text: str, reasoning: str, content: str
) -> None:
    assert parse(text) == Message(reasoning, content)


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_reasoning_that_is_not_separated_is_content_as_it_is(tools: Any) -> None:
    message = parse(f"hm</think>\n\nyes {CALL}", True, tools=tools, separates_reasoning=False)
    calls = f" {CALL}" if tools is None else ""
    assert message == Message("", "hm</think>\n\nyes" + calls, [] if tools is None else [OSLO])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [OSLO]),
        (f"\n\n{CALL}\n", "", [OSLO]),
        (f"I look.\n\n{CALL}", "I look.", [OSLO]),
        (f"I look.{CALL}\n\nDone.\n", "I look.Done.\n", [OSLO]),
        (f"{CALL}\n{CALL}", "", [OSLO, OSLO]),
        (CALL + CALL, "", [OSLO, OSLO]),
        ("<tool_call>\n<function=stop>\n</function>\n</tool_call>", "", [("stop", "{}")]),
        ("<tool_call><function=stop></function></tool_call>", "", [("stop", "{}")]),
        (
            f"<tool_call>\n<function=unknown>\n<parameter=n>\n1\n</parameter>{CALL[-24:]}",
            "",
            [("unknown", '{"n": "1"}')],
        ),
    ],
)
def test_calls_are_told_apart_from_content(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parse(text) == Message("", content, calls)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (CALL.replace("</parameter>\n", ""), [OSLO]),
        (CALL.replace("</function>\n", ""), [OSLO]),
        (CALL.replace("\n</tool_call>", ""), [OSLO]),
        (CALL.replace("</parameter>\n</function>\n", ""), [OSLO]),
        (CALL[: CALL.index("\n</parameter>")], [OSLO]),
        (CALL[: CALL.index("</function>")], [OSLO]),
        (CALL.replace("<tool_call>\n", ""), [OSLO]),
        (CALL.replace("<tool_call>\n", "").replace("\n</tool_call>", ""), [OSLO]),
        (CALL.replace("\n</tool_call>", f"\n{CALL}"), [OSLO, OSLO]),
        (CALL.replace("</tool_call>", CALL.removeprefix("<tool_call>\n")), [OSLO, OSLO]),
        (CALL.replace("</function>\n</tool_call>", CALL), [OSLO, OSLO]),
        (CALL.replace("\n<parameter", "<parameter").replace("\n", ""), [OSLO]),
        ("<function=stop>", [("stop", "{}")]),
        (
            "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n<parameter=days>\n3\n</function>\n</tool_call>",
            [("weather", '{"city": "Oslo", "days": 3}')],
        ),
    ],
)
def test_forgotten_markup_is_tolerated(text: str, calls: list[tuple[str, str]]) -> None:
    assert parse(text) == Message("", "", calls)
    assert parse(f"hm</think>yes {text}", starts_thinking=True) == Message("hm", "yes", calls)


@pytest.mark.parametrize("space", ["", "\n", "\n\n"])
def test_a_call_inside_the_reasoning_ends_it(space: str) -> None:
    assert parse(f"I look.{space}{CALL}\nDone", starts_thinking=True) == Message(f"I look.{space}", "Done", [OSLO])


@pytest.mark.parametrize(
    "text",
    [
        "write `<tool_call>` for a call",
        "<tool_call>quoted</tool_call>",
        "<tool_call>\n<function=two words>",
        "<tool_call>\n<function=>",
        "<tool_call>\n</tool_call>",
        "<tool_call>\n\n<func",
        "<tool_call>",
        "<tool_call><tool_call>\n<parameter=city>",
        "`<function=` begins one",
        "</tool_call>",
        "</parameter> <parameter=city> </function>",
        f"<function={'x' * (MAX_NAME_CHARS + 1)}>",
        "<function=weather",
        "a < b <",
        "<<function>",
    ],
)
def test_what_only_looks_like_a_call_is_text(text: str) -> None:
    assert parse(text) == Message("", text)
    assert parse(text, starts_thinking=True) == Message(text, "")
    assert parse(f"{text}</think>yes", starts_thinking=True) == Message(text, "yes")


def test_without_tools_calls_are_text() -> None:
    assert parse(f"hm\n{CALL}</think>\n\nyes \n{CALL}\n", True, tools=None) == Message(f"hm\n{CALL}", f"yes \n{CALL}\n")


def test_without_parallel_calls_the_first_one_counts() -> None:
    assert parse(f"{CALL}\n{CALL} done", is_parallel=False) == Message("", "done", [OSLO])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CALL[:-1], Message("", "", [OSLO])),
        (CALL[: CALL.index("</function>")], Message("", "", [("weather", '{"city": "Oslo"')])),
        (CALL[: CALL.index("</para")], Message("", "", [("weather", '{"city": "Oslo')])),
        (CALL[: CALL.index("\n</para")] + " <b>, NO", Message("", "", [("weather", '{"city": "Oslo <b>, NO')])),
        ("<function=weather>\n<parameter=days>\n3", Message("", "", [("weather", "")])),
        ("<function=weather>\n<parameter=da", Message("", "", [("weather", "")])),
        ("I look.\n<tool_call>\n<function=wea", Message("", "I look.")),
        ("I look.\n<tool_call>\n<func", Message("", "I look.")),
        ("I look.\n<tool_call>", Message("", "I look.")),
        ("I look.\n", Message("", "I look.\n")),
        ("a <", Message("", "a <")),
    ],
)
def test_a_message_that_was_cut_off_shows_no_markup_and_leaves_its_arguments_open(text: str, message: Message) -> None:
    assert parse(text, is_truncated=True) == message


def test_strings_are_told_while_they_come() -> None:
    parser = MessageParser(TOOLS, starts_thinking=False)
    start = parser.push("<tool_call>\n<function=weather>\n<parameter=city>\n")
    assert [type(piece) for piece in start] == [ToolCallStart, ToolArguments]
    texts = [
        "".join(piece.text for piece in parser.push(part))
        for part in ('Os"', "lo", "\n", "N", "O </", "param>", "\n</", "parameter>", "\n</function>")
    ]
    assert texts == ['Os\\"', "lo", "", "\\nN", "O ", "</param>", "", '"', "}"]


def test_text_goes_out_as_soon_as_it_cannot_be_markup() -> None:
    parser = MessageParser(TOOLS, starts_thinking=True)
    parts = ["I ", "think <", "b", "> </th", "ink", ">\n", "\nyes", " \n", "no <to", "ol>"]
    told = [[getattr(piece, "text", None) for piece in parser.push(part)] for part in parts]
    assert told == [["I "], ["think "], ["<b"], ["> "], [], [], ["yes"], [], [" \nno"], [" <tool>"]]


fragments = st.one_of(
    st.sampled_from(MARKERS),
    st.sampled_from(MARKERS).flatmap(lambda marker: st.integers(1, len(marker)).map(lambda size: marker[:size])),
    st.sampled_from(
        ["weather>", "city>", "days>", "unit>", "where>", "\n", " ", "3", "null", "{}", "<", ">", "=", "é😀"]
    ),
    st.sampled_from([CALL, "<tool_call>\n<function=weather>\n", "<parameter=unit>\n", "<parameter=days>\n"]),
    st.text(alphabet='ab<>/=\n "\\', max_size=5),
)
texts = st.lists(fragments, max_size=30).map("".join)


@given(text=texts, data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_cut_of_any_text_gives_the_same_pieces(text: str, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    starts_thinking, is_truncated, is_parallel = (data.draw(st.booleans()) for _ in range(3))
    tools = data.draw(st.sampled_from([TOOLS, None]))
    found = []
    for parts in ([text], list(text), _cut(text, places)):
        parser = MessageParser(tools, starts_thinking, is_parallel=is_parallel)
        pieces = join_pieces(feed(parser, parts, is_truncated))
        found.append([piece.name if isinstance(piece, ToolCallStart) else piece for piece in pieces])
        assert all(getattr(piece, "text", "x") for piece in pieces), "a piece says something"
    assert found[0] == found[1] == found[2]
    if not is_truncated:
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in add_up(pieces).calls)


plain = st.text(alphabet=st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=20)
values = st.one_of(plain, st.integers(), st.dictionaries(plain, st.integers(), max_size=2))


@given(
    reasoning=plain,
    content=plain.map(str.strip),
    calls=st.lists(st.tuples(plain, st.integers(), st.dictionaries(plain, st.integers(), max_size=2)), max_size=3),
    places=st.lists(st.integers(0, 400), max_size=30),
)
@settings(max_examples=100, deadline=None)
def test_a_message_as_the_template_writes_it_is_read_back(
    reasoning: str, content: str, calls: list[tuple[str, int, dict[str, int]]], places: list[int]
) -> None:
    text = f"{reasoning}</think>\n\n{content}"
    for city, days, where in calls:
        parameters = {"city": city, "days": days, "where": json.dumps(where)}
        body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
        text += f"\n\n<tool_call>\n<function=weather>\n{body}</function>\n</tool_call>"
    parts = _cut(text, [min(place, len(text)) for place in places])
    message = add_up(feed(MessageParser(TOOLS, starts_thinking=True), parts))
    assert (message.reasoning, message.content) == (reasoning, content)
    expected = [{"city": city, "days": days, "where": where} for city, days, where in calls]
    assert [json.loads(arguments) for _, arguments in message.calls] == expected


@pytest.mark.parametrize(
    "text",
    [
        "a" * 40_000,
        "<" * 40_000,
        " " * 40_000,
        "<tool_call>" + " " * 40_000,
        "<tool_call>\n<function=" + "a" * 40_000,
        "<function=weather><parameter=" + "a" * 40_000,
        "<function=weather><parameter=city>" + "a\n" * 20_000,
        "<function=weather><parameter=where>" + "[" * 40_000,
        "<function=weather><parameter=unit>" + " " * 40_000,
        "<tool_call>" * 5_000,
        CALL * 500,
    ],
)
def test_the_time_is_linear_in_the_text_however_it_comes(text: str) -> None:
    started = time.process_time()
    feed(MessageParser(TOOLS, starts_thinking=True), text)
    feed(MessageParser(TOOLS, starts_thinking=False), [text])
    assert time.process_time() - started < 2  # about 0.1 s; quadratic time is many seconds


def test_a_call_is_over_when_its_block_is() -> None:
    parser = MessageParser({"f": {}}, starts_thinking=False)
    found = []
    for part in ("a</tool_call>", "<tool_call>\n<function=f>", "</function>", "\n</tool_call>", "\n<function=f>"):
        parser.push(part)
        found.append(parser.has_call)
    assert found == [False, False, False, True, False]


@pytest.mark.parametrize("length", range(1, len("<tool_call>")))
def test_the_beginning_of_a_marker_is_left_out_where_the_message_was_cut_off(length: int) -> None:
    text = "Hm.\n\n" + "<tool_call>"[:length]
    told = {}
    for is_truncated in (True, False):
        parser = MessageParser({"f": {}}, starts_thinking=False)
        pieces = [piece for char in text for piece in parser.push(char)] + parser.finish(is_truncated)
        told[is_truncated] = "".join(piece.text for piece in pieces if isinstance(piece, ContentPiece))
    assert told[False] == text
    assert told[True] == (text if length == 1 else "Hm.")  # one character begins many things
