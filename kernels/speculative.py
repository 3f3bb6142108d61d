"""How much of a verify step counts. B requests, K drafts, T <= K + 1 rows of a request, N rows of all of them."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cpu.library import load_library


class Accepted(NamedTuple):
    """token_ids [B, T] (the widest T; what stands behind a request's own rows means nothing), of which match_lens [B]
    would be emitted and accept_lens [B], at least 1, are."""

    token_ids: Tensor
    match_lens: Tensor
    accept_lens: Tensor


def accept(token_ids: Tensor, window: Tensor, widths: Sequence[int], stop_ids: Tensor, room: Tensor) -> Accepted:
    """What a verify step emits. All int64.

    token_ids [N]: the target's token after each row; window [N]: the tokens that the rows were run on, widths[i] of
    request i, of which all but the first are drafts. Drafts count up to the first that is not the target's own token;
    one token more is the target's. Since every emitted token is the target's own draw at a correct prefix, the law of
    the output is the target's. A request emits no more than room [B] tokens and none behind one of its stop_ids [B, S].
    """
    if token_ids.device.type == "cpu":
        library = load_library()
        if library is not None:
            return _accept_cpp(library.accept_int64, token_ids, window, widths, stop_ids, room)
    return accept_torch(token_ids, window, widths, stop_ids, room)


def accept_torch(token_ids: Tensor, window: Tensor, widths: Sequence[int], stop_ids: Tensor, room: Tensor) -> Accepted:
    """The law: see `accept`."""
    device, widest = token_ids.device, max(widths)
    starts = accumulate(widths[:-1], initial=0)
    # The grid's free places repeat a request's last row, with a draft that nothing equals.
    grid = [[start + min(t, width - 1) for t in range(widest)] for start, width in zip(starts, widths, strict=True)]
    rows = torch.tensor(grid, device=device)
    is_free = torch.arange(1, widest, device=device) >= torch.tensor(widths, device=device)[:, None]
    by_request, drafts = token_ids[rows], window[rows[:, 1:]].masked_fill(is_free, -1)
    matches = (by_request[:, :-1] == drafts).long()
    match_lens = 1 + matches.cumprod(dim=1).sum(dim=1)
    is_stop = (by_request[:, :, None] == stop_ids[:, None]).any(-1).long()
    num_stops_before = is_stop.cumsum(1) - is_stop
    first_stop = (num_stops_before == 0).sum(1)  # tokens up to the first stop id, inclusive
    accept_lens = torch.minimum(torch.minimum(match_lens, first_stop), room).clamp(min=1)
    return Accepted(by_request, match_lens, accept_lens)


def roll_next_ids(token_ids: Tensor, last: Tensor, newest: Tensor) -> Tensor:
    """token_ids [N] shifted left by one, with newest [B] at the flat indices last [B]; other requests' edges are junk
    rows that nothing reads."""
    rolled = torch.roll(token_ids, -1)
    rolled[last] = newest
    return rolled


def _accept_cpp(
    function: Callable[..., None],
    token_ids: Tensor,
    window: Tensor,
    widths: Sequence[int],
    stop_ids: Tensor,
    room: Tensor,
) -> Accepted:
    by_request = torch.empty(len(widths), max(widths), dtype=torch.int64)
    lens = torch.empty(2, len(widths), dtype=torch.int64)
    inputs = [x.contiguous() for x in (token_ids, window, torch.tensor(widths), stop_ids, room)]
    addresses = [x.data_ptr() for x in (*inputs, by_request, lens)]
    function(*addresses, len(widths), max(widths), stop_ids.shape[1])
    return Accepted(by_request, lens[0], lens[1])
