"""What rounds amount to: latencies in milliseconds, tokens per second, goodput, acceptance, and failures by reason.

TTFT is the time from sending to the first token, E2E that to the last one, TPOT their difference per token after the
first. ITL is the time between two events with tokens: per event as it is, per token divided by the tokens that came
after it. Percentiles are values that occurred (nearest rank). Failed requests count as nothing but failures.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.openai_server import Counters, count_foreign_tokens, describe_speculation
from benchmarks.report import percentile
from benchmarks.serving.answer import EVENTS, Answer
from benchmarks.serving.load import Round

LATENCIES = ("ttft_ms", "tpot_ms", "itl_token_ms", "itl_event_ms", "e2e_ms")
GOALS = ("ttft", "tpot", "e2e")


def summarize(rounds: Sequence[Round], goals: Mapping[str, float]) -> dict[str, Any]:
    """All figures of one server under one load; None stands for not known. `goals` are the most milliseconds of
    requests that count for goodput."""
    answers = [answer for one in rounds for answer in one.answers]
    good = [answer for answer in answers if not answer.failure]
    seconds = sum(one.seconds for one in rounds)
    counters = _add(one.counters for one in rounds)
    num_output, num_cut = sum(answer.num_tokens for answer in good), sum(one.num_cut for one in rounds)
    num_input = _sum_known([answer.prompt_tokens for answer in good])
    is_whole = len(good) == len(answers) and not num_cut
    return {
        "requests": len(good),
        "failed": len(answers) - len(good),
        "failures": describe_failures(answers),
        "cut": num_cut,
        "seconds": seconds,
        "input_tokens": num_input,
        "cached_tokens": _sum_known([answer.cached_tokens for answer in good]),
        "output_tokens": num_output,
        "requests_s": len(good) / seconds,
        "output_tok_s": num_output / seconds,
        "total_tok_s": None if num_input is None else (num_input + num_output) / seconds,
        "goodput_requests_s": sum(meets(answer, goals) for answer in good) / seconds if goals else None,
        **describe_latencies(good),
        **describe_speculation(counters),
        "tokens_per_event": _mean([arrival.num_tokens for answer in good for arrival in answer.arrivals]),
        "tokens_counted_by": _kinds(answer.counting for answer in good),
        "event_tokens_counted_by": _kinds(answer.event_counting for answer in good),
        "tokens_of_others": count_foreign_tokens(counters, num_output) if is_whole else None,
        "client_cpu": sum(one.client_cpu_seconds for one in rounds) / seconds,
    }


def describe_latencies(answers: Sequence[Answer]) -> dict[str, dict[str, float] | None]:
    """Mean and percentiles of each latency. ITL per token is None where nobody says how many came in an event."""
    gaps = [gap for answer in answers for gap in answer.gaps]
    is_known = all(answer.event_counting != EVENTS for answer in answers)
    tpots = [answer.tpot for answer in answers]
    values = {
        "ttft_ms": [answer.ttft for answer in answers],
        "tpot_ms": [tpot for tpot in tpots if tpot is not None],
        "itl_token_ms": [seconds / count for seconds, count in gaps for _ in range(count)] if is_known else [],
        "itl_event_ms": [seconds for seconds, _ in gaps],
        "e2e_ms": [answer.e2e for answer in answers],
    }
    return {name: _distribution(values[name]) for name in LATENCIES}


def describe_failures(answers: Iterable[Answer]) -> dict[str, dict[str, Any]]:
    """How many requests failed, by reason, the most frequent first, each with what was seen the first time."""
    failed = [answer for answer in answers if answer.failure]
    examples = {answer.failure: answer.detail for answer in reversed(failed)}
    counts = Counter(answer.failure for answer in failed)
    return {reason: {"count": count, "example": examples[reason]} for reason, count in counts.most_common()}


def meets(answer: Answer, goals: Mapping[str, float]) -> bool:
    """Whether no latency of the answer is above its goal; one token alone has no TPOT that could be."""
    seconds = {"ttft": answer.ttft, "tpot": answer.tpot or 0.0, "e2e": answer.e2e}
    return all(1e3 * seconds[name] <= limit for name, limit in goals.items())


def _distribution(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    values = [1e3 * value for value in seconds]
    shares = {f"p{percent}": percentile(values, percent) for percent in (50, 90, 99)}
    return {"mean": statistics.fmean(values), **shares}


def _add(parts: Iterable[Counters]) -> Counters:
    total: Counter[tuple[str, str]] = Counter()
    for part in parts:
        for key, value in part.items():
            total[key] += value  # type: ignore[assignment]
    return dict(total)


def _sum_known(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _kinds(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))
