from server.router import prefix_tree
from server.router.prefix_tree import Node, PrefixTree, ancestry, subtree, usable

TOKENS = list(range(10, 30))


def grow(tree: PrefixTree, token_ids: list[int], salt: str = "", page: int = 1) -> list[Node]:
    """The path of the tokens, every node with a page."""
    nodes = [tree.root(salt)]
    for start in range(0, len(token_ids), tree.page_size):
        key = tuple(token_ids[start : start + tree.page_size])
        node = nodes[-1].children.get(key) or tree.add_node(nodes[-1], key)
        node.page = page
        nodes.append(node)
    return nodes[1:]


def test_a_walk_finds_the_deepest_checkpoint_that_leaves_a_token_to_compute() -> None:
    tree = PrefixTree(4)
    nodes = grow(tree, TOKENS[:12])
    tree.add_checkpoint(nodes[1], 8)
    tree.add_checkpoint(nodes[2], 12)
    assert tree.find(TOKENS[:13], "", 1).position == 12
    match = tree.find(TOKENS[:12], "", 1)
    assert (match.position, match.shared_len, match.nodes) == (8, 11, tuple(nodes[:2]))


def test_checkpoints_of_pages_that_are_shared_in_part_count_up_to_where_the_prompt_branches_off() -> None:
    tree = PrefixTree(4)
    nodes = grow(tree, TOKENS[:8])
    tree.add_checkpoint(nodes[1], 6)
    tree.add_checkpoint(nodes[1], 7)
    match = tree.find([*TOKENS[:6], 99, 99, 99], "", 1)
    assert (match.position, match.shared_len, match.nodes) == (6, 6, tuple(nodes))


def test_a_leaf_beside_the_path_is_found_when_nothing_deeper_has_a_checkpoint() -> None:
    tree = PrefixTree(4)
    grow(tree, TOKENS[:16])
    leaf = grow(tree, TOKENS[:6])[-1]
    tree.add_checkpoint(leaf, 6)
    match = tree.find(TOKENS, "", 1)
    assert (match.position, match.nodes[-1], match.shared_len) == (6, leaf, 16)


def test_what_the_coming_pass_writes_is_not_found() -> None:
    tree = PrefixTree(4)
    nodes = grow(tree, TOKENS[:8])
    for node in nodes:
        tree.add_checkpoint(node, node.end)
    nodes[1].checkpoints[8].written_in = 5
    assert tree.find(TOKENS, "", 5).position == 4
    assert tree.find(TOKENS, "", 6).position == 8
    nodes[0].written_in = 6
    assert tree.find(TOKENS, "", 6).position == 0
    assert list(usable(nodes[1], 8, 5)) == [] and len(list(usable(nodes[1], 8, 6))) == 1


def test_a_removed_page_or_checkpoint_is_remembered_until_it_is_back() -> None:
    tree = PrefixTree(4)
    nodes = grow(tree, TOKENS[:8])
    checkpoint = tree.add_checkpoint(nodes[0], 4)
    assert tree.find([1, 2, 3], "", 1).reason == "unseen"
    tree.remove_checkpoint(checkpoint)
    assert tree.find(TOKENS, "", 1).reason == "evicted"
    tree.add_checkpoint(nodes[0], 4).written_in = 9
    assert tree.find(TOKENS, "", 1).reason == "no checkpoint"
    nodes[1].page = 0
    tree.remove_node(nodes[1])
    assert tree.find(TOKENS, "", 1).reason == "evicted"


def test_only_so_many_ghosts_are_remembered(monkeypatch) -> None:
    monkeypatch.setattr(prefix_tree, "MAX_GHOSTS", 2)
    tree = PrefixTree(1)
    for token_id in (1, 2, 3):
        node = tree.add_node(tree.root(""), (token_id,))
        tree.remove_node(node)
    assert [tree.find([token_id, 9], "", 1).reason for token_id in (1, 2, 3)] == ["unseen", "evicted", "evicted"]


def test_salts_have_trees_of_their_own_and_an_empty_one_goes() -> None:
    tree = PrefixTree(4)
    tree.add_checkpoint(grow(tree, TOKENS[:4], "a")[0], 4)
    assert tree.find(TOKENS, "a", 1).position == 4
    assert tree.find(TOKENS, "b", 1).reason == "salt"
    assert tree.find(TOKENS[:2], "b", 1).reason == "salt"  # less than a page
    assert tree.find([*TOKENS[:3], 99, 99], "b", 1).reason == "unseen"
    node = grow(tree, TOKENS[:4], "c")[0]
    node.page = 0
    tree.remove_node(node)
    assert list(tree.roots) == ["a"]


def test_every_node_counts_the_checkpoints_below_it() -> None:
    tree = PrefixTree(4)
    nodes = grow(tree, TOKENS[:12])
    deep = tree.add_checkpoint(nodes[2], 11)
    tree.add_checkpoint(nodes[0], 4)
    assert [node.num_checkpoints for node in nodes] == [2, 1, 1]
    tree.remove_checkpoint(deep)
    assert [node.num_checkpoints for node in nodes] == [1, 0, 0]
    assert list(ancestry(nodes[1])) == [nodes[1], nodes[0], tree.root("")]


def test_trees_may_be_deeper_than_the_interpreter_recurses() -> None:
    tree = PrefixTree(1)
    nodes = grow(tree, list(range(3000)))
    tree.add_checkpoint(nodes[-1], 3000)
    assert tree.find(list(range(3001)), "", 1).position == 3000
    assert len(list(subtree(tree.root("")))) == 3001 == len(list(tree.nodes())) + 1
    tree.clear()
    assert not list(tree.nodes()) and tree.find([0, 1], "", 1).reason == "unseen"
