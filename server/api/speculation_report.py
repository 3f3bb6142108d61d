"""What an answer tells of its speed and its drafts: vLLM's `metrics`, llama.cpp's `timings`, and `spec`.

All are of one choice: times of several are not anybody's. Times are in milliseconds.
"""

from collections.abc import Iterable
from typing import Any

from server.api.generation import Choice, StepSpec


def report_metrics(choice: Choice, mtp_step: int, is_detailed: bool) -> dict[str, Any]:
    """vLLM's block: times (null before there was a token), and acceptance where the server drafts."""
    clock = choice.clock
    first, decode, queue = clock.first_token_seconds, clock.decode_seconds, clock.queue_seconds
    mean_gap = decode / (clock.num_tokens - 1) if decode is not None and clock.num_tokens > 1 else None
    inference = first + decode - queue if first is not None and decode is not None and queue is not None else 0.0
    return {
        "time_to_first_token_ms": _milliseconds(first),
        "generation_time_ms": _milliseconds(decode),
        "queue_time_ms": _milliseconds(queue),
        "mean_itl_ms": _milliseconds(mean_gap),
        "tokens_per_second": clock.num_tokens / inference if inference > 0 else None,
        "speculative_decoding": _report_acceptance(choice, mtp_step, is_detailed) if mtp_step else None,
    }


def report_timings(choice: Choice, prompt_len: int) -> dict[str, Any]:
    """llama.cpp's block: `prompt_n` tokens of the prompt were computed and not reused."""
    clock = choice.clock
    decode, queue = clock.decode_seconds or 0.0, clock.queue_seconds or 0.0
    return {
        "prompt_n": prompt_len - min(choice.num_cached, prompt_len),
        "prompt_ms": _milliseconds(max(0.0, (clock.first_token_seconds or 0.0) - queue)),
        "predicted_n": choice.num_tokens,
        "predicted_ms": _milliseconds(decode),
        "predicted_per_second": max(0, choice.num_tokens - 1) / decode if decode else 0.0,
        "draft_n": choice.num_proposed,
        "draft_n_accepted": choice.num_accepted,
    }


def report_spec(steps: Iterable[StepSpec]) -> dict[str, Any]:
    """The steps behind a chunk, or behind a whole choice: totals, and one letter per token."""
    steps = list(steps)
    return {
        "accepted": sum(step.accepted for step in steps),
        "proposed": sum(step.proposed for step in steps),
        "origins": "".join(step.origins for step in steps),
    }


def _report_acceptance(choice: Choice, mtp_step: int, is_detailed: bool) -> dict[str, Any]:
    """A step counts if it had drafts; `acceptance_histogram[j]` steps accepted exactly j."""
    proposed = [step[0] for step in choice.drafted_steps]
    accepted = [step[1] for step in choice.drafted_steps]
    arrays = {"per_step_accepted": accepted, "per_step_drafted": proposed} if is_detailed else {}
    return {
        "mean_acceptance_length": 1 + sum(accepted) / max(1, len(accepted)),
        "draft_acceptance_rate": sum(accepted) / max(1, sum(proposed)),
        "acceptance_histogram": [accepted.count(count) for count in range(mtp_step + 1)],
        "num_spec_steps": len(accepted),
        "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": sum(proposed),
        "num_spec_tokens": mtp_step,
        **arrays,
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
