import pytest

from server.router.pages import Pool


def test_the_lowest_numbers_are_taken_first_and_zero_never() -> None:
    pool = Pool(4)
    assert pool.take(3) == [1, 2, 3]
    pool.give_back([2])
    assert pool.take(2) == [2, 4] and pool.num_free == 0


def test_giving_back_twice_is_our_own_mistake() -> None:
    pool = Pool(2)
    pool.take(1)
    pool.give_back([1])
    with pytest.raises(AssertionError, match="twice"):
        pool.give_back([1])
