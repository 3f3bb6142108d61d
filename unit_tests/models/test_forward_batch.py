"""What a pass knows about itself: positions, slots, masks, and what must be folded first."""

import pytest
import torch

from models import forward_batch
from models.cache import Cache, GDNCache, KVCache
from models.config import parse_config
from models.forward_batch import CacheView, ForwardBatch
from unit_tests.checkpoints import make_config

PAGE_SIZE = 4


@pytest.fixture
def cache():
    config = parse_config(make_config(num_layers=4))
    gdn = GDNCache.allocate(config, mtp_step=3, num_rows=8, dtype=torch.float32, device="cpu")
    return Cache(KVCache.allocate(config, 0, 20, PAGE_SIZE, torch.float32, "cpu"), gdn)


def make_batch(cache, rows, starts, query_lens, accepted=None):
    accepted = accepted or [0] * len(rows)
    table = torch.arange(1, 1 + 3 * len(rows)).view(len(rows), 3)
    view = CacheView(
        cache=cache,
        rows=tuple(rows),
        start_lens=torch.tensor(starts),
        accept_lens=torch.tensor(accepted),
        page_table=table,
        is_verify=True,
        row_ids=torch.tensor(rows),
        host_starts=tuple(starts),
    )
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, query_lens, strict=True)])
    return ForwardBatch(torch.zeros_like(positions), positions, tuple(query_lens), view)


