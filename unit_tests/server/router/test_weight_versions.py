import pytest

from server.router.counters import Counters
from server.router.weight_versions import MAX_VERSIONS, UNTELLING_NAMES, WeightVersions


def make_versions(has_draft: bool = True) -> tuple[Counters, WeightVersions]:
    counters = Counters(proposed_per_position=[0] * 2, accepted_per_position=[0] * 2)
    return counters, WeightVersions(counters, has_draft)


def names(versions: WeightVersions) -> tuple[str, str, bool]:
    return versions.weight_version, versions.mtp_weight_version, versions.is_stale


def test_drafts_are_counted_under_the_version_that_proposed_them() -> None:
    counters, versions = make_versions()
    counters.count_drafts(2, 1)
    assert versions.drafts == {"default": ((1, 1), (1, 0))}
    versions.update("a", True, True)
    counters.count_drafts(2, 2)
    counters.count_drafts(1, 0)
    assert versions.drafts == {"default": ((1, 1), (1, 0)), "a": ((2, 1), (1, 1))}


def test_the_newest_versions_are_remembered_in_their_order() -> None:
    counters, versions = make_versions()
    for index in range(20):
        versions.update(str(index), True, True)
        counters.count_drafts(1, 1)
    assert list(versions.drafts) == [str(index) for index in range(20 - MAX_VERSIONS, 20)]
    assert set(versions.drafts.values()) == {((1, 0), (1, 0))}
    versions.update("15", True, True)  # begins anew
    assert list(versions.drafts)[-1] == "15" and versions.drafts["15"] == ((0, 0), (0, 0))
    assert len(versions.drafts) == MAX_VERSIONS


def test_a_head_is_stale_until_it_is_updated_too() -> None:
    versions = make_versions()[1]
    versions.update("1", True, False)
    assert names(versions) == ("1", "default", True)
    versions.update("2", False, False)
    assert names(versions) == ("2", "default", True)
    versions.update("3", False, True)
    assert names(versions) == ("3", "3", False)
    without_draft = make_versions(has_draft=False)[1]
    without_draft.update("1", True, False)
    assert names(without_draft) == ("1", "default", False)


HEAD, TARGET, BOTH = (False, True), (True, False), (True, True)


@pytest.mark.parametrize("parts", [[HEAD, TARGET, TARGET], [TARGET, HEAD, TARGET, TARGET], [BOTH, TARGET]])
def test_parts_of_one_name_are_one_version(parts: list[tuple[bool, bool]]) -> None:
    versions = make_versions()[1]
    for name in ("a", "b"):
        for part in parts:
            versions.update(name, *part)
        assert names(versions) == (name, name, False)
    versions.update("c", *TARGET)
    assert names(versions) == ("c", "b", True)
    versions.update("b", *TARGET)
    assert versions.is_stale


@pytest.mark.parametrize("name", UNTELLING_NAMES)
def test_some_names_are_those_of_all_versions(name: str) -> None:
    versions = make_versions()[1]
    for part, is_stale in [(HEAD, False), (TARGET, False), (TARGET, True), (BOTH, False), (TARGET, True)]:
        versions.update(name, *part)
        assert names(versions) == (name, name, is_stale)


def test_what_has_come_counts_and_not_what_it_is_called() -> None:
    versions = make_versions()[1]
    for touched_target, touched_draft, is_stale in [
        (True, True, False),
        (True, False, True),
        (False, True, False),
        (False, False, False),
        (True, False, False),  # the target's part of what the head was the first part of
        (True, False, True),
    ]:
        versions.update("latest", touched_target, touched_draft)
        assert names(versions) == ("latest", "latest", is_stale)


def test_a_new_name_is_the_heads_too_if_they_came_together() -> None:
    versions = make_versions()[1]
    versions.rename("a")
    assert names(versions) == ("a", "a", False)
    versions.update("b", True, False)
    versions.rename("c")
    assert names(versions) == ("c", "a", True)
    assert versions.num_updates == 1


def test_unnamed_updates_are_counted_on() -> None:
    versions = make_versions()[1]
    seen = []
    for name in (None, None, "41", None, "step 7", None):
        versions.update(versions.count_on() if name is None else name, True, True)
        seen.append(versions.weight_version)
    assert seen == ["1", "2", "41", "42", "step 7", "6"]
