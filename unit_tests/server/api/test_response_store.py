"""The store of responses: what stays, and what leaves first."""

import pytest

from server.api.response_store import ResponseStore, Stored
from server.errors import NotFound


def test_a_response_is_kept_until_it_is_deleted() -> None:
    store = ResponseStore()
    store.put("a", Stored(b"{}", b"[]", {}))
    assert store.get("a") == Stored(b"{}", b"[]", {})
    store.delete("a")
    for act in (store.get, store.delete):
        with pytest.raises(NotFound, match="there is no response 'a'"):
            act("a")


def test_those_that_nobody_asked_for_the_longest_time_leave_first() -> None:
    entry = Stored(b"x" * 1000, b"y" * 1000, {})
    store = ResponseStore(3 * entry.num_bytes)
    for name in "abc":
        store.put(name, entry)
    store.get("a")
    store.put("d", entry)
    assert [name for name in "abcd" if name in store._stored] == ["a", "c", "d"]
    store.delete("a")
    store.put("e", entry)
    assert [name for name in "abcde" if name in store._stored] == ["c", "d", "e"]


def test_what_is_larger_than_the_store_is_not_kept_and_leaves_it_empty() -> None:
    store = ResponseStore(10_000)
    store.put("a", Stored(b"x" * 10_000, b"[]", {"i": b"{}"}))
    with pytest.raises(NotFound) as caught:
        store.get("a", "previous_response_id")
    assert caught.value.param == "previous_response_id"
    with pytest.raises(NotFound):
        store.get_item("i")
    store.put("b", Stored(b"{}", b"[]", {}))
    assert store.get("b").body == b"{}"


def test_an_item_is_there_as_long_as_its_response() -> None:
    entries = {name: Stored(b"x" * 1000, b"[]", {f"i{name}": name.encode(), f"j{name}": b"y" * 500}) for name in "abcd"}
    store = ResponseStore(3 * entries["a"].num_bytes)
    for name in "abc":
        store.put(name, entries[name])
    assert store.get_item("ia") == b"a"  # which is a use of the response
    store.put("d", entries["d"])
    store.delete("c")
    assert set(store._response_of_item) == {"ia", "ja", "id", "jd"}
    for item_id in ("ib", "jc", "x" * 500):
        with pytest.raises(NotFound, match=f"Item with id '{item_id[:50]}") as caught:
            store.get_item(item_id, "input[0].id")
        assert caught.value.param == "input[0].id" and len(caught.value.message) < 250
    for name in "ad":
        store.delete(name)
    assert (store._response_of_item, store._num_bytes) == ({}, 0)
