"""The life of requests with a prefix cache. Pages have 4 tokens; `House.run` compares contents with the promises."""

import pytest

from server.cache_ops import CopyPage, DropHost, RestoreState, SaveState
from unit_tests.server.router.cache_model import House, make_limits

TOKENS = list(range(100, 140))
OTHER = list(range(500, 540))


@pytest.fixture
def house() -> House:
    return House(make_limits())


def hit(house: House, token_ids: list[int], salt: str = "") -> int:
    return house.cache.match(token_ids, salt).position


def test_a_prompt_that_goes_on_at_a_page_end_shares_the_pages(house: House) -> None:
    house.serve(TOKENS[:8])
    match = house.cache.match(TOKENS[:12], "")
    runner = house.admit(TOKENS[:12])
    assert (runner.num_computed, runner.holding.nodes, runner.holding.own_pages) == (8, list(match.nodes), [])
    assert match.checkpoint is not None
    assert house.before == [RestoreState(match.checkpoint.slot, runner.row, 8)]
    house.plan(runner, 12)
    house.run()


def test_a_prompt_that_goes_on_within_a_page_gets_a_copy_of_it_before_its_state(house: House) -> None:
    house.serve(TOKENS[:10])
    match = house.cache.match(TOKENS[:20], "")
    runner = house.admit(TOKENS[:20])
    assert match.checkpoint is not None and runner.num_computed == match.position == 10
    copy = CopyPage(match.nodes[-1].page, runner.holding.own_pages[0])
    assert house.before == [copy, RestoreState(match.checkpoint.slot, runner.row, 10)]
    assert match.nodes[-1].num_users == 0 and match.nodes[0].num_users == 1
    house.plan(runner, 20)
    house.run()


def test_a_page_may_be_shared_in_part_with_a_prompt_that_branches_off_inside_it(house: House) -> None:
    house.serve(TOKENS[:12], keeps_state=False)
    num_cached = house.cache.num_cached_pages
    house.serve(TOKENS[:6])
    assert house.cache.num_cached_pages == num_cached
    branch = [*TOKENS[:7], *OTHER[:5]]
    match = house.cache.match(branch, "")
    assert (match.position, match.shared_len) == (6, 7)
    house.plan(house.admit(branch), 12)
    house.run()


def test_one_token_always_remains_to_be_computed(house: House) -> None:
    house.serve(TOKENS[:8])
    match = house.cache.match(TOKENS[:8], "")
    assert (match.position, match.shared_len, match.reason) == (0, 7, "no checkpoint")
    assert hit(house, TOKENS[:9]) == 8


def test_every_miss_has_its_reason() -> None:
    house = House(make_limits(num_pages=8))
    house.serve(TOKENS[:8], salt="a")
    house.serve(OTHER[:4], salt="a", keeps_state=False)

    def reason(token_ids: list[int], salt: str) -> str:
        return house.cache.match(token_ids, salt).reason

    assert reason([], "a") == reason([1], "a") == "too short"
    assert reason(TOKENS[:9], "a") == ""
    assert reason(TOKENS[:9], "b") == reason(TOKENS[:3], "b") == "salt"
    assert reason([1, 2, 3], "a") == reason([1, 2, 3], "b") == "unseen"
    assert reason(OTHER[:9], "a") == reason(TOKENS[:3], "a") == "no checkpoint"
    house.cache.free_pages(8, house.before)
    assert reason(TOKENS[:9], "a") == reason(OTHER[:9], "a") == "evicted"
    assert House(make_limits(num_checkpoints=0)).cache.match(TOKENS, "").reason == "disabled"


def test_hits_and_misses_are_counted_once_per_admitted_request(house: House) -> None:
    house.serve(TOKENS[:8])
    house.serve(TOKENS[:12])
    house.cache.count(house.cache.match(TOKENS[:13], ""), used=False)
    counters = house.cache.counters
    assert (counters.num_hits, counters.num_cached_tokens) == (1, 8)
    assert {reason: count for reason, count in counters.misses.items() if count} == {"unseen": 1, "no room": 1}


def test_without_checkpoints_nothing_is_kept() -> None:
    house = House(make_limits(num_checkpoints=0))
    runner = house.admit(TOKENS[:8])
    assert not house.plan(runner, 8, "checkpoint")
    house.run()
    house.leave(runner)
    assert house.before == [] and house.pool.num_free == house.limits.num_pages and house.cache.num_evictable == 0


