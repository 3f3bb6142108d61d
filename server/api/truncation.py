"""Prompts that are to be cut to a length. Every mistake is an InvalidRequest. Knows token ids, never text."""

from dataclasses import dataclass

from server.api.fields import Fields, shown
from server.errors import InvalidRequest

TRUNCATION_FIELDS = ("truncate_prompt_tokens", "truncation_side")
_SIDES = ("left", "right")


@dataclass(frozen=True)
class Truncation:
    """Of a longer prompt the last `max_len` tokens stay, or the first ones with `keeps_start`."""

    max_len: int
    keeps_start: bool

    def cut(self, token_ids: list[int]) -> list[int]:
        """The prompt that stays."""
        return token_ids[: self.max_len] if self.keeps_start else token_ids[-self.max_len :]


def read_truncation(fields: Fields, max_model_len: int, num_output: int = 1) -> Truncation | None:
    """What `truncate_prompt_tokens` and `truncation_side` ask for; None: nothing. -1 leaves room for the `num_output`
    tokens that the request asks for, and there is always room for one of them."""
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
        max_len = max(1, max_model_len - num_output)
    return Truncation(min(max_len, max_model_len - min(1, num_output)), keeps_start=side == "right")
