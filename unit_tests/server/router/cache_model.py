"""What a device does with the operations of the prefix cache, with fingerprints for contents.

The fingerprint of a position depends on all tokens up to it, on the salt and on the weights that each was computed
with, as KV pages and GDN states do. Whatever the cache promises can be compared with a computation from nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from server.cache_ops import (
    CacheOp,
    CopyPage,
    DropHost,
    LoadPage,
    LoadState,
    RestoreState,
    SaveState,
    StorePage,
    StoreState,
)
from server.config import Limits
from server.router.pages import Pool
from server.router.prefix_cache import Holding, PrefixCache
from server.router.prefix_tree import Match

GARBAGE = -1
PAGE_SIZE = 4


def make_limits(
    num_pages: int = 32,
    num_checkpoints: int = 4,
    host_cache_bytes: int = 0,
    page_bytes: int = 1,
    checkpoint_bytes: int = 1,
) -> Limits:
    return Limits(
        max_running_requests=8,
        chunked_prefill_size=64,
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        mtp_step=0,
        num_checkpoints=num_checkpoints,
        host_cache_bytes=host_cache_bytes,
        page_bytes=page_bytes,
        checkpoint_bytes=checkpoint_bytes,
    )


def fingerprint(before: int, token_id: int, weights: int) -> int:
    return hash((before, token_id, weights))


def fingerprints(token_ids: list[int], salt: str, weights: int) -> list[int]:
    """One per position, and the empty prefix first."""
    found = [hash(salt)]
    for token_id in token_ids:
        found.append(fingerprint(found[-1], token_id, weights))
    return found


class Device:
    """Contents of pages, slots, rows and the host tier; a state is (position, fingerprint)."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.pages = {page: [GARBAGE] * PAGE_SIZE for page in range(1, limits.num_pages + 1)}
        self.slots = dict.fromkeys(range(1, limits.num_checkpoints + 1), (GARBAGE, GARBAGE))
        self.rows: dict[int, tuple[int, int]] = {}
        self.host_pages: dict[int, list[int]] = {}
        self.host_states: dict[int, tuple[int, int]] = {}
        self.used_handles: set[int] = set()

    def run(self, ops: list[CacheOp]) -> None:
        for op in ops:
            self._run_one(op)
            used = len(self.host_pages) * self.limits.page_bytes + len(self.host_states) * self.limits.checkpoint_bytes
            assert used <= self.limits.host_cache_bytes, "the host tier has no room for this operation"
        ops.clear()

    def _run_one(self, op: CacheOp) -> None:
        match op:
            case CopyPage(source, target):
                self.pages[target] = list(self.pages[source])
            case SaveState(row, slot, position):
                assert self.rows[row][0] == position, "the row does not stand where it was said to"
                self.slots[slot] = self.rows[row]
            case RestoreState(slot, row, position):
                assert self.slots[slot][0] == position
                self.rows[row] = self.slots[slot]
            case StorePage(page, handle):
                self.host_pages[self._new(handle)] = list(self.pages[page])
            case LoadPage(handle, page):
                self.pages[page] = list(self.host_pages[handle])
            case StoreState(slot, handle):
                self.host_states[self._new(handle)] = self.slots[slot]
            case LoadState(handle, slot):
                self.slots[slot] = self.host_states[handle]
            case DropHost(handle):
                assert (self.host_pages.pop(handle, None) is None) != (self.host_states.pop(handle, None) is None)
            case _:
                raise AssertionError(op)

    def _new(self, handle: int) -> int:
        assert handle and handle not in self.used_handles
        self.used_handles.add(handle)
        return handle

    def corrupt(self, handle: int) -> None:
        if handle in self.host_pages:
            self.host_pages[handle] = [GARBAGE] * PAGE_SIZE
        if handle in self.host_states:
            self.host_states[handle] = (GARBAGE, GARBAGE)

    def compute(self, row: int, token_ids: list[int], end: int, pages: list[int], weights: int) -> None:
        """A pass: the row goes on from where it stands to `end`."""
        position, state = self.rows[row]
        for index in range(position, end):
            state = fingerprint(state, token_ids[index], weights)
            self.pages[pages[index // PAGE_SIZE]][index % PAGE_SIZE] = state
        self.rows[row] = (end, state)

    def read(self, pages: list[int], num_tokens: int) -> list[int]:
        return [self.pages[pages[index // PAGE_SIZE]][index % PAGE_SIZE] for index in range(num_tokens)]


@dataclass(eq=False)
class Runner:
    """A running request."""

    token_ids: list[int]
    salt: str
    row: int
    holding: Holding
    num_computed: int
    is_tainted: bool = False  # has run while the weights changed


@dataclass(eq=False)
class House:
    """A cache, the pool it shares and its device. Operations wait in `before` and `after`, passes in `passes`."""

    limits: Limits
    broken: set[int] = field(default_factory=set)
    weights: int = 0
    before: list[CacheOp] = field(default_factory=list)
    after: list[CacheOp] = field(default_factory=list)
    runners: list[Runner] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = Pool(self.limits.num_pages)
        self.cache = PrefixCache(self.limits, self.pool, lambda handle: handle not in self.broken)
        self.device = Device(self.limits)
        self.passes: list[tuple[Runner, int, list[int]]] = []
        self.admitted: list[Runner] = []
        self.num_rows = 0
        self.cache.begin_step()

    def admit(self, token_ids: Iterable[int], salt: str = "", match: Match | None = None) -> Runner:
        """Start a request from what can be reused."""
        token_ids = list(token_ids)
        match = match or self.cache.match(token_ids, salt)
        self.num_rows += 1
        holding = self.cache.acquire(match, self.num_rows, self.before) if match.position else None
        self.cache.count(match, holding is not None)
        runner = Runner(token_ids, salt, self.num_rows, holding or self.cache.hold(salt), match.position)
        if holding is None:
            runner.num_computed = 0
            self.device.rows[runner.row] = (0, hash(salt))
        self.runners.append(runner)
        self.admitted.append(runner)
        return runner

    def reserve(self, runner: Runner, num_tokens: int) -> bool:
        needed = -(-num_tokens // PAGE_SIZE) - runner.holding.num_pages
        if needed > 0:
            if not self.cache.free_pages(needed, self.before):
                return False
            runner.holding.own_pages += self.pool.take(needed)
        return True

    def plan(self, runner: Runner, end: int, keeps: str = "pages") -> bool:
        """Let the coming pass compute up to `end`. `keeps`: nothing, pages, or a checkpoint too, where a page ends;
        whether it kept the last."""
        assert self.reserve(runner, end)
        is_kept = False
        known = runner.token_ids[:end]
        if keeps == "checkpoint" and end % PAGE_SIZE == 0:
            is_kept = self.cache.add_checkpoint(runner.holding, known, end, runner.row, self.before, self.after)
        elif keeps != "nothing":
            self.cache.extend(runner.holding, known, end)
        self.passes.append((runner, end, runner.holding.page_list))
        return is_kept

    def leave(self, runner: Runner, keeps_state: bool = True) -> None:
        """End a request where it stands."""
        end = runner.num_computed
        known = runner.token_ids[:end]
        self.cache.finish(runner.holding, known, end, runner.row, self.before, end if keeps_state and end else None)
        self.runners.remove(runner)

    def run(self) -> None:
        """Bring the device up to date, look whether all promises hold, and begin the next step."""
        self.device.run(self.before)
        for runner in self.admitted:
            if runner in self.runners and not runner.is_tainted:
                assert self.device.rows[runner.row] == (runner.num_computed, self.expected(runner)[runner.num_computed])
        self.check()
        for runner, end, pages in self.passes:
            self.device.compute(runner.row, runner.token_ids, end, pages, self.weights)
            runner.num_computed = end
        self.device.run(self.after)
        self.passes, self.admitted = [], []
        self.check()
        self.cache.begin_step()
        self.check_accounts()

    def serve(self, token_ids: Iterable[int], salt: str = "", keeps: str = "pages", keeps_state: bool = True) -> Runner:
        """One request alone, from admission to its end."""
        runner = self.admit(token_ids, salt)
        self.plan(runner, len(runner.token_ids), keeps)
        self.run()
        self.leave(runner, keeps_state)
        self.run()
        return runner

    def flush(self) -> None:
        self.cache.flush(self.before)
        self.weights += 1
        for runner in self.runners:
            runner.is_tainted = True

    def expected(self, runner: Runner) -> list[int]:
        return fingerprints(runner.token_ids, runner.salt, self.weights)

    def check(self) -> None:
        """Every running request has exactly what it would have computed by itself."""
        for runner in self.runners:
            if not runner.is_tainted:
                found = self.device.read(runner.holding.page_list, runner.num_computed)
                assert found == self.expected(runner)[1 : runner.num_computed + 1]
        self.check_accounts()

    def check_accounts(self) -> None:
        self.cache.check([runner.holding for runner in self.runners])
