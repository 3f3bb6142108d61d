"""The masks of one pass: for the target's rows, and for the drafts that follow, step by step.

The host walks each matcher over the drafts of a verify step, as far as they may come. Behind a draft that may not come
nothing matters, because the target cannot give it; behind one that cannot be followed nothing is emitted.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

from torch import Tensor

from server.backend.lane import Lane, Readback
from server.backend.output_matcher import OutputMatcher
from server.backend.sampler import Sampled
from server.backend.token_masks import TokenMasks
from server.request import Batch, Work


class RowMasks:
    """Masks of the rows that tokens are drawn from, made while the target runs: by a thread beside a CPU's, for a GPU,
    which has its work by then, when they are asked for. One step at a time."""

    def __init__(self, vocab_size: int, device: str):
        self._vocab_size, self._device = vocab_size, device
        self._lane = Lane(is_threaded=True) if device == "cpu" else None

    def start(self, batches: Sequence[Batch], windows: Sequence[Tensor]) -> Callable[[], "list[TokenMasks | None]"]:
        """What gives the masks of each pass, which runs on the tokens window [N]; None where nobody is masked. Until
        then nobody may touch matchers."""
        if not any(batch.has_matchers for batch in batches):
            return lambda: [None] * len(batches)
        make = partial(self._make, batches, Readback(*windows))
        if self._lane is None:
            return make
        made = self._lane.submit(make)
        return lambda: make() if made.cancel() else made.result()  # a thread without a core has not begun

    def _make(self, batches: Sequence[Batch], windows: Readback) -> "list[TokenMasks | None]":
        return [
            mask_rows(batch, window, self._vocab_size, self._device) if batch.has_matchers else None
            for batch, window in zip(batches, windows.read(), strict=True)
        ]


def mask_rows(batch: Batch, window: Sequence[int], vocab_size: int, device: str) -> TokenMasks:
    """For all rows of a verify, which runs on window [N], else for one row per request."""
    widths = [work.num_tokens if batch.is_verify else 1 for work in batch.works]
    masks = TokenMasks(sum(widths), vocab_size, device)
    masks.counts = counts = list(widths)
    for index, (work, width, end) in enumerate(zip(batch.works, widths, accumulate(widths), strict=True)):
        matcher = work.request.matcher
        if matcher is not None and work.ends_prompt:
            drafts = window[end - width + 1 : end] if batch.is_verify else ()
            counts[index] = matcher.fill_ahead(masks, end - width, work.request.output_ids, drafts)
    return masks


class DraftMasks:
    """Follows the matchers of a pass while drafts are proposed behind what it has emitted, so that no draft is one
    which the next step cannot accept."""

    def __init__(self, batch: Batch, sampled: Sampled):
        self._matchers: dict[str, OutputMatcher] = {}  # of the requests whose output goes on
        token_ids, accept_lens = Readback(sampled.token_ids, sampled.accept_lens).read()
        for work, row, count in zip(batch.works, token_ids, accept_lens, strict=True):
            request = work.request
            if request.matcher is not None and count and request.matcher.go_to(request.output_ids, row[:count]):
                self._matchers[request.id] = request.matcher

    def apply(self, logits: Tensor, works: Sequence[Work]) -> Tensor:
        """logits [b, V] of the next draft of each work, masked."""
        matchers = [self._matchers.get(work.request.id) for work in works]
        if not any(matchers):
            return logits
        masks = TokenMasks.for_logits(logits)
        for row, matcher in enumerate(matchers):
            if matcher is not None:
                matcher.fill(masks, row)
        return masks.apply(logits)

    def push(self, drafts: Tensor, works: Sequence[Work]) -> None:
        """Go on behind these drafts [b]; where one ends the output nothing is followed any more."""
        if not any(work.request.id in self._matchers for work in works):
            return
        (token_ids,) = Readback(drafts).read()
        for work, token_id in zip(works, token_ids, strict=True):
            matcher = self._matchers.get(work.request.id)
            if matcher is not None and not matcher.push(token_id):
                del self._matchers[work.request.id]