def test_a_checkpoint_of_a_prefill_is_saved_behind_its_pass_and_found_from_the_next_step_on(house: House) -> None:
    runner = house.admit(TOKENS[:12])
    assert house.plan(runner, 8, "checkpoint")
    assert house.before == [] and house.after == [SaveState(runner.row, 1, 8)]
    assert hit(house, TOKENS[:9]) == 0
    house.run()
    assert hit(house, TOKENS[:9]) == 8 and house.cache.num_checkpoints == 1


def test_a_checkpoint_that_is_there_is_not_made_again_but_counts_as_used() -> None:
    house = House(make_limits(num_checkpoints=2))
    house.serve(TOKENS[:8])
    house.serve(OTHER[:8])
    runner = house.admit(TOKENS[:8])
    assert not house.plan(runner, 8, "checkpoint") and house.after == []
    house.run()
    house.serve([1] * 8)
    assert hit(house, TOKENS[:9]) == 8 and hit(house, OTHER[:9]) == 0


def test_there_is_no_checkpoint_where_all_slots_were_given_in_this_step(house: House) -> None:
    house = House(make_limits(num_checkpoints=1))
    first, second = house.admit(TOKENS[:8]), house.admit(OTHER[:8])
    assert house.plan(first, 8, "checkpoint") and not house.plan(second, 8, "checkpoint")
    house.run()
    house.reserve(second, 9)
    second.token_ids.append(7)
    assert house.cache.add_checkpoint(second.holding, OTHER[:8], 8, second.row, house.before, house.before)
    assert hit(house, TOKENS[:9]) == 0


def test_nothing_that_the_coming_pass_writes_is_evicted_or_given_back() -> None:
    house = House(make_limits(num_pages=6, num_checkpoints=1))
    runner = house.admit(TOKENS[:12])
    house.plan(runner, 12, "checkpoint")
    house.leave(runner, keeps_state=False)
    assert house.cache.num_evictable == 0 and house.pool.num_free == 3
    assert not house.cache.free_pages(4, house.before)
    house.passes.clear()
    house.after.clear()
    house.cache.begin_step()
    assert house.cache.num_evictable == 3 and house.pool.num_free == 3
    assert house.cache.free_pages(6, house.before)


def test_a_page_of_a_request_that_ends_before_its_pass_has_run_stays_until_then(house: House) -> None:
    runner = house.admit(TOKENS[:10])
    house.reserve(runner, 10)
    assert house.plan(runner, 8, "checkpoint")
    house.leave(runner)
    assert house.pool.num_free == house.limits.num_pages - 3
    house.run()
    assert house.pool.num_free == house.limits.num_pages - 2 and hit(house, TOKENS[:9]) == 8


def test_pages_in_use_are_never_evicted(house: House) -> None:
    house.serve(TOKENS[:8])
    runner = house.admit(TOKENS[:12])
    assert house.cache.num_evictable == 0
    assert not house.cache.free_pages(house.limits.num_pages - 1, house.before)
    house.leave(runner)
    assert house.cache.num_evictable == 2
    assert house.cache.free_pages(house.limits.num_pages, house.before)


def test_a_preempted_request_makes_room_in_the_same_step() -> None:
    house = House(make_limits(num_pages=4))
    runner = house.admit(TOKENS[:12])
    house.plan(runner, 12)
    house.run()
    house.leave(runner)
    newcomer = house.admit(OTHER[:16])
    assert house.reserve(newcomer, 16)
    house.plan(newcomer, 16)
    house.run()


def test_a_hit_without_room_for_it_changes_nothing() -> None:
    house = House(make_limits(num_pages=4))
    house.serve(TOKENS[:6])
    blocker = house.admit(OTHER[:8])
    house.plan(blocker, 8)
    house.run()
    match = house.cache.match(TOKENS[:12], "")
    assert house.cache.acquire(match, 9, house.before) is None and house.before == []
    house.check_accounts()
    assert hit(house, TOKENS[:12]) == 6
    house.leave(blocker, keeps_state=False)
    assert house.cache.acquire(match, 9, house.before) is not None


