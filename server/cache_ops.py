"""What the prefix cache asks of the device, in order. Positions are absolute, numbers are what the pools hand out.

The router appends these to a list, the backend executes the list strictly in order with the passes. No torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CopyPage:
    """Copy KV page `source` to page `target`: a page that is shared in part gets an owner of its own."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class ClearPage:
    """Zero KV page `page`, which may hold what is not a number."""

    page: int


@dataclass(frozen=True, slots=True)
class SaveState:
    """Copy the GDN state and conv window of `row`, as of `position` tokens, to checkpoint `slot`."""

    row: int
    slot: int
    position: int


@dataclass(frozen=True, slots=True)
class CompareState:
    """Measure by how much the state of `row` differs from checkpoint `slot`, relative to its size."""

    row: int
    slot: int


@dataclass(frozen=True, slots=True)
class RestoreState:
    """Copy checkpoint `slot` to `row`, which then stands at `position` tokens."""

    slot: int
    row: int
    position: int


@dataclass(frozen=True, slots=True)
class StorePage:
    """Copy KV page `page` to the host tier as `handle`, with a checksum."""

    page: int
    handle: int


@dataclass(frozen=True, slots=True)
class LoadPage:
    """Copy host entry `handle` to KV page `page`."""

    handle: int
    page: int


@dataclass(frozen=True, slots=True)
class StoreState:
    """Copy checkpoint `slot` to the host tier as `handle`, with a checksum."""

    slot: int
    handle: int


@dataclass(frozen=True, slots=True)
class LoadState:
    """Copy host entry `handle` to checkpoint `slot`."""

    handle: int
    slot: int


@dataclass(frozen=True, slots=True)
class DropHost:
    """Forget host entry `handle`. Handles are never used again."""

    handle: int


CacheOp = (
    CopyPage
    | ClearPage
    | SaveState
    | CompareState
    | RestoreState
    | StorePage
    | LoadPage
    | StoreState
    | LoadState
    | DropHost
)
