"""What leaves first, and the host tier. Pages have 4 tokens."""

import pytest

from server.cache_ops import DropHost, LoadPage, LoadState, RestoreState, StorePage, StoreState
from server.router.cache_tiers import node_score, position_above
from server.router.prefix_tree import Node
from unit_tests.server.router.cache_model import House, make_limits


def prompt(seed: int, count: int) -> list[int]:
    return [1000 * seed + index for index in range(count)]


def hit(house: House, token_ids: list[int]) -> int:
    return house.cache.match([*token_ids, 7], "").position


def test_pages_without_a_checkpoint_leave_first_however_new_they_are() -> None:
    house = House(make_limits(num_pages=8))
    house.serve(prompt(1, 8))
    house.serve(prompt(2, 8), keeps_state=False)
    assert house.cache.free_pages(6, house.before)
    assert hit(house, prompt(1, 8)) == 8
    assert house.cache.match([*prompt(2, 8), 7], "").reason == "evicted"
    assert house.cache.counters.num_evicted_pages == 2


def test_pages_become_worthless_with_their_last_checkpoint() -> None:
    house = House(make_limits(num_pages=8, num_checkpoints=2, checkpoint_bytes=100))
    house.serve(prompt(1, 12))
    house.serve(prompt(2, 4))
    house.serve(prompt(3, 12))  # takes the slot of the second
    house.cache.free_pages(2, house.before)
    assert [hit(house, prompt(seed, 12)) for seed in (1, 3)] == [12, 12]


def test_the_least_recently_used_of_equals_leaves_first() -> None:
    house = House(make_limits(num_pages=12, num_checkpoints=9))
    for seed in (1, 2, 3):
        house.serve(prompt(seed, 8))
    house.leave(house.admit([*prompt(1, 8), 7]), keeps_state=False)
    house.run()
    house.cache.free_pages(7, house.before)
    assert [hit(house, prompt(seed, 8)) for seed in (1, 2, 3)] == [8, 0, 8]


def test_the_checkpoint_that_saves_least_leaves_first() -> None:
    house = House(make_limits(num_checkpoints=2))
    house.serve(prompt(1, 16))
    house.serve(prompt(2, 4))
    house.serve(prompt(3, 8))
    assert [hit(house, prompt(seed, count)) for seed, count in ((1, 16), (2, 4), (3, 8))] == [16, 0, 8]
    assert house.cache.counters.num_evicted_checkpoints == 1


def test_a_checkpoint_is_worth_the_tokens_since_the_one_above_it() -> None:
    house = House(make_limits(num_checkpoints=2, checkpoint_bytes=2))
    house.serve(prompt(1, 12))
    runner = house.serve(prompt(1, 14))
    deep, above = (house.cache.match([*runner.token_ids[:count], 7], "").checkpoint for count in (14, 12))
    assert deep is not None and above is not None
    assert (position_above(above), position_above(deep)) == (0, 12)
    assert (above.score, deep.score) == (6, 1)
    assert node_score(above.node) == 6 and node_score(Node((), None, 0, 0, score=3)) == 3
    house.serve(prompt(2, 8))
    assert hit(house, prompt(1, 14)) == 12


def test_what_is_not_used_again_grows_old_however_much_it_saves() -> None:
    house = House(make_limits(num_checkpoints=2))
    house.serve(prompt(1, 16))
    for seed in range(2, 12):
        house.serve(prompt(seed, 8))
    assert hit(house, prompt(1, 16)) == 0


def test_the_heap_stays_small_when_nothing_is_ever_evicted() -> None:
    house = House(make_limits())
    for _ in range(200):
        house.serve(prompt(1, 9))
    assert len(house.cache._tiers._heap) < 100


def test_pages_and_checkpoints_go_to_the_host_and_come_back() -> None:
    house = House(make_limits(num_pages=4, host_cache_bytes=100))
    house.serve(prompt(1, 8))
    assert house.cache.free_pages(4, house.before)
    assert [type(op) for op in house.before] == [StoreState, StorePage, StorePage]
    assert (house.cache.host_bytes_used, house.cache.num_cached_pages, house.cache.num_checkpoints) == (3, 0, 0)
    house.run()
    runner = house.admit([*prompt(1, 8), 7])
    kinds = [type(op) for op in house.before]
    assert kinds == [LoadPage, DropHost, LoadPage, DropHost, LoadState, DropHost, RestoreState]
    assert runner.num_computed == 8 and house.cache.host_bytes_used == 0
    assert house.cache.counters.num_host_hits == 1
    house.run()


