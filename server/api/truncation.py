"""Prompts that are to be cut to a length. Every mistake is an InvalidRequest. Knows token ids, never text."""

from dataclasses import dataclass

from server.api.fields import Fields, shown
from server.errors import InvalidRequest

TRUNCATION_FIELDS = ("truncate_prompt_tokens", "truncation_side")
_OUTPUT_FIELDS = ("max_completion_tokens", "max_tokens")
_SIDES = ("left", "right")


@dataclass(frozen=True)
class Truncation:
    """Of a longer prompt the last `max_len` tokens stay, or the first ones with `keeps_start`."""

    max_len: int
    keeps_start: bool

    def cut(self, token_ids: list[int]) -> list[int]:
        """The prompt that stays."""
        return token_ids[: self.max_len] if self.keeps_start else token_ids[-self.max_len :]


def read_truncation(fields: Fields, max_model_len: int, least_output: int = 1) -> Truncation | None:
    """What `truncate_prompt_tokens` and `truncation_side` ask for; None: nothing. -1 leaves room for the output that
    the request asks for, and there is always room for `least_output` tokens."""
    max_len = fields.integer("truncate_prompt_tokens", None, -1, max_model_len)
    side = fields.text("truncation_side", "left")
    if side not in _SIDES:
        raise InvalidRequest(f"truncation_side is {shown(side)}, it must be left or right", "truncation_side")
    if max_len is None:
        return None
    if max_len == 0:
        raise InvalidRequest(
            f"truncate_prompt_tokens is 0, it must be -1 or in 1..{max_model_len}", "truncate_prompt_tokens"
        )
    if max_len == -1:
        wanted = [count for name in _OUTPUT_FIELDS if (count := fields.integer(name, None)) is not None]
        max_len = max(1, max_model_len - max([least_output, *wanted[:1]]))
    return Truncation(min(max_len, max_model_len - least_output), keeps_start=side == "right")
