"""Servers take turns in answering the same prompts: acceptance, speed over plain decoding, and tokens that differ."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks.openai_server import Counters, RunFailed, Server, describe_speculation, growth, one_line
from benchmarks.report import spread

STOP = ["Question:"]  # where a checkpoint that never ends would ask itself the next problem


@dataclass(frozen=True)
class Answer:
    """What a server wrote."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class Pass:
    """A server's answers to all prompts, the seconds they took, and by how much its counters grew."""

    answers: list[Answer]
    seconds: float
    counters: Counters

    @property
    def speed(self) -> float:
        """Output tokens per second."""
        return sum(len(answer.token_ids) for answer in self.answers) / self.seconds


@dataclass(frozen=True)
class Contestant:
    """A server and how it is asked."""

    server: Server
    max_tokens: int
    temperature: float = 0.0

    def ask(self, prompt: str, seed: int) -> Answer:
        """One answer. Raises RunFailed."""
        shape = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": seed, "stop": STOP}
        (choice,) = complete(self.server, {"prompt": prompt, **shape})
        return Answer(choice["text"], choice["token_ids"])

    def answer_all(self, prompts: Sequence[str], first_seed: int, parallel: int) -> Pass:
        """Answers to all prompts, `parallel` at a time, each under its own seed. Raises RunFailed."""
        before, start = self.server.read_counters(), time.perf_counter()
        with ThreadPoolExecutor(parallel) as pool:
            answers = list(pool.map(self.ask, prompts, range(first_seed, first_seed + len(prompts))))
        return Pass(answers, time.perf_counter() - start, growth(before, self.server.read_counters()))


Passes = dict[str, list[Pass]]


def complete(server: Server, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a completion, each with its `text` and `token_ids`. Raises RunFailed."""
    response = server.send("/v1/completions", {"model": server.model, "return_token_ids": True, **payload})
    choices: list[dict[str, Any]] = response.get("choices") or []
    if not choices or any(not isinstance(choice.get("token_ids"), list) for choice in choices):
        raise RunFailed(f"{server.url} answers without token ids: {one_line(response)}")
    return choices


def take_turns(contestants: dict[str, Contestant], prompts: Sequence[str], num_rounds: int, parallel: int) -> Passes:
    """So many passes of each, and one before them that warms up; every round begins with another server."""
    passes: Passes = {name: [] for name in contestants}
    for number in range(num_rounds + 1):
        first = number % len(contestants)
        for name in [*contestants][first:] + [*contestants][:first]:
            passes[name].append(contestants[name].answer_all(prompts, number * len(prompts), parallel))
    return passes


def describe(
    passes: Passes, differences: Sequence[dict[str, Any]], restyle: Callable[[str], str]
) -> list[dict[str, Any]]:
    """A row per server, the first of which decodes plainly: speeds are medians over the rounds behind the warm-up."""
    plain = next(iter(passes.values()))
    return [
        {
            "server": name,
            **describe_drafts(done),
            "output_tok_s": statistics.median(one.speed for one in done[1:]),
            **spread("over_plain", (a.speed / b.speed for a, b in zip(done[1:], plain[1:], strict=True))),
            "answers": sum(len(one.answers) for one in done),
            "different": sum(found["server"] == name for found in differences),
            "in_style": share_in_style(done, restyle),
        }
        for name, done in passes.items()
    ]


def describe_drafts(passes: Sequence[Pass]) -> dict[str, Any]:
    """Accepted over proposed drafts, and tokens per verify step; None where nothing was drafted."""
    total: Counter[tuple[str, str]] = Counter()
    for one in passes:
        total.update(one.counters)
    found = describe_speculation(dict(total))
    has_drafts = found["acceptance"] is not None
    return {"acceptance": found["acceptance"], "accept_length": found["accept_length"] if has_drafts else None}


def share_in_style(passes: Sequence[Pass], restyle: Callable[[str], str]) -> float:
    """The share of answers that `restyle` leaves as they are."""
    texts = [answer.text for one in passes for answer in one.answers]
    return sum(text == restyle(text) for text in texts) / len(texts)


def find_differences(passes: Passes, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Every answer whose tokens are not those of the first server, and the first token that is not."""
    (_, plain), *others = passes.items()
    return [
        {"server": name, "prompt": prompt, "token": place, "plain": one.text, "other": other.text}
        for name, done in others
        for base, own in zip(plain, done, strict=True)
        for prompt, one, other in zip(prompts, base.answers, own.answers, strict=True)
        if (place := _first_difference(one.token_ids, other.token_ids)) is not None
    ]


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    if one == other:
        return None
    differing = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(one), len(other)))
