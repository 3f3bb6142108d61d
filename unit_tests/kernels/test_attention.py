"""Paged and whole-sequence attention against one softmax per token and head."""

import pytest
import torch

from kernels.attention import causal_attention, paged_attention, paged_attention_torch, store_kv

HQ, HKV, D, PAGE_SIZE, NUM_PAGES = 6, 2, 5, 4, 40


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(q, k, v):
    """One request [T, heads, D] from its first token."""
    out = torch.full_like(q, torch.nan)
    for t in range(len(q)):
        for head in range(HQ):
            kv_head = head // (HQ // HKV)
            scores = torch.stack([q[t, head] @ k[j, kv_head] for j in range(t + 1)]) / D**0.5
            weights = scores.exp() / scores.exp().sum()
            out[t, head] = sum(weights[j] * v[j, kv_head] for j in range(t + 1))
    return out


def make_cache(lengths):
    """Requests already in a cache with shuffled pages; stale values elsewhere, page 0 not a number."""
    kv = torch.full((2, NUM_PAGES, PAGE_SIZE, HKV, D), 1e4, dtype=torch.float64)
    kv[:, 0] = torch.nan
    order = 1 + torch.randperm(NUM_PAGES - 1, generator=torch.Generator().manual_seed(1))
    table = order[: len(lengths) * 6].view(len(lengths), 6)
    return kv, table


def slots_of(table, request, positions):
    return torch.tensor([int(table[request, p // PAGE_SIZE]) * PAGE_SIZE + p % PAGE_SIZE for p in positions])


@pytest.mark.parametrize("length", [1, 2, 9])
def test_whole_sequences_equal_the_formula(length):
    q, k, v = draw(2, length, HQ, D), draw(2, length, HKV, D, seed=1), draw(2, length, HKV, D, seed=2)
    expected = torch.stack([naive(q[i], k[i], v[i]) for i in range(2)])
    torch.testing.assert_close(causal_attention(q, k, v), expected)


@pytest.mark.parametrize("num_queries", [1, 2, 3, 7])
@pytest.mark.parametrize("attend", [paged_attention, paged_attention_torch])
def test_paged_attention_equals_the_formula(num_queries, attend):
    """The last tokens of three requests of different lengths, by the kernel and by the law."""
    lengths = (7, 21, 13)
    q = [draw(length, HQ, D, seed=length) for length in lengths]
    k = [draw(length, HKV, D, seed=length + 1) for length in lengths]
    v = [draw(length, HKV, D, seed=length + 2) for length in lengths]
    kv, table = make_cache(lengths)
    for request, length in enumerate(lengths):
        store_kv(k[request], v[request], kv, slots_of(table, request, range(length)))
    positions = torch.stack([torch.arange(end - num_queries, end) for end in lengths])
    queries = torch.cat([part[-num_queries:] for part in q])
    expected = torch.cat([naive(q[i], k[i], v[i])[-num_queries:] for i in range(3)])
    torch.testing.assert_close(attend(queries, kv, table, positions), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_attends_alike_in_any_company(dtype):
    """Bit for bit: alone, and among other tokens and requests."""
    lengths = (7, 21, 13)
    kv, table = make_cache(lengths)
    kv = torch.randn(kv.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    positions = torch.stack([torch.arange(end - 3, end) for end in lengths])
    q = torch.randn(9, HQ, D, generator=torch.Generator().manual_seed(6)).to(dtype)
    together = paged_attention(q, kv, table, positions)
    law = paged_attention_torch(q, kv, table, positions)
    torch.testing.assert_close(together, law, rtol=2e-2, atol=2e-2)
    for i in range(9):
        alone = paged_attention(q[i : i + 1], kv, table[i // 3 : i // 3 + 1], positions[i // 3, i % 3].view(1, 1))
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize(("group", "dim"), [(1, 64), (2, 24), (3, 100), (5, 16), (8, 256)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_number_of_query_heads_and_columns_equals_the_law_and_has_the_same_bits_alone(group, dim, dtype):
    """Whole vectors and what is left of a row; blocks of four heads and of fewer; pages that end inside."""
    generator = torch.Generator().manual_seed(group)
    kv = torch.randn(2, 30, PAGE_SIZE, 2, dim, generator=generator, dtype=torch.float64).to(dtype)
    q = torch.randn(2 * 7, 2 * group, dim, generator=generator, dtype=torch.float64).to(dtype)
    table = torch.randperm(30, generator=generator).view(2, 15)
    positions = torch.stack([torch.arange(end - 7, end) for end in (9, 58)])
    out = paged_attention(q, kv, table, positions)
    law = paged_attention_torch(q.double(), kv.double(), table, positions)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out.double(), law, rtol=tolerance, atol=tolerance)
    for i in range(14):
        alone = paged_attention(q[i : i + 1], kv, table[i // 7 : i // 7 + 1], positions[i // 7, i % 7].view(1, 1))
        assert torch.equal(alone[0], out[i])


def test_later_positions_are_not_seen():
    """Slots of rejected tokens lie after the query's position and change nothing."""
    kv, table = make_cache([12])
    k, v, q = draw(12, HKV, D, seed=1), draw(12, HKV, D, seed=2), draw(1, HQ, D)
    store_kv(k, v, kv, slots_of(table, 0, range(12)))
    where = torch.tensor([[6]])
    before = paged_attention(q, kv, table, where)
    store_kv(1e3 * k[7:], 1e3 * v[7:], kv, slots_of(table, 0, range(7, 12)))
    assert torch.equal(paged_attention(q, kv, table, where), before)


@pytest.mark.parametrize("attend", [paged_attention, paged_attention_torch])
def test_a_slot_that_a_longer_request_reads_and_a_shorter_one_has_not_written_may_hold_anything(attend):
    kv, table = torch.randn(2, 6, 4, 2, 8), torch.tensor([[1, 2, 3], [4, 5, 0]])
    positions, q = torch.tensor([[8, 9], [2, 3]]), torch.randn(4, 4, 8)
    expected = attend(q, kv, table, positions)
    kv[:, 5] = torch.nan
    kv[:, 3, 2:] = torch.nan
    assert torch.equal(attend(q, kv, table, positions), expected)


def test_storing_writes_the_given_slots_only():
    kv, table = make_cache([5])
    before = kv.clone()
    slots = slots_of(table, 0, [3, 4])
    k, v = draw(2, HKV, D), draw(2, HKV, D, seed=1)
    store_kv(k, v, kv, slots)
    assert torch.equal(kv[0].flatten(0, 1)[slots], k)
    assert torch.equal(kv[1].flatten(0, 1)[slots], v)
    kv[:, slots // PAGE_SIZE, slots % PAGE_SIZE] = before[:, slots // PAGE_SIZE, slots % PAGE_SIZE]
    assert torch.equal(kv.nan_to_num(-7), before.nan_to_num(-7))


def test_gradients_flow_through_whole_sequences():
    q, k, v = (draw(1, 6, heads, D).requires_grad_() for heads in (HQ, HKV, HKV))
    causal_attention(q, k, v).square().sum().backward()
    assert all(x.grad.abs().max() > 0 for x in (q, k, v))
