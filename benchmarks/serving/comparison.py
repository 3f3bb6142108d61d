"""Servers against the first of them: ratios round by round, and how many greedy answers differ."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.serving.answer import Answer
from benchmarks.serving.load import Round
from benchmarks.serving.summary import summarize

COMPARED = ("output_tok_s", "ttft_ms", "tpot_ms", "e2e_ms")
SNIPPET_LEN = 40  # characters shown of an answer from where it differs


def compare(servers: Sequence[Sequence[Round]]) -> list[list[dict[str, Any]]]:
    """Per server and metric: the value of every round (latencies: p50) with median, min and max, and the same of its
    ratio to the first server in that round. Rounds that some server did not end are left out."""
    whole = [rounds for rounds in zip(*servers, strict=False) if not any(one.num_cut for one in rounds)]
    values = [[_measure(one) for one in rounds] for rounds in zip(*whole, strict=True)]
    return [[_describe(name, values[0], own) for name in COMPARED] for own in values]


def _measure(one: Round) -> dict[str, float | None]:
    summary = summarize([one], {})
    return {name: summary[name]["p50"] if isinstance(summary[name], dict) else summary[name] for name in COMPARED}


def _describe(name: str, first: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values = [one[name] for one in own]
    ratios = [_ratio(one[name], base[name]) for one, base in zip(own, first, strict=True)]
    return {
        "metric": name,
        "rounds": values,
        **_spread("", values),
        "ratios": ratios,
        **_spread("ratio_", ratios),
    }


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _spread(prefix: str, values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    spread = (statistics.median(known), min(known), max(known)) if known else (None, None, None)
    return {prefix + name: value for name, value in zip(("median", "min", "max"), spread, strict=True)}


def find_differences(first: Sequence[Round], other: Sequence[Round]) -> dict[str, Any]:
    """How many answers that both servers gave differ, and the first that does. Once a conversation differs, the rest
    of it was not asked the same."""
    own, others = _by_conversation(first), _by_conversation(other)
    num_compared, different = 0, []
    for index in sorted(own.keys() & others.keys()):
        for one, two in zip(own[index], others[index], strict=False):
            num_compared += 1
            if _said(one) != _said(two):
                different.append((one, two))
                break
    return {
        "compared": num_compared,
        "different": len(different),
        "example": _example(*different[0]) if different else None,
    }


def _by_conversation(rounds: Sequence[Round]) -> dict[int, list[Answer]]:
    answers = [answer for one in rounds for answer in one.answers if not answer.failure]
    ordered = sorted(answers, key=lambda answer: (answer.index, answer.turn))
    return {index: list(turns) for index, turns in itertools.groupby(ordered, key=lambda answer: answer.index)}


def _said(answer: Answer) -> tuple[str, str, str | None]:
    return answer.thought, answer.text, answer.finish_reason


def _example(one: Answer, two: Answer) -> dict[str, Any]:
    texts = [answer.thought + answer.text for answer in (one, two)]
    place = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    snippets = [text[place : place + SNIPPET_LEN] for text in texts]
    return {"conversation": one.index, "turn": one.turn, "character": place, "answers": snippets}
