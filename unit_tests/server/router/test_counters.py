from server.router.counters import Counters


def test_only_judged_drafts_count_and_by_their_position() -> None:
    counters = Counters(proposed_per_position=[0] * 3, accepted_per_position=[0] * 3)
    counters.count_drafts(3, 1)
    counters.count_drafts(2, 2)
    counters.count_drafts(0, 0)
    assert (counters.num_verify_steps, counters.num_proposed, counters.num_accepted) == (3, 5, 3)
    assert counters.proposed_per_position == [2, 2, 1] and counters.accepted_per_position == [2, 1, 0]