def test_a_chain_may_lie_on_the_device_above_and_in_the_host_below() -> None:
    house = House(make_limits(num_pages=6, host_cache_bytes=100))
    house.serve(prompt(1, 14))
    house.cache.free_pages(4, house.before)  # the leaf and the page above it
    house.run()
    match = house.cache.match([*prompt(1, 14), 7], "")
    assert [bool(node.page) for node in match.nodes] == [True, True, False, False] and match.position == 14
    house.admit([*prompt(1, 14), 7])
    house.run()


def test_worthless_pages_do_not_go_to_the_host() -> None:
    house = House(make_limits(num_pages=4, host_cache_bytes=100))
    house.serve(prompt(1, 8), keeps_state=False)
    house.cache.free_pages(4, house.before)
    assert house.before == [] and house.cache.host_bytes_used == 0


@pytest.mark.parametrize(("budget", "position"), [(0, 0), (1, 0), (2, 0), (3, 4), (100, 4)])
def test_the_host_tier_keeps_within_its_bytes(budget: int, position: int) -> None:
    house = House(make_limits(num_pages=4, host_cache_bytes=budget, checkpoint_bytes=2))
    house.serve(prompt(1, 4))
    house.cache.free_pages(4, house.before)
    house.run()
    assert hit(house, prompt(1, 4)) == position and house.cache.host_bytes_used <= budget


def test_the_oldest_host_entries_make_room_leaves_first() -> None:
    house = House(make_limits(num_pages=8, num_checkpoints=4, host_cache_bytes=6))
    for seed in (1, 2, 3):
        house.serve(prompt(seed, 8))
        house.cache.free_pages(8, house.before)
        house.run()
    assert [hit(house, prompt(seed, 8)) for seed in (1, 2, 3)] == [0, 8, 8]
    assert house.cache.match([*prompt(1, 8), 7], "").reason == "evicted"


def test_what_a_hit_needs_is_not_dropped_for_what_must_leave_for_it() -> None:
    house = House(make_limits(num_pages=2, num_checkpoints=1, host_cache_bytes=3))
    house.serve(prompt(1, 8))
    house.cache.free_pages(2, house.before)
    house.run()
    house.serve(prompt(2, 8))  # fills pages and slot; the host is full with the first
    runner = house.admit([*prompt(1, 8), 7])
    assert runner.num_computed == 8 and hit(house, prompt(2, 8)) == 0
    house.run()


@pytest.mark.parametrize("kind", [StorePage, StoreState])
def test_a_broken_host_entry_is_refused_with_all_that_needs_it(kind: type) -> None:
    house = House(make_limits(num_pages=4, host_cache_bytes=100))
    house.serve(prompt(1, 8))
    house.cache.free_pages(4, house.before)
    handle = next(op.handle for op in reversed(house.before) if isinstance(op, kind))
    house.run()
    house.broken.add(handle)
    match = house.cache.match([*prompt(1, 8), 7], "")
    assert (match.position, match.reason) == (0, "evicted")
    assert house.cache.counters.num_host_refused == 1
    house.cache.free_pages(1, house.before)
    assert DropHost(handle) in house.before
    house.run()
    assert house.cache.host_bytes_used == (2 if kind is StoreState else 0)


def test_a_request_that_computes_what_the_host_has_brings_it_back() -> None:
    house = House(make_limits(num_pages=4, host_cache_bytes=100))
    house.serve(prompt(1, 8))
    house.cache.free_pages(4, house.before)
    house.run()
    runner = house.admit(prompt(1, 8))  # as its last token must be computed, the checkpoint does not help
    house.plan(runner, 8)
    assert hit(house, prompt(1, 8)) == 0  # not written yet
    house.run()
    house.leave(runner)
    assert house.cache.host_bytes_used == 1 and house.cache.num_cached_pages == 2
    assert hit(house, prompt(1, 8)) == 8
