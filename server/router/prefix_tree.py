"""The shape of the prefix cache: a radix tree over KV pages with GDN checkpoints on it, one tree per cache salt.

A prefix can be reused up to position c where the tree holds the pages of tokens 0..c-1 and a checkpoint at exactly c.
Knows token ids and who follows whom; neither pools nor the device, nor what is worth keeping.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

MAX_GHOSTS = 65536


@dataclass(eq=False, slots=True, repr=False)
class Checkpoint:
    """The recurrent state after `position` tokens: in device slot `slot` or host entry `host` (0: not there).

    The pass of step `written_in` writes it; earlier it must be neither read nor evicted. `touched` orders by last use.
    """

    node: "Node"
    position: int
    slot: int = 0
    host: int = 0
    written_in: int = 0
    score: float = 0.0
    touched: int = 0

    @property
    def is_there(self) -> bool:
        """It has contents and is part of the tree."""
        return bool(self.slot or self.host) and self.node.is_there


@dataclass(eq=False, slots=True, repr=False)
class Node:
    """One page of tokens `key` (fewer than a page: a leaf) from position `start` on; `page` or `host` is 0: not there.

    Ancestors of a node on the device are on the device, and ancestors of a node in use are in use. `num_users` are
    requests that hold the page; `num_checkpoints` counts those in the whole subtree. `order` is its valid place in the
    eviction heap. An orphan has left the tree and lives until its last user goes.
    """

    key: tuple[int, ...]
    parent: "Node | None"
    start: int
    path_hash: int
    page: int = 0
    host: int = 0
    num_users: int = 0
    num_device_children: int = 0
    num_checkpoints: int = 0
    written_in: int = 0
    score: float = 0.0
    touched: int = 0
    order: tuple[bool, float, int] | None = None
    is_orphan: bool = False
    children: "dict[tuple[int, ...], Node]" = field(default_factory=dict)
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.start + len(self.key)

    @property
    def is_there(self) -> bool:
        """It has contents and is part of the tree."""
        return bool(self.page or self.host) and not self.is_orphan

    def shared_len(self, token_ids: list[int]) -> int:
        """How many tokens of the key the prompt has at the same positions."""
        if self.key[:1] != tuple(token_ids[self.start : self.start + 1]):
            return 0  # as nearly all children of a prefix that many share
        count = 0
        for mine, theirs in zip(self.key, token_ids[self.start : self.end], strict=False):
            if mine != theirs:
                break
            count += 1
        return count


Contents = Node | Checkpoint


@dataclass(frozen=True, eq=False)
class Match:
    """What the tree has of a prompt: reusable up to `position` (0: nothing, for `reason`).

    `nodes` cover tokens 0..position-1, the last perhaps in part; `checkpoint` stands at `position`. `shared_len` tokens
    are covered by pages of the tree, checkpoint or not.
    """

    salt: str
    position: int = 0
    nodes: tuple[Node, ...] = ()
    checkpoint: Checkpoint | None = None
    shared_len: int = 0
    reason: str = ""

    @property
    def contents(self) -> list[Contents]:
        """All that must be there for the match to hold."""
        return [*self.nodes, *([self.checkpoint] if self.checkpoint else [])]


class PrefixTree:
    """Nodes and checkpoints by salt, and a bounded memory (`ghosts`) of what was there once."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.roots: dict[str, Node] = {}
        self._salts: dict[Node, str] = {}
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def root(self, salt: str) -> Node:
        """The root of `salt`, made when there is none."""
        if salt not in self.roots:
            self.roots[salt] = Node((), None, 0, hash(salt))
            self._salts[self.roots[salt]] = salt
        return self.roots[salt]

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots, parents first."""
        for root in self.roots.values():
            yield from list(subtree(root))[1:]

    def add_node(self, parent: Node, key: tuple[int, ...]) -> Node:
        """A new node without contents."""
        assert key not in parent.children and len(parent.key) in (0, self.page_size)
        node = Node(key, parent, parent.end, hash((parent.path_hash, key)))
        parent.children[key] = node
        self._ghosts.pop(node.path_hash, None)
        return node

    def remove_node(self, node: Node) -> None:
        """Take out a node that has neither contents nor children nor checkpoints, and remember it."""
        assert node.parent and not (node.page or node.host or node.children or node.checkpoints or node.num_users)
        del node.parent.children[node.key]
        self._remember(node)
        if node.parent in self._salts and not node.parent.children:
            del self.roots[self._salts.pop(node.parent)]

    def add_checkpoint(self, node: Node, position: int) -> Checkpoint:
        """A new checkpoint without contents."""
        assert node.start < position <= node.end and position not in node.checkpoints
        checkpoint = node.checkpoints[position] = Checkpoint(node, position)
        self._ghosts.pop(node.path_hash, None)
        for above in ancestry(node):
            above.num_checkpoints += 1
        return checkpoint

    def remove_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Take it out and remember that it was there."""
        del checkpoint.node.checkpoints[checkpoint.position]
        self._remember(checkpoint.node)
        for above in ancestry(checkpoint.node):
            above.num_checkpoints -= 1

    def clear(self) -> None:
        """Forget everything, ghosts too."""
        self.roots.clear()
        self._salts.clear()
        self._ghosts.clear()

    def find(self, token_ids: list[int], salt: str, step: int) -> Match:
        """The longest reusable prefix that leaves a token to compute and whose contents are written before `step`."""
        chain = list(self._walk(token_ids, salt))
        last = len(token_ids) - 1
        shared_len = min(last, max((node.start + node.shared_len(token_ids) for node in self._ends(chain)), default=0))
        checkpoint = self._best(chain, token_ids, step)
        if checkpoint is None:
            return Match(salt, shared_len=shared_len, reason=self._reason(chain, token_ids, salt, shared_len))
        depth = checkpoint.node.start // self.page_size
        nodes = (*chain[1 : depth + 1], checkpoint.node)
        return Match(salt, checkpoint.position, nodes, checkpoint, shared_len)

    def _walk(self, token_ids: list[int], salt: str) -> Iterator[Node]:
        """The root (if there is one) and the nodes of whole pages that the prompt has."""
        node = self.roots.get(salt)
        while node is not None:
            yield node
            node = node.children.get(tuple(token_ids[node.end : node.end + self.page_size]))
            if node is not None and len(node.key) < self.page_size:
                return

    @staticmethod
    def _ends(chain: list[Node]) -> list[Node]:
        return [chain[-1], *chain[-1].children.values()] if chain else []

    @staticmethod
    def _best(chain: list[Node], token_ids: list[int], step: int) -> Checkpoint | None:
        """Children of a deeper node have deeper checkpoints: the first level that has any decides."""
        last = len(token_ids) - 1
        for parent in reversed(list(takewhile(lambda node: node.written_in < step, chain))):
            found = [
                checkpoint
                for node in parent.children.values()
                if node.checkpoints and node.written_in < step
                for checkpoint in usable(node, min(last, node.start + node.shared_len(token_ids)), step)
            ]
            if found:
                return max(found, key=lambda each: (each.position, each.node.page > 0, each.slot > 0))
        return None

    def _reason(self, chain: list[Node], token_ids: list[int], salt: str, shared_len: int) -> str:
        parent_hash, start = (chain[-1].path_hash, chain[-1].end) if chain else (hash(salt), 0)
        next_page = tuple(token_ids[start : start + self.page_size])
        tails = (hash((parent_hash, next_page[:count])) for count in range(len(next_page), 0, -1))
        if any(node.path_hash in self._ghosts for node in chain) or any(tail in self._ghosts for tail in tails):
            return "evicted"
        if shared_len:
            return "no checkpoint"
        return "salt" if self._is_under_another_salt(token_ids, salt) else "unseen"

    def _is_under_another_salt(self, token_ids: list[int], salt: str) -> bool:
        first_len = min(self.page_size, len(token_ids))
        return any(
            node.shared_len(token_ids) >= min(first_len, len(node.key))
            for other, root in self.roots.items()
            if other != salt
            for node in root.children.values()
        )

    def _remember(self, node: Node) -> None:
        self._ghosts[node.path_hash] = None
        self._ghosts.move_to_end(node.path_hash)
        if len(self._ghosts) > MAX_GHOSTS:
            self._ghosts.popitem(last=False)


def usable(node: Node, limit: int, step: int) -> Iterator[Checkpoint]:
    """Checkpoints of the node at positions up to `limit` that are written before `step`."""
    return (each for each in node.checkpoints.values() if each.position <= limit and each.written_in < step)


def ancestry(node: Node) -> Iterator[Node]:
    """The node, its parent, ... and the root."""
    above: Node | None = node
    while above is not None:
        yield above
        above = above.parent


def subtree(node: Node) -> Iterator[Node]:
    """The node and all below it, parents first. Not recursive: a tree is as deep as its longest prompt has pages."""
    waiting = [node]
    while waiting:
        below = waiting.pop()
        yield below
        waiting.extend(below.children.values())