def test_a_match_that_does_not_hold_any_more_is_not_acquired(house: House) -> None:
    house.serve(TOKENS[:8])
    match = house.cache.match(TOKENS[:9], "")
    house.cache.free_pages(house.limits.num_pages, house.before)
    assert house.cache.acquire(match, 9, house.before) is None
    house.serve(TOKENS[:8])
    match = house.cache.match(TOKENS[:9], "")
    house.flush()
    assert house.cache.acquire(match, 9, house.before) is None
    assert house.cache.acquire(house.cache.match([1, 2], ""), 9, house.before) is None


def test_two_requests_with_the_same_prefix_keep_their_own_pages_until_they_end(house: House) -> None:
    first, second = house.admit(TOKENS[:12]), house.admit(TOKENS[:12])
    for end in (6, 12):
        house.plan(first, end)
        house.plan(second, end)
        house.run()
    pages = second.holding.page_list
    assert not set(pages) & set(first.holding.page_list) and first.holding.nodes == second.holding.nodes
    house.leave(first)
    house.run()
    assert second.holding.page_list == pages and house.cache.num_cached_pages == 3
    house.leave(second)
    assert house.cache.num_cached_pages == 3 and house.pool.num_free == house.limits.num_pages - 3
    assert house.cache.num_checkpoints == 1


def test_the_second_of_two_leaves_checkpoints_where_the_first_did_not(house: House) -> None:
    first, second = house.admit(TOKENS[:12]), house.admit([*TOKENS[:8], *OTHER[:4]])
    house.plan(first, 12)
    assert house.plan(second, 8, "checkpoint")
    house.run()
    assert hit(house, TOKENS[:12]) == 8
    house.plan(house.admit([*TOKENS[:8], 1, 2]), 10)
    house.run()


def test_the_page_table_of_a_running_request_never_changes_but_grows(house: House) -> None:
    house.serve(TOKENS[:6], keeps_state=False)
    runner, seen = house.admit(TOKENS[:24]), []
    for end in range(2, 24, 2):
        house.plan(runner, end, "checkpoint")
        assert runner.holding.page_list[: len(seen)] == seen
        seen = runner.holding.page_list
        assert len(seen) == runner.holding.num_pages
        house.run()


def test_a_flush_forgets_everything_that_nobody_uses(house: House) -> None:
    house = House(make_limits(num_pages=4, host_cache_bytes=100))
    house.serve(TOKENS[:8])
    house.cache.free_pages(3, house.before)
    house.run()
    assert house.cache.host_bytes_used
    house.flush()
    assert all(isinstance(op, DropHost) for op in house.before)
    house.run()
    assert hit(house, TOKENS[:9]) == 0 and house.cache.host_bytes_used == 0
    assert house.pool.num_free == 4 and house.cache.num_free_checkpoints == 4


def test_what_runs_during_a_flush_goes_on_but_is_never_found(house: House) -> None:
    house.serve(TOKENS[:8])
    runner, other = house.admit(TOKENS[:16]), house.admit(TOKENS[:12])
    house.plan(runner, 12, "checkpoint")
    house.run()
    house.flush()
    pages = runner.holding.page_list
    assert not house.plan(runner, 16, "checkpoint") and runner.holding.page_list[:3] == pages
    house.run()
    house.serve(TOKENS[:8])  # computed anew
    house.leave(runner)
    house.leave(other)
    house.run()
    assert hit(house, TOKENS[:16]) == 8 and house.cache.num_cached_pages == 2
    assert house.pool.num_free == house.limits.num_pages - 2
    house.plan(house.admit(TOKENS[:9]), 9)
    house.run()


def test_a_slot_that_waits_for_its_state_is_not_used_again_before_it_has_come(house: House) -> None:
    runner = house.admit(TOKENS[:8])
    house.plan(runner, 8, "checkpoint")
    house.flush()
    assert house.cache.num_checkpoints == 0 and house.cache.num_free_checkpoints == 3
    house.run()
    assert house.cache.num_free_checkpoints == 4


def test_ending_twice_is_ending_once(house: House) -> None:
    runner = house.serve(TOKENS[:10])
    house.cache.finish(runner.holding, TOKENS[:10], 0, runner.row, house.before)
    house.check_accounts()


def test_the_accounts_show_a_page_that_is_lost(house: House) -> None:
    house.serve(TOKENS[:8])
    house.pool.take(1)
    with pytest.raises(AssertionError):
        house.check_accounts()
