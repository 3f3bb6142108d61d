"""tokens.js: which token wrote which text, however tokens and text arrive."""

import json
import random
from typing import Any

import pytest
from playwright.sync_api import Page

from unit_tests.server.api.playground.conftest import Visit

WORDS = ["the", " fox", "\n", "\n\n", " ", "naïve", " 中文", "😀", "</", "b>", "a", "A a", "12", "="]
# Feeds the arrivals of each case to an Alignment, taking what is certain after each arrival.
FEED = """async json => {
  const { Alignment } = await import("/playground/tokens.js");
  return JSON.stringify(JSON.parse(json).map(arrivals => {
    const alignment = new Alignment();
    const pieces = [];
    for (const { texts, tokens, origins } of arrivals) {
      for (const [kind, text] of texts) alignment.addText(kind, text);
      alignment.addTokens(tokens.map(bytes => ({ bytes })), origins);
      pieces.push(...alignment.take());
    }
    alignment.finish();
    pieces.push(...alignment.take());
    return pieces.map(({ kind, text, token }) => [kind, text, token && [...token.bytes], token && token.origin]);
  }));
}"""
Piece = tuple[str, str, list[int] | None, str | None]


def split(data: bytes, rng: random.Random) -> list[bytes]:
    """Tokens of one to six bytes: they cut characters."""
    parts = []
    while data:
        length = rng.randint(1, 6)
        parts.append(data[:length])
        data = data[length:]
    return parts


def make_case(seed: int) -> tuple[list[dict[str, Any]], dict[str, str], list[bytes], str]:
    """(arrivals, text per kind, tokens, origins): text lags behind its tokens by a random number of characters."""
    rng = random.Random(seed)
    texts = {kind: "x" + "".join(rng.choices(WORDS, k=rng.randint(0, 12))) for kind in ("reasoning", "content")}
    tokens = split(texts["reasoning"].encode(), rng) + [b"</think>", b"\n\n"]
    tokens += split(texts["content"].encode(), rng) + [b"<|im_end|>"]
    origins = "".join(rng.choice("dt") for _ in tokens)
    arrivals, num_sent, num_said = [], 0, 0
    said = [("reasoning", char) for char in texts["reasoning"]] + [("content", char) for char in texts["content"]]
    while num_sent < len(tokens):
        end = num_sent + rng.randint(1, 4)
        written = b"".join(tokens[:end]).replace(b"</think>\n\n", b"").decode(errors="ignore")
        until = max(num_said, min(len(written.removesuffix("<|im_end|>")), len(said)) - rng.randint(0, 3))
        if end >= len(tokens):
            until = len(said)
        arrivals.append(
            {
                "texts": said[num_said:until],
                "tokens": [list(token) for token in tokens[num_sent:end]],
                "origins": origins[num_sent:end],
            }
        )
        num_sent, num_said = end, until
    return arrivals, texts, tokens, origins


def feed(page: Page, *cases: list[dict[str, Any]]) -> list[list[Piece]]:
    """The pieces (kind, text, bytes, origin) of each case."""
    results = json.loads(page.evaluate(FEED, json.dumps(cases)))
    return [[tuple(piece) for piece in pieces] for pieces in results]


@pytest.fixture
def page(visit: Visit) -> Page:
    """Where tokens.js runs."""
    return visit.page


def test_no_text_and_no_token_is_lost_and_origins_stay_with_their_tokens(page: Page) -> None:
    cases = [make_case(seed) for seed in range(500)]
    results = feed(page, *(arrivals for arrivals, *_ in cases))
    for seed, (pieces, (_, texts, tokens, origins)) in enumerate(zip(results, cases, strict=True)):
        for kind, text in texts.items():
            assert "".join(text for found, text, *_ in pieces if found == kind) == text, seed
        assert [bytes(data) for _, _, data, _ in pieces if data is not None] == tokens, seed
        assert "".join(origin for *_, origin in pieces if origin is not None) == origins, seed


def test_a_token_stands_where_its_text_is_when_text_and_tokens_come_together(page: Page) -> None:
    arrivals = [
        {"texts": [["reasoning", "I add"]], "tokens": [list(b"I"), list(b" add")], "origins": "pd"},
        {"texts": [], "tokens": [list(b"</think>"), list(b"\n\n")], "origins": "dt"},
        {"texts": [["content", "So 中"]], "tokens": [list(b"So "), *([b] for b in "中".encode())], "origins": "dddt"},
        {"texts": [], "tokens": [list(b"<|im_end|>")], "origins": "t"},
    ]
    shown = [(kind, text, origin) for kind, text, _, origin in feed(page, arrivals)[0]]
    assert shown == [
        ("reasoning", "I", "p"),
        ("reasoning", " add", "d"),
        ("", "", "d"),
        ("", "", "t"),
        ("content", "So ", "d"),
        ("", "", "d"),
        ("", "", "d"),
        ("content", "中", "t"),
        ("", "", "t"),
    ]


def test_a_stop_string_cuts_its_token_and_markup_of_calls_has_no_text(page: Page) -> None:
    stopped = [
        {"texts": [["content", "a"]], "tokens": [list(b"a"), list(b"b END c")], "origins": "dt"},
        {"texts": [["content", "b"]], "tokens": [], "origins": ""},
    ]
    called = [
        {"texts": [["content", "See:"]], "tokens": [list(b"See:"), list(b"\n"), list(b"<call>")], "origins": "ddt"},
        {"texts": [["call", ""]], "tokens": [list(b"<function=f>"), list(b"</tool_call>")], "origins": "dt"},
        {"texts": [["content", "Done"]], "tokens": [list(b"\n"), list(b"Done")], "origins": "dt"},
    ]
    shown, pieces = feed(page, stopped, called)
    assert [(kind, text, origin) for kind, text, _, origin in shown] == [("content", "a", "d"), ("content", "b", "t")]
    assert [(text, origin) for _, text, _, origin in pieces if text] == [("See:", "d"), ("Done", "t")]
    assert len(pieces) == 7


def test_newlines_that_the_server_cuts_stay_with_their_token_even_if_its_text_is_late(page: Page) -> None:
    arrivals = [
        {
            "texts": [["reasoning", "a"]],
            "tokens": [list(b"a"), list(b"</think>"), list(b"\n\nHello")],
            "origins": "ptd",
        },
        {"texts": [["content", "Hel"]], "tokens": [], "origins": ""},
        {"texts": [["content", "lo you"]], "tokens": [list(b" you")], "origins": "t"},
    ]
    shown = [(text, origin) for _, text, _, origin in feed(page, arrivals)[0]]
    assert shown == [("a", "p"), ("", "t"), ("Hello", "d"), (" you", "t")]


def test_text_without_tokens_is_shown_all_the_same(page: Page) -> None:
    arrivals = [{"texts": [["reasoning", "hm"], ["content", "yes"]], "tokens": [], "origins": ""}]
    assert feed(page, arrivals) == [[("reasoning", "hm", None, None), ("content", "yes", None, None)]]
