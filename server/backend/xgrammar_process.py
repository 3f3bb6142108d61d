"""Context-free grammars and structural tags as masks, by xgrammar, whose compiler runs in a process of its own.

Some grammars keep the library busy for ever, or take all memory, and it cannot be interrupted. So a child compiles
them, tries them out, kills itself when its time is over, and sends the compiled grammar over. It starts with the first
grammar and not before, because it takes 270 MB of memory (180 of its own) for the libraries that xgrammar imports.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from server.backend.token_masks import TokenMasks
from server.errors import CheckpointError, GrammarUnavailable, InvalidRequest
from server.tokenizer import Tokenizer

COMPILE_SECONDS = 10
_MAX_BYTES = 4 * 2**30
_NICENESS = 5
# The longest tokens that a grammar allows, one after the other: where following costs more and more it shows.
_TRIAL_TOKENS, _TRIAL_SECONDS = 64, 1.0
_MAX_THREADS = 4
# xgrammar's messages begin with the time and the place in its source.
_ORIGIN = re.compile(r"\[[\d:]+\] \S+:\d+: (Check failed: \([^)]*\(.*?\)\) is false: )?")
_SHOWN_CHARS = 200


class XgrammarMatcher:
    """Where an output stands in its compiled grammar."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def copy(self) -> "XgrammarMatcher":
        """Another one in the same place."""
        return XgrammarMatcher(self._matcher.fork())

    def renew(self) -> "XgrammarMatcher":
        """One at the start."""
        matcher = self._matcher.fork()
        matcher.reset()
        return XgrammarMatcher(matcher)

    def fill(self, masks: TokenMasks, row: int) -> None:
        """Allow in `row` what may come next; ids that end a request where the output may end."""
        self._matcher.fill_next_token_bitmask(masks.packed, row)

    def accept(self, token_id: int) -> bool:
        """Go on by a token; False, and nothing changes, for one that may not come."""
        return bool(self._matcher.accept_token(token_id))

    def rollback(self, count: int) -> None:
        """Take the last tokens back."""
        self._matcher.rollback(count)

    def error(self) -> str:
        """Nothing ever fails."""
        return ""


class XgrammarProcess:
    """Compiles for the tokenizer of one checkpoint, each grammar within `seconds`; used from one thread. What is never
    allowed: see Guidance."""

    def __init__(self, directory: str | Path, vocab_size: int, stop_ids: Sequence[int], seconds: int = COMPILE_SECONDS):
        self._seconds = seconds
        self._arguments = [str(seconds), str(directory), str(vocab_size), *map(str, stop_ids)]
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._tokenizer_info: Any = None

    def compile(self, kind: str, text: str) -> XgrammarMatcher:
        """At the start of an output. Raises InvalidRequest, GrammarUnavailable where time or memory is over. The time
        to start counts for no grammar."""
        if self._process is not None and self._process.poll() is not None:
            self._connection = None  # it has ended since the last grammar
        if self._connection is None:
            self._start()
        assert self._connection is not None and self._process is not None
        try:
            self._connection.send((kind, text))
            compiled, error, is_slow = self._connection.recv()
        except (EOFError, OSError):
            self._connection.close()
            self._connection = None
            is_slow = self._process.wait() == -signal.SIGALRM
            limit = f"{self._seconds} seconds" if is_slow else "the memory of a process"
            raise GrammarUnavailable(f"compiling it takes more than {limit}; make it simpler") from None
        if error:
            raise (GrammarUnavailable if is_slow else InvalidRequest)(error)
        import xgrammar

        grammar = xgrammar.CompiledGrammar.deserialize_json(compiled, self._tokenizer_info)
        return XgrammarMatcher(xgrammar.GrammarMatcher(grammar))

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno()), *self._arguments],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # xgrammar's warnings about the grammars of clients
            start_new_session=True,
        )
        theirs.close()
        import xgrammar  # takes most of a second, and transformers with it, while the process starts

        try:
            self._tokenizer_info = xgrammar.TokenizerInfo.deserialize_json(self._connection.recv())
        except EOFError:
            self._connection = None
            raise GrammarUnavailable("its compiler cannot read this checkpoint's tokenizer") from None


def serve(connection: Connection, seconds: int, directory: str, vocab_size: int, stop_ids: list[int]) -> None:
    """The child: compile what comes, until the other end has gone."""
    import xgrammar

    tokenizer = Tokenizer(directory)
    vocabulary = [b"" if i in tokenizer.special_ids else tokenizer.token_bytes(i) for i in range(vocab_size)]
    info = xgrammar.TokenizerInfo(vocabulary, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=stop_ids)
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    compiler = xgrammar.GrammarCompiler(info, max_threads=threads, cache_enabled=False)
    connection.send(info.serialize_json())
    os.nice(_NICENESS)
    while True:
        kind, text = connection.recv()
        signal.alarm(seconds)  # its default is to end the process, whatever that is doing
        try:
            grammar = _compile(compiler, kind, text)
            _try_out(xgrammar.GrammarMatcher(grammar), vocabulary, stop_ids)
            answer = grammar.serialize_json(), "", False
        except (RuntimeError, ValueError, RecursionError, TimeoutError) as error:
            answer = "", _describe(error), isinstance(error, TimeoutError)
        signal.alarm(0)
        connection.send(answer)


def _compile(compiler: Any, kind: str, text: str) -> Any:
    if kind == "structural_tag":
        return compiler.compile_structural_tag(json.dumps(bound_whitespace(json.loads(text))))
    return compiler.compile_grammar(text) if "::=" in text else compiler.compile_lark(text)


def _try_out(matcher: Any, vocabulary: Sequence[bytes], stop_ids: Sequence[int]) -> None:
    masks = TokenMasks(1, len(vocabulary), "cpu")
    lengths = np.array([len(token) for token in vocabulary])
    lengths[list(stop_ids)] = 0
    start = time.perf_counter()
    for _ in range(_TRIAL_TOKENS):
        matcher.fill_next_token_bitmask(masks.packed, 0)
        is_allowed = np.unpackbits(masks.array[0].view(np.uint8), bitorder="little")[: len(vocabulary)]
        longest = int((lengths * is_allowed).argmax())
        if time.perf_counter() - start > _TRIAL_SECONDS:
            raise TimeoutError("it takes too long to follow")
        if not lengths[longest] or not matcher.accept_token(longest):
            return


def bound_whitespace(tag: Any) -> Any:
    """A structural tag with at most one character of whitespace in a row in its JSON, where it sets no other limit."""
    if isinstance(tag, list):
        return [bound_whitespace(entry) for entry in tag]
    if not isinstance(tag, dict):
        return tag
    if tag.get("type") == "json_schema" and "json_schema" in tag:
        return {"max_whitespace_cnt": 1, **tag}
    return {key: bound_whitespace(value) for key, value in tag.items()}


def _describe(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(_ORIGIN.sub("", str(error)).split())[:_SHOWN_CHARS]


def main() -> None:
    """Run as a process: the number of a connection, then the arguments of `serve`."""
    number, seconds, directory, vocab_size, *stop_ids = sys.argv[1:]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_BYTES, _MAX_BYTES))
    try:
        serve(Connection(int(number)), int(seconds), directory, int(vocab_size), list(map(int, stop_ids)))
    except (EOFError, BrokenPipeError, CheckpointError):
        sys.exit()


if __name__ == "__main__":
    main()
