"""Where the prefix tree's contents lie (device pages, checkpoint slots, host memory), and what leaves for want of room.

GreedyDual (Cao and Irani 1997): score = clock at the last use + tokens saved / cost in pages; what has the lowest score
leaves and the clock moves up to it, so that what is not used again grows old. Knows no requests and no tokens. No
torch.
"""

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count

from server.cache_ops import CacheOp, DropHost, LoadPage, LoadState, StorePage, StoreState
from server.config import Limits
from server.router.pages import Pool
from server.router.prefix_tree import Checkpoint, Contents, Node, PrefixTree, ancestry, subtree

MISS_REASONS = ("disabled", "too short", "salt", "evicted", "no checkpoint", "unseen", "no room")


@dataclass
class CacheCounters:
    """What happened since the start; `misses` by reason, `num_cached_tokens` over all hits."""

    num_hits: int = 0
    misses: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MISS_REASONS, 0))
    num_cached_tokens: int = 0
    num_evicted_pages: int = 0
    num_evicted_checkpoints: int = 0
    num_host_hits: int = 0
    num_host_refused: int = 0


class Tiers:
    """Contents of the tree's nodes and checkpoints. An operation that was appended to `ops` counts as done.

    The host entry of `wanted` is not dropped. What is `pinned`, `late_pages` and `late_slots` belongs to operations and
    writes of the coming pass and is let go when the next step begins.
    """

    def __init__(self, limits: Limits, pages: Pool, tree: PrefixTree):
        self.limits, self.pages, self.tree = limits, pages, tree
        self.counters = CacheCounters()
        self.slots = Pool(limits.num_checkpoints)
        self.by_slot: dict[int, Checkpoint] = {}
        self.host: OrderedDict[int, Contents] = OrderedDict()
        self.host_bytes_used = 0
        self.num_cached_pages = 0
        self.num_evictable = 0
        self.step = 1
        self.wanted: Checkpoint | None = None
        self.pinned: list[Node] = []
        self.late_pages: list[int] = []
        self.late_slots: list[int] = []
        self._clock = 0.0
        self._ticks = count(1)
        self._handles = count(1)
        self._heap: list[tuple[tuple[bool, float, int], int, Node]] = []

    def begin_step(self) -> None:
        """What the last pass wrote may be read and evicted from now on."""
        self.step += 1
        for node in reversed(self.pinned):
            self.release(node)
        self.pages.give_back(self.late_pages)
        self.slots.give_back(self.late_slots)
        self.pinned, self.late_pages, self.late_slots = [], [], []

    def put_page(self, node: Node, page: int, ops: list[CacheOp]) -> None:
        """The page becomes the node's; a host entry of the same contents goes."""
        assert page and not node.page and node.parent is not None
        node.page = page
        node.parent.num_device_children += 1
        self.num_cached_pages += 1
        self.num_evictable += node.num_users == 0
        if node.host:
            self._drop_host(node, ops)
        self._offer(node)

    def put_state(self, checkpoint: Checkpoint, slot: int) -> None:
        """The slot becomes the checkpoint's."""
        assert slot and not checkpoint.slot
        checkpoint.slot = slot
        self.by_slot[slot] = checkpoint

    def use(self, node: Node) -> None:
        """One more request holds the node."""
        self.num_evictable -= node.num_users == 0 and node.page > 0
        node.num_users += 1

    def release(self, node: Node) -> None:
        """One request less holds the node; an orphan goes with its last one."""
        node.num_users -= 1
        assert node.num_users >= 0
        if node.num_users == 0 and node.is_orphan:
            self.pages.give_back([node.page])
        elif node.num_users == 0:
            self.num_evictable += node.page > 0
            self._offer(node)

    def touch(self, node: Node) -> None:
        """Used just now: the page is worth its tokens again."""
        node.touched = next(self._ticks)
        node.score = self._clock + self.limits.page_size

    def touch_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Used just now: worth the tokens between the nearest checkpoint above and itself, per page of its size."""
        checkpoint.touched = next(self._ticks)
        gain = checkpoint.position - position_above(checkpoint)
        checkpoint.score = self._clock + gain * self.limits.page_bytes / self.limits.checkpoint_bytes
        self._offer(checkpoint.node)

    def can_free_pages(self, count: int) -> bool:
        """Whether `free_pages` would succeed."""
        return self.pages.num_free + self.num_evictable >= count

    def free_pages(self, count: int, ops: list[CacheOp]) -> bool:
        """Evict until `count` pages are free. Evicts nothing where that cannot be reached."""
        if not self.can_free_pages(count):
            return False
        while self.pages.num_free < count:
            self._evict_page(self._next_page(), ops)
        return True

    def can_take_slot(self) -> bool:
        """Whether `take_slot` would succeed."""
        return self.slots.num_free > 0 or any(each.written_in < self.step for each in self.by_slot.values())

    def take_slot(self, ops: list[CacheOp]) -> int:
        """A free slot; where there is none the least valuable checkpoint leaves. The caller asked `can_take_slot`."""
        if not self.slots.num_free:
            written = (each for each in self.by_slot.values() if each.written_in < self.step)
            self._evict_checkpoint(min(written, key=lambda each: (each.score, each.touched)), ops)
        return self.slots.take(1)[0]

    def load(self, nodes: list[Node], checkpoint: Checkpoint, ops: list[CacheOp]) -> None:
        """Bring what is in the host tier to the device. The caller made room and set `wanted`."""
        for node in nodes:
            if not node.page:
                page = self.pages.take(1)[0]
                ops.append(LoadPage(node.host, page))
                self.put_page(node, page, ops)
        if not checkpoint.slot:
            slot = self.take_slot(ops)
            ops.append(LoadState(checkpoint.host, slot))
            self._drop_host(checkpoint, ops)
            self.put_state(checkpoint, slot)

    def refuse(self, owner: Contents, ops: list[CacheOp]) -> None:
        """The host entry is broken: what it belongs to, and what needs that, is not there any more."""
        self.counters.num_host_refused += 1
        self._drop(owner, ops)

    def clear(self, ops: list[CacheOp]) -> None:
        """Empty all tiers and the tree; nodes in use become orphans."""
        for handle in self.host:
            ops.append(DropHost(handle))
        for slot, checkpoint in self.by_slot.items():
            if checkpoint.written_in >= self.step:
                self.late_slots.append(slot)  # its SaveState comes behind the pass: not to be used before that
            else:
                self.slots.give_back([slot])
        for node in self.tree.nodes():
            node.is_orphan, node.host = True, 0
            node.checkpoints.clear()
            if node.page and not node.num_users:
                self.pages.give_back([node.page])
        self.tree.clear()
        self.host.clear()
        self.by_slot.clear()
        self._heap.clear()
        self.host_bytes_used = self.num_cached_pages = self.num_evictable = 0

    def _is_candidate(self, node: Node) -> bool:
        return node.page > 0 and node.num_users == 0 and node.num_device_children == 0 and not node.is_orphan

    def _offer(self, node: Node) -> None:
        """Put a node that may be evicted where it belongs in the heap; its older places are void."""
        if not self._is_candidate(node):
            return
        if len(self._heap) > 64 + 4 * self.num_cached_pages:
            self._heap = [entry for entry in self._heap if entry[2].order is entry[0]]
            heapq.heapify(self._heap)
        node.order = (node.num_checkpoints > 0, node_score(node), node.touched)
        heapq.heappush(self._heap, (node.order, next(self._ticks), node))

    def _next_page(self) -> Node:
        while True:
            order, _, node = heapq.heappop(self._heap)
            if node.order is order and self._is_candidate(node):
                return node

    def _evict_page(self, node: Node, ops: list[CacheOp]) -> None:
        """To the host where that helps a later prompt and there is room, else out of the tree."""
        assert node.parent is not None
        self.counters.num_evicted_pages += 1
        if node.num_checkpoints:
            self._clock = max(self._clock, node_score(node))
        for checkpoint in list(node.checkpoints.values()):
            if checkpoint.slot:
                self._evict_checkpoint(checkpoint, ops)
        # Making room may drop the last checkpoint below: then there is nothing left to keep the page for.
        is_kept = node.num_checkpoints > 0 and self._make_room(self.limits.page_bytes, ops) and node.num_checkpoints > 0
        if is_kept:
            node.host = self._new_host(node)
            ops.append(StorePage(node.page, node.host))
        self._take_page(node)
        if not is_kept:
            self._remove(node, ops)

    def _take_page(self, node: Node) -> None:
        assert node.parent is not None
        self.pages.give_back([node.page])
        node.page = 0
        node.parent.num_device_children -= 1
        self.num_cached_pages -= 1
        self.num_evictable -= 1
        self._offer(node.parent)

    def _evict_checkpoint(self, checkpoint: Checkpoint, ops: list[CacheOp]) -> None:
        self.counters.num_evicted_checkpoints += 1
        self._clock = max(self._clock, checkpoint.score)
        slot = checkpoint.slot
        if self._make_room(self.limits.checkpoint_bytes, ops):
            checkpoint.host = self._new_host(checkpoint)
            ops.append(StoreState(slot, checkpoint.host))
        checkpoint.slot = 0
        del self.by_slot[slot]
        self.slots.give_back([slot])
        if not checkpoint.host:
            self._forget(checkpoint, ops)

    def _forget(self, checkpoint: Checkpoint, ops: list[CacheOp]) -> None:
        if checkpoint.host:
            self._drop_host(checkpoint, ops)
        self.tree.remove_checkpoint(checkpoint)
        # Only the lowest node on the device can be a candidate, and it may be worth nothing now.
        self._offer(next((node for node in ancestry(checkpoint.node) if node.page), checkpoint.node))

    def _remove(self, top: Node, ops: list[CacheOp]) -> None:
        for node in reversed(list(subtree(top))):
            for checkpoint in list(node.checkpoints.values()):
                self._forget(checkpoint, ops)
            if node.host:
                self._drop_host(node, ops)
            self.tree.remove_node(node)

    def _drop(self, owner: Contents, ops: list[CacheOp]) -> None:
        if isinstance(owner, Node):
            self._remove(owner, ops)
        else:
            self._forget(owner, ops)

    def _make_room(self, num_bytes: int, ops: list[CacheOp]) -> bool:
        """Whether the host tier has so many bytes now. The oldest entries go, of nodes only leaves."""
        if num_bytes > self.limits.host_cache_bytes:
            return False
        while self.host_bytes_used + num_bytes > self.limits.host_cache_bytes:
            oldest = next((owner for owner in self.host.values() if self._may_drop(owner)), None)
            if oldest is None:
                return False
            self._drop(oldest, ops)
        return True

    def _may_drop(self, owner: Contents) -> bool:
        if isinstance(owner, Node):
            return not owner.children and not owner.num_users
        return owner is not self.wanted

    def _new_host(self, owner: Contents) -> int:
        handle = next(self._handles)
        self.host[handle] = owner
        self.host_bytes_used += self.num_bytes(owner)
        return handle

    def _drop_host(self, owner: Contents, ops: list[CacheOp]) -> None:
        ops.append(DropHost(owner.host))
        del self.host[owner.host]
        owner.host = 0
        self.host_bytes_used -= self.num_bytes(owner)

    def num_bytes(self, owner: Contents) -> int:
        """The size of its contents."""
        return self.limits.page_bytes if isinstance(owner, Node) else self.limits.checkpoint_bytes


def position_above(checkpoint: Checkpoint) -> int:
    """Where the nearest checkpoint above on the same path stands; 0: there is none."""
    for node in ancestry(checkpoint.node):
        above = [position for position in node.checkpoints if position < checkpoint.position]
        if above:
            return max(above)
    return 0


def node_score(node: Node) -> float:
    """A page is worth as much as the best of its checkpoints, which leave with it."""
    return max(node.score, *(checkpoint.score for checkpoint in node.checkpoints.values()), 0.0)