def test_whole_sequences_start_at_position_zero():
    batch = ForwardBatch.whole_sequences(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.query_lens == (3, 3)
    assert batch.view is None


def test_a_batch_of_equal_lengths_is_one_part(cache):
    batch = make_batch(cache, [1, 2], [3, 5], [2, 2])
    [(span, part)] = batch.parts
    assert part is batch
    assert torch.equal(batch.positions[span], batch.positions)


def test_a_batch_of_unequal_lengths_is_one_part_per_request(cache):
    batch = make_batch(cache, [4, 2, 7], [3, 0, 5], [2, 4, 1], accepted=[1, 0, 3])
    assert [part.query_lens for _, part in batch.parts] == [(2,), (4,), (1,)]
    assert [part.view.rows for _, part in batch.parts] == [(4,), (2,), (7,)]
    assert [part.view.accept_lens.tolist() for _, part in batch.parts] == [[1], [0], [3]]
    assert [part.view.host_starts for _, part in batch.parts] == [(3,), (0,), (5,)]
    assert torch.cat([batch.positions[span] for span, _ in batch.parts]).tolist() == batch.positions.tolist()
    assert torch.cat([part.positions for _, part in batch.parts]).tolist() == batch.positions.tolist()


@pytest.mark.parametrize("query_lens", [[2, 2], [1, 3]])
def test_kv_slots_are_page_times_size_plus_offset(query_lens, cache):
    batch = make_batch(cache, [1, 2], [3, 7], query_lens)
    owners = [0] * query_lens[0] + [1] * query_lens[1]
    expected = [
        int(batch.view.page_table[owner, position // PAGE_SIZE]) * PAGE_SIZE + position % PAGE_SIZE
        for owner, position in zip(owners, batch.positions.tolist(), strict=True)
    ]
    assert batch.kv_slots.tolist() == expected


def test_the_page_spans_end_with_the_last_token_of_each_request(cache):
    spans = make_batch(cache, [1, 2], [3, 7], [2, 2]).page_spans
    assert spans.query_starts.tolist() == [0, 2, 4]
    assert (spans.page_starts.tolist(), spans.pages.tolist()) == ([0, 2, 5], [1, 2, 4, 5, 6])
    assert spans.last_page_lens.tolist() == [1, 1]


@pytest.mark.parametrize("rows", [[3, 4, 5], [6]])
def test_small_states_side_by_side_are_folded_together(rows, cache):
    batch = make_batch(cache, rows, [9] * len(rows), [1] * len(rows), accepted=[2] * len(rows))
    assert batch.view.fold.groups == ((slice(rows[0], rows[-1] + 1), slice(0, len(rows))),)


def test_scattered_rows_and_large_states_are_folded_one_by_one(cache, monkeypatch):
    assert make_batch(cache, [5, 3], [9, 9], [1, 1]).view.fold.groups == (
        (slice(5, 6), slice(0, 1)),
        (slice(3, 4), slice(1, 2)),
    )
    monkeypatch.setattr(forward_batch, "_SMALL_STATE_BYTES", 1)
    assert len(make_batch(cache, [3, 4], [9, 9], [1, 1]).view.fold.groups) == 2


def test_the_fold_names_the_newest_accepted_slots_oldest_first(cache):
    """Ring of eight; row 2 accepted 3 of its last step and stands at 9, row 5 accepted 1 and stands at 20."""
    fold = make_batch(cache, [2, 5], [9, 20], [4, 4], accepted=[3, 1]).view.fold
    slots = fold.slots.view(2, 3).tolist()
    assert slots[0] == [2 * 8 + 6, 2 * 8 + 7, 2 * 8 + 0]
    assert slots[1][0] == 5 * 8 + 3
    assert fold.is_accepted.tolist() == [[True, True, True], [True, False, False]]


def test_nothing_is_folded_after_prefill(cache):
    assert len(make_batch(cache, [2, 5], [9, 20], [4, 4]).view.fold.slots) == 0


def test_the_convolution_reads_three_inputs_back_and_keeps_what_the_ring_holds(cache):
    ring_len = cache.gdn.conv_ring.shape[2]
    read, written = make_batch(cache, [2], [9], [4]).conv_slots
    assert read.tolist() == [2 * ring_len + p % ring_len for p in (6, 7, 8)]
    assert written.tolist() == [2 * ring_len + p % ring_len for p in (9, 10, 11, 12)]
    _, written = make_batch(cache, [2], [1], [11]).conv_slots
    assert written.tolist() == [2 * ring_len + p % ring_len for p in range(12 - ring_len, 12)]


def test_next_tokens_are_one_per_request_over_the_same_cache(cache):
    batch = make_batch(cache, [4, 2], [3, 0], [2, 4])
    following = batch.next_tokens(torch.tensor([7, 8]), torch.tensor([5, 4]))
    assert following.query_lens == (1, 1)
    assert following.view.host_starts is None and following.page_spans is None
    assert following.view.rows == batch.view.rows and following.view.start_lens.tolist() == [5, 4]
    assert following.kv_slots.tolist() == [2 * PAGE_SIZE + 1, 5 * PAGE_SIZE + 0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_next_tokens_for_fewer_requests_are_those_of_the_first(count, cache):
    batch = make_batch(cache, [4, 2, 7], [3, 0, 5], [2, 4, 1], accepted=[1, 0, 3])
    positions = torch.tensor([5, 4, 6])[:count]
    following = batch.next_tokens(torch.tensor([7, 8, 9])[:count], positions)
    assert following.query_lens == (1,) * count
    assert following.token_ids.tolist() == [7, 8, 9][:count] and following.positions is positions
    assert following.view.rows == (4, 2, 7)[:count]
    assert following.view.start_lens is positions
    for column in ("accept_lens", "page_table", "row_ids"):
        assert torch.equal(getattr(following.view, column), getattr(batch.view, column)[:count])
    assert following.kv_slots.tolist() == [2 * PAGE_SIZE + 1, 5 * PAGE_SIZE + 0, 8 * PAGE_SIZE + 2][:count]


def test_next_tokens_without_a_cache_have_none():
    batch = ForwardBatch.whole_sequences(torch.tensor([[5, 6], [8, 9]]))
    following = batch.next_tokens(torch.tensor([7]), torch.tensor([2]))
    assert following.view is None and following.query_lens == (1,)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1], [2, 1]])
def test_picked_requests_come_in_the_order_asked_for(order, cache):
    view = make_batch(cache, [4, 2, 7], [3, 0, 5], [2, 4, 1], accepted=[1, 0, 3]).view
    assert view.row_ids.tolist() == [4, 2, 7]  # computed once: a picked view must not keep it
    picked = view.pick(order)
    assert picked.rows == tuple(view.rows[index] for index in order)
    assert picked.row_ids.tolist() == list(picked.rows)
    assert picked.host_starts == tuple(picked.start_lens.tolist())
    for column in ("start_lens", "accept_lens", "page_table"):
        assert torch.equal(getattr(picked, column), torch.stack([getattr(view, column)[index] for index in order]))
    assert picked.cache is cache and picked.is_verify


def test_a_picked_view_folds_and_writes_what_its_requests_do(cache):
    view = make_batch(cache, [4, 2, 7], [9, 6, 20], [4, 4, 4], accepted=[1, 2, 3]).view
    slots, accepted = view.fold.slots.view(3, 3), view.fold.is_accepted
    picked = view.pick([2, 0])
    assert torch.equal(picked.fold.slots.view(2, 3), slots[[2, 0]])
    assert torch.equal(picked.fold.is_accepted, accepted[[2, 0]])
    assert torch.equal(picked.delta_write_slots(4).view(2, 4), view.delta_write_slots(4).view(3, 4)[[2, 0]])
    assert [group for group, _ in picked.fold.groups] == [slice(7, 8), slice(4, 5)]
