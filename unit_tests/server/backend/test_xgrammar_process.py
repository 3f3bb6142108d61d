"""Grammars from a process of their own: what they let through, and what happens to those that never compile."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from server.backend.xgrammar_process import XgrammarProcess, bound_whitespace
from server.errors import GrammarUnavailable, InvalidRequest
from unit_tests.checkpoints import IM_END
from unit_tests.server.backend.walks import STOP_IDS, VOCAB_SIZE, allowed_ids, draw_text, matches, tokenizer_in

# Each test may have to start the process, which takes some seconds.
pytestmark = pytest.mark.slow
NESTED = "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"
AMBIGUOUS = " ".join(["x"] * 64)  # takes thirty times as long as it may
TAG = {"type": "tag", "begin": "<f>", "content": {"type": "json_schema", "json_schema": {"type": "object"}}, "end": "!"}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> XgrammarProcess:
    return XgrammarProcess(tokenizer_in(tmp_path_factory.mktemp("xgrammar")), VOCAB_SIZE, STOP_IDS, seconds=2)


def tag_text(form: dict[str, Any]) -> str:
    return json.dumps({"type": "structural_tag", "format": form})


@pytest.mark.parametrize(
    ("grammar", "inside", "outside"),
    [
        ('root ::= "(" root ")" | [a-c]*', ["", "abc", "((b))"], ["(", "d", "(a"]),
        ('start: "a" | "b" start', ["a", "bba"], ["b", ""]),
        ('root ::= [a-z]* "b"', ["b", "ab", "abb"], ["a", ""]),
    ],
)
def test_grammars_in_both_notations(
    process: XgrammarProcess, grammar: str, inside: list[str], outside: list[str]
) -> None:
    start = process.compile("grammar", grammar)
    assert all(matches(start, text) for text in inside)
    assert not any(matches(start, text) for text in outside)


def test_structural_tags_with_bounded_whitespace(process: XgrammarProcess) -> None:
    start = process.compile("structural_tag", tag_text(TAG))
    assert matches(start, '<f>{"a": [1, 2]}!') and matches(start, '<f>{"a":1}!')
    assert not matches(start, '<f>{"a":  1}!') and not matches(start, "<f>{}")
    free = process.compile("structural_tag", tag_text({"type": "triggered_tags", "triggers": ["<f>"], "tags": [TAG]}))
    assert matches(free, "") and matches(free, 'text <f>{"b": null}! and more')
    assert not matches(free, "text <f>x")
    assert draw_text(start.copy(), 1) is not None


def test_tokens_come_back_and_copies_go_their_own_ways(process: XgrammarProcess) -> None:
    matcher = process.compile("grammar", 'root ::= "a" "b"* "c"')
    assert matcher.accept(ord("a")) and not matcher.accept(ord("x")) and not matcher.accept(IM_END)
    other = matcher.copy()
    assert all(matcher.accept(byte) for byte in b"bbc") and allowed_ids(matcher) == [IM_END]
    assert allowed_ids(other) == [ord("b"), ord("c")]
    assert allowed_ids(matcher.renew()) == [ord("a")]
    matcher.rollback(3)
    assert allowed_ids(matcher) == [ord("b"), ord("c")] and not matcher.error()


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("grammar", 'root ::= "a', 'Expect " in string literal'),
        ("grammar", "root ::= nowhere", "nowhere"),
        ("grammar", 'first ::= "a"', "root"),
        ("grammar", 'start: "a', "."),
        ("grammar", "", "."),
        ("grammar", "root ::= " + "(" * 9999 + '"a"' + ")" * 9999, "[Nn]est"),
        ("structural_tag", "{", "."),
        ("structural_tag", '{"type": "structural_tag"}', "format"),
        ("structural_tag", tag_text({"type": "shoe"}), "."),
        (
            "structural_tag",
            tag_text({**TAG, "content": {"type": "json_schema", "json_schema": {"type": "shoe"}}}),
            "shoe",
        ),
        ("structural_tag", "[" * 100_000, "too deeply"),
    ],
)
def test_what_is_no_grammar_is_refused(process: XgrammarProcess, kind: str, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        process.compile(kind, text)
    assert len(caught.value.message) <= 200 and ".cc" not in caught.value.message


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("structural_tag", tag_text({"type": "regex", "pattern": NESTED})),
        ("grammar", f'root ::= {AMBIGUOUS}\nx ::= {AMBIGUOUS} | "a" | "" | root'),
    ],
)
def test_a_grammar_that_takes_longer_with_every_token_is_refused(
    process: XgrammarProcess, kind: str, text: str
) -> None:
    with pytest.raises(GrammarUnavailable, match=r"too long to follow|more than 2 seconds"):
        process.compile(kind, text)
    assert process.compile("grammar", 'root ::= "a"').accept(ord("a"))


def test_a_grammar_that_takes_too_long_to_compile_ends_in_time_and_the_next_one_compiles(
    process: XgrammarProcess,
) -> None:
    rules = "\n".join(f'r{i} ::= "a" r{i + 1}' for i in range(40_000))
    with pytest.raises(GrammarUnavailable, match="more than 2 seconds"):
        process.compile("grammar", f'root ::= r0\n{rules}\nr40000 ::= "b"')
    assert process.compile("grammar", 'root ::= "a"').accept(ord("a"))


def test_a_process_that_is_killed_is_started_again(process: XgrammarProcess) -> None:
    process.compile("grammar", 'root ::= "a"')
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()
    assert process.compile("grammar", 'root ::= "b"').accept(ord("b"))


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GrammarUnavailable, match="tokenizer"):
        XgrammarProcess(tmp_path, VOCAB_SIZE, STOP_IDS).compile("grammar", 'root ::= "a"')


def test_limits_of_whitespace_are_kept_where_they_are_set() -> None:
    schema = {"type": "json_schema", "json_schema": {"type": "object"}}
    tag = {"format": [{"content": schema}, {**schema, "max_whitespace_cnt": 7}, {"type": "json_schema"}, 5]}
    bounded = bound_whitespace(tag)
    assert bounded["format"][0]["content"]["max_whitespace_cnt"] == 1
    assert bounded["format"][1:] == tag["format"][1:]
