"""Triton's paged attention against the law, interpreted. Splits of one KV tile: short contexts make whole trees."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import kernels.gpu.attention as gpu
from kernels.attention import paged_attention_torch

HKV, D = 2, 32


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def make_cache(lengths: Sequence[int], page_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Requests of these lengths in shuffled pages. Nothing else in the cache is a number; spare table entries are 0."""
    counts = [-(-length // page_size) for length in lengths]
    order = (1 + torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))).split(counts)
    kv = torch.full((2, 1 + sum(counts), page_size, HKV, D), torch.nan)
    table = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int64)
    for request, (length, pages) in enumerate(zip(lengths, order, strict=True)):
        table[request, : len(pages)] = pages
        tokens = torch.arange(length)
        kv[:, pages[tokens // page_size], tokens % page_size] = draw(2, length, HKV, D, seed=seed + length)
    return kv, table


def make_gate(num_tokens: int, num_heads: int) -> Tensor:
    """The second half of each head's columns, as the layer's projection gives it."""
    return draw(num_tokens, num_heads, 2 * D, seed=9)[..., D:]


def make_scratch(q: Tensor, kv: Tensor, table: Tensor) -> gpu.SplitScratch:
    """Partials that are not numbers."""
    batch, max_len = len(table), table.shape[1] * kv.shape[2]
    scratch = gpu.SplitScratch.allocate(batch, q.shape[1], HKV, D, max_len, len(q) // batch, q.device)
    scratch.acc.fill_(torch.nan)
    scratch.stats.fill_(torch.nan)
    return scratch


def verify(q: Tensor, kv: Tensor, table: Tensor, starts: Tensor, gate: Tensor | None = None) -> Tensor:
    scratch = make_scratch(q, kv, table)
    out = gpu.verify_attention(q, kv, table, starts, gate, scratch)
    assert out.is_contiguous() and not scratch.counters.any()
    return out


def expected(q: Tensor, kv: Tensor, table: Tensor, starts: Tensor, gate: Tensor | None = None) -> Tensor:
    query_len = len(q) // len(table)
    out = paged_attention_torch(q, kv.nan_to_num(), table, starts[:, None] + torch.arange(query_len))
    return out if gate is None else out * gate.sigmoid()


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SPLIT", 32)


@pytest.mark.parametrize(
    ("group", "query_len", "page_size", "gated"),
    [(4, 1, 16, True), (6, 3, 5, True), (8, 2, 16, False), (16, 4, 5, True)],
)
def test_verify_equals_the_law(group: int, query_len: int, page_size: int, gated: bool) -> None:
    lengths = (5, 70, 300)
    kv, table = make_cache(lengths, page_size)
    q = draw(3 * query_len, HKV * group, D, seed=1)
    gate, starts = make_gate(*q.shape[:2]) if gated else None, torch.tensor(lengths) - query_len
    torch.testing.assert_close(verify(q, kv, table, starts, gate), expected(q, kv, table, starts, gate))


def test_many_tokens_take_several_row_tiles() -> None:
    lengths = (9, 45)
    kv, table = make_cache(lengths, 16)
    q, starts = draw(18, HKV * 8, D, seed=1), torch.tensor(lengths) - 9
    gate = make_gate(*q.shape[:2])
    torch.testing.assert_close(verify(q, kv, table, starts, gate), expected(q, kv, table, starts, gate))


@pytest.mark.parametrize("fan", [2, 4])
def test_deep_trees_equal_the_law(fan: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_FAN", fan)
    lengths = (301, 33, 129)
    kv, table = make_cache(lengths, 16)
    q, starts = draw(6, HKV * 4, D, seed=1), torch.tensor(lengths) - 2
    torch.testing.assert_close(verify(q, kv, table, starts), expected(q, kv, table, starts))


@pytest.mark.parametrize("start", [29, 61, 126])
def test_a_token_gets_the_same_bits_alone_and_with_others(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of four tokens reach into a split, and a level of the tree, that the first ones do not have."""
    monkeypatch.setattr(gpu, "_FAN", 2)
    kv, table = make_cache((start + 4, 7), 16)
    q, starts = draw(8, HKV * 6, D, seed=1), torch.tensor([start, 3])
    gate = make_gate(*q.shape[:2])
    together = verify(q, kv, table, starts, gate)
    for token in range(4):
        alone = verify(q[token : token + 1], kv, table[:1], starts[:1] + token, gate[token : token + 1])
        assert torch.equal(alone[0], together[token])


def test_the_number_of_programs_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (200, 31, 65)
    kv, table = make_cache(lengths, 16)
    q, starts = draw(3, HKV * 4, D, seed=1), torch.tensor(lengths) - 1
    results = []
    for num_programs in (1, 12, 512):
        monkeypatch.setattr(gpu, "_PROGRAMS", num_programs)
        results.append(verify(q, kv, table, starts))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_padding_requests_leave_the_others_alone() -> None:
    kv, table = make_cache((70,), 16)
    q, starts = draw(6, HKV * 4, D, seed=1), torch.tensor([68, 0, 0])
    padded = torch.cat([table, torch.zeros(2, table.shape[1], dtype=torch.int64)])
    assert torch.equal(verify(q, kv, padded, starts)[:2], verify(q[:2], kv, table, starts[:1]))


def test_a_larger_scratch_serves_smaller_launches_one_after_the_other() -> None:
    kv, table = make_cache((100, 40), 16)
    scratch = gpu.SplitScratch.allocate(5, HKV * 4, HKV, D, 1000, 3, "cpu")
    scratch.acc.fill_(torch.nan)
    for query_len in (2, 3, 1):
        q, starts = draw(2 * query_len, HKV * 4, D, seed=query_len), torch.tensor([100, 40]) - query_len
        out = gpu.verify_attention(q, kv, table, starts, None, scratch)
        torch.testing.assert_close(out, expected(q, kv, table, starts))


def test_a_scratch_that_is_too_small_is_refused() -> None:
    kv, table = make_cache((70,), 16)
    scratch = gpu.SplitScratch.allocate(1, HKV * 4, HKV, D, 32, 1, "cpu")
    with pytest.raises(ValueError, match="scratch holds"):
        gpu.verify_attention(draw(1, HKV * 4, D, seed=1), kv, table, torch.tensor([69]), None, scratch)


@pytest.mark.parametrize(("group", "page_size", "gated"), [(4, 16, True), (6, 5, True), (16, 16, False)])
def test_prefill_equals_the_law(group: int, page_size: int, gated: bool) -> None:
    """Whole prompts, a chunk behind a context, a request without tokens, a single token."""
    contexts, query_lens = (0, 41, 6, 12), (23, 17, 0, 1)
    kv, table = make_cache([sum(pair) for pair in zip(contexts, query_lens, strict=True)], page_size)
    starts, query_starts = torch.tensor(contexts), torch.tensor((0, *query_lens)).cumsum(0)
    q = draw(sum(query_lens), HKV * group, D, seed=1)
    gate = make_gate(*q.shape[:2]) if gated else None
    out = gpu.prefill_attention(q, kv, table, starts, query_starts, max(query_lens) + 3, gate)
    assert out.is_contiguous()
    for request, (begin, end) in enumerate(pairwise(query_starts.tolist())):
        if begin < end:
            own = None if gate is None else gate[begin:end]
            one = slice(request, request + 1)
            law = expected(q[begin:end], kv, table[one], starts[one], own)
            torch.testing.assert_close(out[begin:end], law)


def test_no_requests_are_no_launch() -> None:
    kv, table, starts = torch.empty(2, 3, 16, HKV, D), torch.empty(0, 4, dtype=torch.int64), torch.empty(0).long()
    q, scratch = torch.empty(0, HKV * 4, D), gpu.SplitScratch.allocate(0, HKV * 4, HKV, D, 64, 1, "cpu")
    assert gpu.verify_attention(q, kv, table, starts, q, scratch).shape == q.shape
    assert gpu.prefill_attention(q, kv, table, starts, torch.zeros(1).long(), 0, q).shape == q.shape
