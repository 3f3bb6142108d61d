"""Whether the model thinks before it answers, and what becomes of its thoughts: the fields for it.

Every mistake is an InvalidRequest. Knows neither the chat template nor the parser that tells thoughts apart.
"""

from dataclasses import dataclass

from server.api.fields import Fields, shown
from server.errors import InvalidRequest

THINKING_FIELDS = ("reasoning_effort", "enable_thinking", "include_reasoning", "separate_reasoning")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
END_OF_THINKING = "</think>"


@dataclass(frozen=True)
class Reasoning:
    """What an answer does with its reasoning: `is_included` in the answer, and `is_separate` from the content."""

    is_included: bool = True
    is_separate: bool = True


def read_reasoning(fields: Fields) -> Reasoning:
    """What the answer does with its reasoning. Raises InvalidRequest."""
    return Reasoning(fields.boolean("include_reasoning", True), fields.boolean("separate_reasoning", True))


def read_thinking(fields: Fields) -> bool | None:
    """Whether the request asks for thinking; None leaves it to the chat template. Raises InvalidRequest."""
    effort = fields.text("reasoning_effort", "") if fields.has("reasoning_effort") else None
    if effort is not None and effort not in EFFORTS:
        raise InvalidRequest(
            f"reasoning_effort is {shown(effort)}, it must be one of {', '.join(EFFORTS)}", "reasoning_effort"
        )
    by_effort = None if effort is None else effort != "none"
    return fields.boolean("enable_thinking", True) if fields.has("enable_thinking") else by_effort
