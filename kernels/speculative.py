"""How much of a verify step counts. B requests, K drafts, T = K + 1 rows."""

import torch
from torch import Tensor


def count_accepted(token_ids: Tensor, draft_ids: Tensor) -> Tensor:
    """Tokens that a verify step emits [B] int64, 1..T: the drafts that equal the target's own token, plus one.

    token_ids [B, T]: the target's token after each row; draft_ids [B, K]: the guess that the next row was run on. Since
    every emitted token is the target's own draw at a correct prefix, the law of the output is the target's.
    """
    matches = (token_ids[:, :-1] == draft_ids).long()
    return 1 + matches.cumprod(dim=1).sum(dim=1)


def roll_next_ids(token_ids: Tensor, last: Tensor, newest: Tensor) -> Tensor:
    """token_ids [N] shifted left by one, with newest [B] at the flat indices last [B]; other requests' edges are junk
    rows that nothing reads."""
    rolled = torch.roll(token_ids, -1)
    rolled[last] = newest
    return rolled
