"""Which prefix of a prompt need not be computed again, what a request holds of it, and what it leaves behind.

All numbers: contents move by operations (server.cache_ops) that the device runs in order with the passes, so what was
written or loaded by an earlier operation counts as done. Knows no queue and no device. No torch.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from server.cache_ops import CacheOp, CopyPage, RestoreState, SaveState
from server.config import Limits
from server.router.cache_tiers import CacheCounters, Tiers
from server.router.pages import Pool
from server.router.prefix_tree import Contents, Match, Node, PrefixTree

# A checkpoint closer than this to another one saves less than its copy costs.
MIN_CHECKPOINT_GAP = 64


@dataclass(eq=False)
class Holding:
    """The pages of one running request: those of tree nodes it uses, then its own, which the caller may add to.

    `duplicates` are own pages by index, in place of the page of a node that another request computed first: a running
    request keeps the pages it writes. `inserted_in` is the last step in which the tree got something that the coming
    pass writes.
    """

    salt: str
    generation: int
    nodes: list[Node] = field(default_factory=list)
    own_pages: list[int] = field(default_factory=list)
    duplicates: dict[int, int] = field(default_factory=dict)
    inserted_in: int = 0

    @property
    def num_pages(self) -> int:
        return len(self.nodes) + len(self.own_pages)

    @property
    def page_list(self) -> list[int]:
        """The request's page table. Entries never change while it runs."""
        return [self.duplicates.get(index, node.page) for index, node in enumerate(self.nodes)] + self.own_pages


