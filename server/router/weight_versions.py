"""Which weights serve, by name, and how drafts fared under each. Knows names and counts only. No torch."""

from server.router.counters import Counters

FIRST_VERSION = "default"
# What trainers call all of their versions: nothing is known of two updates with such a name.
UNTELLING_NAMES = (FIRST_VERSION, "latest")
# Versions whose drafts are remembered.
MAX_VERSIONS = 8


class WeightVersions:
    """`counters` go on through all versions. `mtp_weight_version` is the one that brought the draft head; the head
    `is_stale` where the target has changed since.

    A version may come in parts, an update each, the head's before the target's: all those of the name under which the
    head came belong to it, unless that is one of UNTELLING_NAMES; of others the one behind a head that came alone.
    """

    def __init__(self, counters: Counters, has_draft: bool):
        self._counters, self._has_draft = counters, has_draft
        self.weight_version = self.mtp_weight_version = FIRST_VERSION
        self.is_stale = False
        self._is_head_ahead = False  # it came alone, and the target has not changed since
        self.num_updates = 0
        self._past: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._base = self._totals()

    @property
    def drafts(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Drafts proposed and accepted per position under each of the last MAX_VERSIONS versions, the oldest first."""
        past = {version: counts for version, counts in self._past.items() if version != self.weight_version}
        return dict([*past.items(), (self.weight_version, self._count_since())][-MAX_VERSIONS:])

    def count_on(self) -> str:
        """The name of an update that has none: the next number."""
        return str(int(self.weight_version) + 1 if self.weight_version.isdecimal() else self.num_updates + 1)

    def update(self, version: str, touched_target: bool, touched_draft: bool) -> None:
        """Weights have come and serve from now on."""
        self._begin(version)
        self.num_updates += 1
        if touched_draft:
            self.mtp_weight_version, self.is_stale = version, False
        elif touched_target and not (self._is_head_ahead or self._is_part_of_heads(version)):
            self.is_stale = self._has_draft
        if touched_target or touched_draft:
            self._is_head_ahead = not touched_target

    def rename(self, version: str) -> None:
        """The weights that serve have this name from now on, and so has a head that came with them."""
        if self.mtp_weight_version == self.weight_version:
            self.mtp_weight_version = version
        self._begin(version)

    def _is_part_of_heads(self, version: str) -> bool:
        return version == self.mtp_weight_version and version not in UNTELLING_NAMES

    def _begin(self, version: str) -> None:
        self._past = self.drafts
        self._base = self._totals()
        self.weight_version = version

    def _totals(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self._counters.proposed_per_position), tuple(self._counters.accepted_per_position)

    def _count_since(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        proposed, accepted = (
            tuple(now - before for now, before in zip(*counts, strict=True))
            for counts in zip(self._totals(), self._base, strict=True)
        )
        return proposed, accepted
