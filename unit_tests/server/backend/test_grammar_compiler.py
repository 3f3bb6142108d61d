"""Compiling beside the steps: each constraint once, the last ones remembered, mistakes told."""

import threading
from pathlib import Path

import pytest

from server.backend import grammar_compiler
from server.backend.grammar_compiler import GrammarCompiler
from server.errors import CheckpointError, GrammarUnavailable, InvalidRequest
from server.messages import Constraint
from unit_tests.server.backend.walks import STOP_IDS, VOCAB_SIZE, allowed_ids, matches, tokenizer_in

LETTER = Constraint("regex", "[ab]")


@pytest.fixture
def compiler(tmp_path: Path) -> GrammarCompiler:
    return GrammarCompiler(tokenizer_in(tmp_path), VOCAB_SIZE, STOP_IDS)


def test_the_same_constraint_is_compiled_once_whoever_asks(compiler: GrammarCompiler) -> None:
    first = compiler.compile(LETTER)
    again = compiler.compile(Constraint("regex", "[ab]", after_token_id=5, field="guided_regex"))
    assert first is again and matches(first.result(), "a")
    assert compiler.compile(Constraint("choice", '["[ab]"]')) is not first


def test_matchers_are_copies_of_one(compiler: GrammarCompiler) -> None:
    start = compiler.compile(LETTER).result()
    one, other = start.copy(), start.copy()
    assert one.accept(ord("a")) and other.accept(ord("b"))
    assert matches(start, "a")


def test_what_was_asked_for_last_is_remembered(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "_MAX_REMEMBERED", 2)
    first, second = (compiler.compile(Constraint("regex", text)) for text in "ab")
    assert compiler.compile(Constraint("regex", "a")) is first
    compiler.compile(Constraint("regex", "c"))
    assert compiler.compile(Constraint("regex", "a")) is first
    assert compiler.compile(Constraint("regex", "b")) is not second


def test_long_texts_crowd_out_others(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "_MAX_REMEMBERED_CHARS", 10)
    first, second = (compiler.compile(Constraint("regex", text * 4)) for text in "ab")
    longest = compiler.compile(Constraint("regex", "c" * 11))
    assert compiler.compile(Constraint("regex", "c" * 11)) is longest
    assert compiler.compile(Constraint("regex", "a" * 4)) is not first
    assert compiler.compile(Constraint("regex", "b" * 4)) is not second


def test_the_caller_does_not_wait(compiler: GrammarCompiler) -> None:
    may_go_on = threading.Event()
    compiler._pool.submit(may_go_on.wait)
    future = compiler.compile(LETTER)
    assert not future.done()
    may_go_on.set()
    assert matches(future.result(timeout=60), "b")


@pytest.mark.parametrize(
    ("constraint", "message"),
    [(Constraint("regex", "("), "unclosed"), (Constraint("regex", "[a&&b]"), "nothing may follow")],
)
def test_mistakes_come_with_the_result_and_are_remembered(
    compiler: GrammarCompiler, constraint: Constraint, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        compiler.compile(constraint).result()
    assert compiler.compile(constraint).done()


@pytest.mark.parametrize(
    "error", [GrammarUnavailable("over 10 seconds"), CheckpointError("no file"), RuntimeError("?")]
)
def test_failures_of_the_machine_are_forgotten(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(kind: str, text: str) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_start", fail)
        assert compiler.compile(LETTER).exception() is not None
    assert matches(compiler.compile(LETTER).result(), "a")


def test_a_grammar_whose_copies_have_come_to_a_limit_is_compiled_again(compiler: GrammarCompiler) -> None:
    dear = Constraint("regex", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}")
    first = compiler.compile(dear)
    spoilt = first.result().copy()
    assert compiler.compile(dear) is first
    while not spoilt.error():
        allowed_ids(spoilt)
        spoilt.accept(ord("a"))
    again = compiler.compile(dear)
    assert again is not first and allowed_ids(again.result().copy()) == [ord("a")]


def test_a_checkpoint_without_tokenizer_or_end_serves_no_constraint(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json does not exist"):
        GrammarCompiler(tmp_path, VOCAB_SIZE, STOP_IDS).compile(LETTER).result()
    with pytest.raises(InvalidRequest, match="names no token that ends"):
        GrammarCompiler(tokenizer_in(tmp_path), VOCAB_SIZE, ()).compile(LETTER).result()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["root ::= root", 'root ::= "a" root | root'])
def test_a_grammar_without_a_text_is_refused(compiler: GrammarCompiler, text: str) -> None:
    future = compiler.compile(Constraint("grammar", text))
    if text == "root ::= root":
        with pytest.raises(InvalidRequest, match="nothing may follow"):
            future.result()
    else:
        assert future.result().copy().accept(ord("a"))