class PrefixCache:
    """Matches, lends, collects and forgets; `limits.num_checkpoints` 0 switches it off.

    `pages` is shared with the caller. `is_intact(handle)` says whether a host entry is completely written and its
    checksum and generation are right.
    """

    def __init__(self, limits: Limits, pages: Pool, is_intact: Callable[[int], bool]):
        self.limits, self.pages = limits, pages
        self.generation = 0
        self._is_intact = is_intact
        self._tree = PrefixTree(limits.page_size)
        self._tiers = Tiers(limits, pages, self._tree)
        self._late_ops: list[CacheOp] = []

    @property
    def counters(self) -> CacheCounters:
        return self._tiers.counters

    @property
    def num_evictable(self) -> int:
        """How many pages `free_pages` can make free now, besides the free ones."""
        return self._tiers.num_evictable

    @property
    def num_cached_pages(self) -> int:
        """Device pages of the tree, in use or not."""
        return self._tiers.num_cached_pages

    @property
    def num_checkpoints(self) -> int:
        """Checkpoints on the device."""
        return len(self._tiers.by_slot)

    @property
    def num_free_checkpoints(self) -> int:
        return self._tiers.slots.num_free

    @property
    def host_bytes_used(self) -> int:
        return self._tiers.host_bytes_used

    def begin_step(self) -> None:
        """A new scheduling step: the passes of earlier steps are on their way to the device."""
        self._tiers.begin_step()

    def match(self, token_ids: list[int], salt: str) -> Match:
        """The longest prefix to reuse; at least one token remains to be computed. Drops broken host entries only."""
        if not self.limits.num_checkpoints:
            return Match(salt, reason="disabled")
        if len(token_ids) < 2:
            return Match(salt, reason="too short")
        while True:
            match = self._tree.find(token_ids, salt, self._tiers.step)
            broken = next((each for each in match.contents if each.host and not self._is_intact(each.host)), None)
            if broken is None:
                return match
            self._tiers.refuse(broken, self._late_ops)

    def count(self, match: Match, used: bool) -> None:
        """Count an admitted request's match once; `used`: it was acquired. A hit that found no room is a miss."""
        if used:
            self.counters.num_hits += 1
            self.counters.num_cached_tokens += match.position
        else:
            reason = match.reason or "no room"
            self.counters.misses[reason] = self.counters.misses.get(reason, 0) + 1

    def hold(self, salt: str) -> Holding:
        """What a request holds that starts from nothing."""
        return Holding(salt, self.generation)

    def acquire(self, match: Match, row: int, ops: list[CacheOp]) -> Holding | None:
        """Take a hit into use: `row` stands at `match.position` with pages for it. None (and no change): no room.

        None, too, where the cache has changed since `match` so that it does not hold any more.
        """
        self._emit_late(ops)
        checkpoint, tiers = match.checkpoint, self._tiers
        if checkpoint is None or not self._is_current(match):
            return None
        is_partial = match.position % self.limits.page_size != 0
        for node in match.nodes:
            tiers.use(node)
        waiting = [node for node in match.nodes if not node.page]
        num_pages = len(waiting) + is_partial
        if not tiers.can_free_pages(num_pages) or not (checkpoint.slot or tiers.can_take_slot()):
            self._release(list(match.nodes))
            return None
        self.counters.num_host_hits += bool(waiting or not checkpoint.slot)
        tiers.wanted = checkpoint
        tiers.free_pages(num_pages, ops)
        tiers.load(waiting, checkpoint, ops)
        tiers.wanted = None
        return self._lend(match, row, is_partial, ops)

    def extend(self, holding: Holding, token_ids: list[int], num_tokens: int) -> None:
        """Full pages of the first `num_tokens` tokens become nodes that others can find from the next step on.

        They must be written by the coming pass at the latest, and that pass must run.
        """
        self._insert(holding, token_ids, num_tokens, self._tiers.step)

    def add_checkpoint(
        self,
        holding: Holding,
        token_ids: list[int],
        position: int,
        row: int,
        ops: list[CacheOp],
        late_ops: list[CacheOp],
    ) -> bool:
        """Keep `row`'s state as of `position`, a page end; False where it is there already, or there is no room.

        `late_ops` run when row and pages stand at `position`: behind the coming pass. `ops` run before that pass: what
        is evicted for this must be stored before anybody loads it.
        """
        if not self._is_open(holding):
            return False
        assert position > 0 and position % self.limits.page_size == 0
        self.extend(holding, token_ids, position)
        self._emit_late(ops)
        home = holding.nodes[position // self.limits.page_size - 1]
        if self._has_checkpoint([home], position) or not self._tiers.can_take_slot():
            return False
        slot = self._tiers.take_slot(ops)
        self._save(home, position, row, slot, self._tiers.step, late_ops)
        self._tiers.use(home)
        self._tiers.pinned.append(home)
        holding.inserted_in = self._tiers.step
        return True

    def finish(
        self,
        holding: Holding,
        token_ids: list[int],
        num_tokens: int,
        row: int,
        ops: list[CacheOp],
        checkpoint_position: int | None = None,
    ) -> None:
        """The request ends or is preempted: its pages go to the tree or back to the pool, and it holds nothing.

        `num_tokens` are written by passes that were given to the device; `row` stands at `checkpoint_position`.
        """
        if self._is_open(holding):
            self._insert(holding, token_ids, num_tokens, self._tiers.step - 1)
            self._emit_late(ops)
            if checkpoint_position:
                assert checkpoint_position <= num_tokens
                self._leave_checkpoint(holding, token_ids[:num_tokens], checkpoint_position, row, ops)
        self._let_go(holding)

    def free_pages(self, count: int, ops: list[CacheOp]) -> bool:
        """Evict until `count` pages are free: pages without a checkpoint at or below them first. False: no change."""
        self._emit_late(ops)
        return self._tiers.free_pages(count, ops)

    def flush(self, ops: list[CacheOp]) -> None:
        """Weights changed: nothing computed before is ever matched again, whoever finishes later."""
        self._emit_late(ops)
        self._tiers.clear(ops)
        self.generation += 1

    def check(self, held: list[Holding]) -> None:
        """Assert that every page and slot has one owner and that all counts are right; `held` are all there are."""
        tiers, nodes = self._tiers, list(self._tree.nodes())
        users = Counter(node for holding in held for node in holding.nodes) + Counter(tiers.pinned)
        owned = [page for holding in held for page in (*holding.own_pages, *holding.duplicates.values())]
        orphans = [node.page for node in users if node.is_orphan]
        cached = [node.page for node in nodes if node.page]
        self._check_pool(self.pages, owned + orphans + cached + tiers.late_pages)
        self._check_pool(tiers.slots, [*tiers.by_slot, *tiers.late_slots])
        assert len(cached) == self.num_cached_pages
        assert self.num_evictable == sum(node.page > 0 and not users[node] for node in nodes)
        assert all(node.num_users == users[node] for node in {*nodes, *users})
        states = [each for node in nodes for each in node.checkpoints.values()]
        assert {each.slot: each for each in states if each.slot} == tiers.by_slot
        in_host: dict[int, Contents] = {node.host: node for node in nodes if node.host}
        assert in_host | {each.host: each for each in states if each.host} == tiers.host
        assert self.host_bytes_used == sum(tiers.num_bytes(owner) for owner in tiers.host.values())
        assert self.host_bytes_used <= self.limits.host_cache_bytes
        for node in nodes:
            self._check_node(node)

    @staticmethod
    def _check_pool(pool: Pool, taken: list[int]) -> None:
        assert len(taken) == len(set(taken)) == pool.count - pool.num_free, (taken, pool.num_free)

    @staticmethod
    def _check_node(node: Node) -> None:
        children = list(node.children.values())
        assert node.parent and node.parent.children[node.key] is node and bool(node.page) != bool(node.host)
        assert node.num_device_children == sum(child.page > 0 for child in children)
        assert node.num_checkpoints == len(node.checkpoints) + sum(child.num_checkpoints for child in children)
        assert node.page or not any(child.page for child in children), "a page on the device below one that is not"
        for position, checkpoint in node.checkpoints.items():
            assert checkpoint.node is node and checkpoint.position == position
            assert bool(checkpoint.slot) != bool(checkpoint.host) and (node.page or not checkpoint.slot)

    def _emit_late(self, ops: list[CacheOp]) -> None:
        """Operations of calls that have no list. They come before any Store, which may need the bytes they free."""
        ops.extend(self._late_ops)
        self._late_ops.clear()

    def _is_open(self, holding: Holding) -> bool:
        """Whether the tree may get what the request computes."""
        return self.limits.num_checkpoints > 0 and holding.generation == self.generation

    def _is_current(self, match: Match) -> bool:
        """Whether all that `match` found is still there and written."""
        return all(each.is_there and each.written_in < self._tiers.step for each in match.contents)

    def _lend(self, match: Match, row: int, is_partial: bool, ops: list[CacheOp]) -> Holding:
        assert match.checkpoint is not None
        nodes, own_pages = list(match.nodes), []
        for node in nodes:
            self._tiers.touch(node)
        self._tiers.touch_checkpoint(match.checkpoint)
        if is_partial:
            own_pages = self.pages.take(1)
            ops.append(CopyPage(nodes[-1].page, own_pages[0]))
            self._tiers.release(nodes.pop())
        ops.append(RestoreState(match.checkpoint.slot, row, match.position))
        return Holding(match.salt, self.generation, nodes, own_pages)

    def _insert(self, holding: Holding, token_ids: list[int], num_tokens: int, written_in: int) -> None:
        if not self._is_open(holding):
            return
        size = self.limits.page_size
        first, last = len(holding.nodes), num_tokens // size
        assert last <= holding.num_pages
        pages = holding.own_pages[: max(0, last - first)]
        del holding.own_pages[: len(pages)]
        for index, page in enumerate(pages, start=first):
            parent = holding.nodes[-1] if holding.nodes else self._tree.root(holding.salt)
            key = tuple(token_ids[index * size : (index + 1) * size])
            node = parent.children.get(key) or self._tree.add_node(parent, key)
            self._tiers.use(node)
            holding.nodes.append(node)
            if node.page:
                holding.duplicates[index] = page
            else:
                self._fill(node, page, written_in)
                holding.inserted_in = max(holding.inserted_in, written_in)

    def _fill(self, node: Node, page: int, written_in: int) -> None:
        """A node that is new, or known to the host only, gets a page of the device."""
        node.written_in = written_in
        self._tiers.touch(node)
        self._tiers.put_page(node, page, self._late_ops)

    def _homes(self, holding: Holding, token_ids: list[int], position: int) -> list[Node]:
        """Nodes that a checkpoint at `position` of this request can hang on: they share all tokens up to there."""
        index = (position - 1) // self.limits.page_size
        tail = tuple(token_ids[index * self.limits.page_size : position])
        parent = holding.nodes[index - 1] if index else self._tree.roots.get(holding.salt)
        if parent is None:
            return []
        if tail in parent.children and len(tail) == self.limits.page_size:
            return [parent.children[tail]]
        return [node for node in parent.children.values() if node.key[: len(tail)] == tail]

    def _has_checkpoint(self, homes: list[Node], position: int) -> bool:
        there = next((node.checkpoints[position] for node in homes if position in node.checkpoints), None)
        if there is not None:
            self._tiers.touch_checkpoint(there)
        return there is not None

    def _leaf(self, holding: Holding, key: tuple[int, ...]) -> Node:
        """The partial page `key` behind all the request's nodes: new, or known to the host only."""
        parent = holding.nodes[-1] if holding.nodes else self._tree.root(holding.salt)
        return parent.children.get(key) or self._tree.add_node(parent, key)

    def _leave_checkpoint(
        self, holding: Holding, token_ids: list[int], position: int, row: int, ops: list[CacheOp]
    ) -> None:
        homes = self._homes(holding, token_ids, position)
        if self._has_checkpoint(homes, position) or not self._tiers.can_take_slot():
            return
        home = next((node for node in homes if node.page), None)
        slot = self._tiers.take_slot(ops)
        written_in = self._tiers.step - 1
        if home is None:
            home = self._leaf(holding, tuple(token_ids[len(holding.nodes) * self.limits.page_size :]))
            self._fill(home, holding.own_pages.pop(0), written_in)
        self._save(home, position, row, slot, written_in, ops)

    def _save(self, home: Node, position: int, row: int, slot: int, written_in: int, ops: list[CacheOp]) -> None:
        checkpoint = self._tree.add_checkpoint(home, position)
        checkpoint.written_in = written_in
        self._tiers.put_state(checkpoint, slot)
        self._tiers.touch(home)
        self._tiers.touch_checkpoint(checkpoint)
        ops.append(SaveState(row, slot, position))

    def _let_go(self, holding: Holding) -> None:
        pages = [*holding.own_pages, *holding.duplicates.values()]
        for node in holding.nodes:
            self._tiers.touch(node)
        if holding.inserted_in == self._tiers.step:
            # The coming pass still writes these pages, and what it writes hangs on these nodes.
            self._tiers.pinned += holding.nodes
            self._tiers.late_pages += pages
        else:
            self._release(holding.nodes)
            self.pages.give_back(pages)
        holding.nodes, holding.own_pages, holding.duplicates = [], [], {}

    def _release(self, nodes: list[Node]) -> None:
        for node in reversed(nodes):
            self._tiers.release(node)


def choose_cuts(
    limits: Limits, turn_ids: frozenset[int], known: list[int], start: int, shared_len: int
) -> frozenset[int]:
    """Page ends behind `start` where the prefill of the tokens `known` leaves checkpoints: where others branched off
    (shared_len), the last and the first turn of a chat, the turns between, and every checkpoint_interval tokens, if
    they are not too close to each other. `turn_ids` begin turns."""
    if not limits.num_checkpoints:
        return frozenset()
    turns = [index for index, token_id in enumerate(known) if index and token_id in turn_ids]
    interval = range(limits.checkpoint_interval, len(known), limits.checkpoint_interval)
    cuts = [start]
    for end in (shared_len, *turns[-1:], *turns, *interval):
        end -= end % limits.page_size
        if end > start and all(abs(end - other) >= MIN_CHECKPOINT_GAP for other in cuts):
            cuts.append(end)
    return frozenset(cuts[1:])
