"""Answers and rounds with the times that a test gives."""

from benchmarks.openai_server import Counters
from benchmarks.serving.answer import Answer, Event
from benchmarks.serving.load import Round


def answered(
    *arrivals: tuple[float, int], index: int = 0, turn: int = 0, text: str = "", prompt: int | None = 10
) -> Answer:
    """An answer sent at second 0 with so many tokens at these seconds, as continuous usage tells them."""
    num_so_far, events = 0, []
    for seconds, count in arrivals:
        num_so_far += count
        events.append(Event(seconds, True, 0, num_so_far))
    counts = {"prompt_tokens": prompt, "cached_tokens": prompt and 4, "completion_tokens": num_so_far}
    return Answer(index, turn, 0.0, text=text, finish_reason="stop", events=events, **counts)


def failed(reason: str, detail: str, index: int = 0) -> Answer:
    return Answer(index, 0, 0.0, failure=reason, detail=detail)


def round_of(*answers: Answer, seconds: float = 1.0, num_cut: int = 0, counters: Counters | None = None) -> Round:
    return Round(list(answers), len(answers) + num_cut, seconds, 0.25 * seconds, counters or {})


def speculation(steps: int, proposed: int, accepted: list[int], tokens: int) -> Counters:
    """By how much vLLM's counters grow."""
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    return {
        ("vllm:spec_decode_num_drafts_total", ""): steps,
        ("vllm:spec_decode_num_draft_tokens_total", ""): proposed,
        ("vllm:spec_decode_num_accepted_tokens_total", ""): sum(accepted),
        ("vllm:generation_tokens_total", ""): tokens,
        **{(name, str(position)): count for position, count in enumerate(accepted)},
    }
