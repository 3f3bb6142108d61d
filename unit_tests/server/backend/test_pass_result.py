"""Results of a pass as the host reads them."""

import time

import torch

from server.backend.lane import Readback
from server.backend.pass_result import PassLogprobs, PassResult, Stopwatch


def test_a_stopwatch_counts_from_its_making_to_its_stop() -> None:
    watch, start = Stopwatch("cpu"), time.perf_counter()
    while time.perf_counter() - start < 0.01:
        pass
    seconds = watch.stop().seconds
    assert 0.01 <= seconds < 5 and watch.seconds == seconds


def test_logprobs_are_cut_to_the_emitted_tokens_and_to_what_each_request_asked_for() -> None:
    values = torch.arange(10, dtype=torch.float32).view(5, 2)
    rows = Readback(-torch.arange(5, dtype=torch.float32), torch.arange(10).view(5, 2), values, torch.arange(5))
    logprobs = PassLogprobs([1, None, 2, 0], [range(2), range(2, 2), range(2, 4), range(4, 5)], rows)
    first, nothing, second, bare = logprobs.read([1, 3, 2, 1])
    assert nothing == [] and [(one.logprob, one.top_ids, one.top_logprobs) for one in first] == [(0, [0], [0])]
    assert [(one.logprob, one.top_ids, one.rank) for one in second] == [(-2, [4, 5], 2), (-3, [6, 7], 3)]
    assert [(one.logprob, one.top_ids) for one in bare] == [(-4, [])]
    assert list(map(len, logprobs.read_all())) == [2, 0, 2, 1]


def test_a_result_without_logprobs_has_an_empty_list_per_request() -> None:
    token_ids, lens, flags = torch.tensor([[5, 6], [7, 8]]), torch.tensor([2, 1]), torch.tensor([True, False])
    outcome = PassResult(Readback(token_ids, lens, lens + 1, flags), None, Stopwatch("cpu").stop()).read()
    assert outcome.token_ids == [[5, 6], [7, 8]] and outcome.accept_lens == [2, 1] and outcome.match_lens == [3, 2]
    assert outcome.logprobs == [[], []] and outcome.prompt_logprobs == []
    assert outcome.is_finite == [True, False] and outcome.seconds >= 0
