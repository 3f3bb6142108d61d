"""The masks of a mixed pass: whose rows are masked, and how drafts are followed."""

import threading
from typing import Any

import pytest
import torch

from server.backend.output_matcher import OutputMatcher
from server.backend.pass_masks import DraftMasks, RowMasks, mask_rows
from server.backend.sampler import Sampled
from server.backend.token_masks import TokenMasks
from server.request import Batch, Request
from unit_tests.server.backend.tables import VOCAB_SIZE, make_request, prefill_work, verify_work

EVERYTHING = set(range(VOCAB_SIZE))
# Behind the tokens of a verify of the requests below.
VERIFIED = [
    *(EVERYTHING - {5, 8}, EVERYTHING - {5}, EVERYTHING - {5, 8}),
    *(EVERYTHING, EVERYTHING),
    *(EVERYTHING - {6}, EVERYTHING),
]


def make_masked(row: int, output: list[int], **sampling: Any) -> Request:
    """A request with a matcher that bans words."""
    request = make_request(row, [1, 2], output, **sampling)
    request.matcher = OutputMatcher(request.sampling, None, (0,), VOCAB_SIZE)
    return request


def allowed(masked: torch.Tensor) -> list[set[int]]:
    """What each row of masked logits leaves."""
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in masked]


def make_sampled(token_ids: list[list[int]], accept_lens: list[int]) -> Sampled:
    ids, lens = torch.tensor(token_ids), torch.tensor(accept_lens)
    return Sampled(ids, lens, lens, ids.flatten(), torch.zeros(1, VOCAB_SIZE), lens > 0, [ids.shape[1]] * len(ids))


@pytest.fixture
def requests() -> list[Request]:
    """One that is masked, one that is not, one more with another rule."""
    words = ((5,), (7, 8), (8, 9))
    return [make_masked(1, [7], bad_words=words), make_request(2, [3], [4]), make_masked(3, [6], bad_words=((6, 6),))]


def test_the_rows_of_a_verify_are_masked_by_their_requests_and_places(requests: list[Request]) -> None:
    batch = Batch([verify_work(request, width) for request, width in zip(requests, (3, 2, 2), strict=True)], True)
    masks = mask_rows(batch, [7, 9, 7, 4, 5, 6, 11], VOCAB_SIZE, "cpu")
    assert allowed(masks.apply(torch.zeros(7, VOCAB_SIZE))) == VERIFIED
    masks = mask_rows(batch, [7, 9, 7, 4, 5, 6, 6], VOCAB_SIZE, "cpu")
    assert masks.counts == [3, 2, 1], "the last one's second row lies behind a draft that may not come"


@pytest.mark.parametrize("place", ["thread", "caller: the thread is busy", "caller: no thread"])
def test_masks_are_the_same_wherever_they_are_made(requests: list[Request], place: str) -> None:
    rows, is_over = RowMasks(VOCAB_SIZE, "meta" if place == "caller: no thread" else "cpu"), threading.Event()
    if place == "caller: the thread is busy":
        assert rows._lane is not None
        rows._lane.submit(is_over.wait)
    batch = Batch([verify_work(request, width) for request, width in zip(requests, (3, 2, 2), strict=True)], True)
    unmasked, window = Batch([prefill_work(make_request(4, [1, 2]), 2)], False), torch.tensor([7, 9, 7, 4, 5, 6, 11])
    nothing, masks = rows.start([unmasked, batch], [window[:2], window])()
    assert nothing is None and masks is not None
    assert allowed(torch.zeros(7, VOCAB_SIZE).where(unpack(masks), -torch.inf)) == VERIFIED
    assert rows.start([unmasked], [window[:2]])() == [None]
    is_over.set()


def unpack(masks: TokenMasks) -> torch.Tensor:
    """[N, V]: what is allowed."""
    return torch.tensor([[masks.allows(row, token) for token in range(VOCAB_SIZE)] for row in range(len(masks.packed))])


def test_a_prefill_masks_the_tokens_behind_whole_prompts(requests: list[Request]) -> None:
    works = [prefill_work(requests[0], 3), prefill_work(requests[1], 2), prefill_work(requests[2], 1)]
    assert [work.ends_prompt for work in works] == [True, True, False]
    masks = mask_rows(Batch(works, False), [1, 2, 7, 3, 4, 1], VOCAB_SIZE, "cpu")
    assert allowed(masks.apply(torch.zeros(3, VOCAB_SIZE))) == [EVERYTHING - {5, 8}, EVERYTHING, EVERYTHING]


def test_drafts_are_masked_behind_what_was_emitted_and_each_other(requests: list[Request]) -> None:
    batch = Batch([verify_work(request, 2) for request in requests], True)
    masks = DraftMasks(batch, make_sampled([[1, 7], [1, 1], [6, 0]], [2, 1, 1]))
    works, logits = batch.works[::-1], torch.zeros(3, VOCAB_SIZE)
    assert allowed(masks.apply(logits, works)) == [EVERYTHING - {6}, EVERYTHING, EVERYTHING - {5, 8}]
    masks.push(torch.tensor([3, 3, 8]), works)
    assert allowed(masks.apply(logits[:2], works[:2])) == [EVERYTHING, EVERYTHING]
    assert allowed(masks.apply(logits[:1], batch.works[:1])) == [EVERYTHING - {5, 9}]


def test_where_nobody_is_masked_logits_pass_as_they_are(requests: list[Request]) -> None:
    batch = Batch([verify_work(request, 1) for request in requests], True)
    masks = DraftMasks(batch, make_sampled([[1], [1], [1]], [0, 1, 0]))  # those inside a prompt have emitted nothing
    logits = torch.zeros(3, VOCAB_SIZE)
    assert masks.apply(logits, batch.works) is logits
    masks.push(torch.tensor([1, 1, 1]), batch.works)
