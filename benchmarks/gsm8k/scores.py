"""What a run amounts to: accuracy, speed and acceptance, and where the outputs of two servers part."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gsm8k.client import Answer
from benchmarks.gsm8k.problems import Problem
from benchmarks.openai_server import Counters, count_foreign_tokens, describe_speculation
from benchmarks.report import print_table

SNIPPET_LEN = 40  # characters shown of an output from where it differs


@dataclass(frozen=True)
class Run:
    """What one server answered, in the order of the questions, why it failed others, and by how much its counters grew.
    `is_partial` says that it was broken off."""

    url: str
    model: str
    answers: Mapping[Problem, Answer]
    seconds: float
    counters: Counters
    failures: Sequence[str] = ()
    is_partial: bool = False


def score(done: Run) -> dict[str, Any]:
    """Shares of all questions that were answered (at least one), tokens, speed and acceptance. `stderr` is of the
    accuracy; None stands for not known."""
    answers, size = list(done.answers.values()), len(done.answers)
    is_right = [answer.value == problem.gold for problem, answer in done.answers.items()]
    accuracy, num_tokens = sum(is_right) / size, sum(answer.num_tokens for answer in answers)
    return {
        "url": done.url,
        "model": done.model,
        "questions": size,
        "failed": len(done.failures),
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / size),
        "invalid": sum(answer.value is None for answer in answers) / size,
        "truncated": sum(answer.is_truncated for answer in answers) / size,
        "right_though_truncated": sum(a.is_truncated and right for a, right in zip(answers, is_right, strict=True))
        / size,
        "mean_output_len": num_tokens / size,
        "output_tok_s": num_tokens / done.seconds,
        "seconds": done.seconds,
        **describe_speculation(done.counters),
        "tokens_of_others": count_foreign_tokens(done.counters, num_tokens),
    }


def find_differences(first: Run, second: Run) -> list[dict[str, Any]]:
    """One entry per question that both answered otherwise: where, from 0, both from there on, and both answers."""
    found = []
    for problem, one in first.answers.items():
        other = second.answers.get(problem, one)
        if (one.text, one.finish_reason) == (other.text, other.finish_reason):
            continue
        place = next((i for i, (a, b) in enumerate(zip(one.text, other.text, strict=False)) if a != b), None)
        place = min(len(one.text), len(other.text)) if place is None else place
        outputs = [_snippet(answer, place) for answer in (one, other)]
        values = [None if answer.value is None else str(answer.value) for answer in (one, other)]
        found.append({"question": problem.number, "character": place, "outputs": outputs, "answers": values})
    return found


def _snippet(answer: Answer, place: int) -> str:
    rest = answer.text[place : place + SNIPPET_LEN]
    return rest if place + SNIPPET_LEN < len(answer.text) else f"{rest}<{answer.finish_reason}>"


def print_results(scores: list[dict[str, Any]], differences: list[dict[str, Any]], num_compared: int) -> None:
    """The table, and a line per difference among the outputs that were compared."""
    print_table([_table_row(result) for result in scores])
    for result in scores:
        if result["tokens_of_others"]:
            print(
                f"{result['url']} served {result['tokens_of_others']} more tokens to others: acceptance is theirs too"
            )
    for found in differences:
        one, other = (f"{text!r} ({value})" for text, value in zip(found["outputs"], found["answers"], strict=True))
        print(f"question {found['question']} differs from character {found['character']}: {one} | {other}")
    if num_compared:
        print(f"{len(differences)} of {num_compared} outputs differ")


def _table_row(result: dict[str, Any]) -> dict[str, Any]:
    shown = {name: f"{result[name]:.3f}" for name in ("accuracy", "stderr", "invalid", "truncated")}
    shown |= {name: _or_dash(result[name]) for name in ("drafts_per_step", "accept_length")}
    per_position = result["acceptance_per_position"]
    return {
        "questions": result["questions"],
        "failed": result["failed"],
        **shown,
        "mean_output_len": result["mean_output_len"],
        "output_tok_s": result["output_tok_s"],
        "acceptance_per_position": " ".join(f"{share:.3f}" for share in per_position) or "-",
        "server": result["url"],
    }


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_outputs(path: str, runs: Sequence[Run]) -> None:
    """One JSON line per server and question: what was asked for and what came."""
    with Path(path).open("w", encoding="utf-8") as file:
        for done in runs:
            for problem, answer in done.answers.items():
                value = None if answer.value is None else str(answer.value)
                numbers = {"question": problem.number, "gold": str(problem.gold), "answer": value}
                line = {"url": done.url, **numbers, "finish_reason": answer.finish_reason, "text": answer.text}
                file.write(json.dumps(line) + "\n")
