"""Random histories: accounts balance after every operation, contents are what the cache promises, and every match is
the best that a search through the whole tree can find."""

import random

import pytest

from server.router.prefix_tree import Node, ancestry
from unit_tests.server.router.cache_model import PAGE_SIZE, House, Runner, make_limits

NUM_STEPS = 60


class History:
    """One step after the other, with everything that may happen in it in any order."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.house = House(
            make_limits(
                num_pages=self.random.choice([12, 24, 60]),
                num_checkpoints=self.random.choice([1, 3, 8]),
                host_cache_bytes=self.random.choice([0, 7, 30, 1000]),
                page_bytes=2,
                checkpoint_bytes=self.random.choice([1, 3, 9]),
            )
        )
        self.stems = [self.tokens(self.random.randrange(1, 26)) for _ in range(4)]
        self.num_hits = 0

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(3) for _ in range(count)]

    def prompt(self) -> list[int]:
        stem = self.random.choice(self.stems)
        return stem[: self.random.randrange(len(stem) + 1)] + self.tokens(self.random.randrange(8))

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for _ in range(self.random.randrange(6)):
                self.act()
                self.house.check_accounts()
            for runner in self.random.sample(self.house.runners, len(self.house.runners)):
                self.advance(runner)
                self.house.check_accounts()
            if self.random.random() < 0.1:
                self.act()  # after the plan, before the pass
            self.house.run()
        self.end()

    def act(self) -> None:
        chance = self.random.random()
        if chance < 0.5:
            self.admit()
        elif chance < 0.8 and self.house.runners:
            self.house.leave(self.random.choice(self.house.runners), self.random.random() < 0.7)
        elif chance < 0.9:
            self.free_pages()
        elif chance < 0.97:
            self.corrupt()
        elif self.random.random() < 0.3:
            self.house.flush()

    def admit(self) -> None:
        prompt, salt = self.prompt(), self.random.choice(["", "", "s"])
        match = self.house.cache.match(prompt, salt)
        assert match.position == self.best_position(prompt, salt)
        assert match.position <= match.shared_len <= max(0, len(prompt) - 1) and bool(match.reason) != bool(match.nodes)
        self.num_hits += match.position > 0
        runner = self.house.admit(prompt, salt, match)
        if runner.num_computed < match.position:
            assert not runner.holding.num_pages
        self.house.check_accounts()

    def best_position(self, prompt: list[int], salt: str) -> int:
        root, step = self.house.cache._tree.roots.get(salt), self.house.cache._tiers.step
        positions = [
            each.position
            for node in self.house.cache._tree.nodes()
            for each in node.checkpoints.values()
            if list(ancestry(node))[-1] is root and each.written_in < step and each.position < len(prompt)
            if path(node)[: each.position] == prompt[: each.position]
            if all(above.written_in < step for above in ancestry(node))
        ]
        return max(positions, default=0)

    def advance(self, runner: Runner) -> None:
        if runner in [planned for planned, _, _ in self.house.passes] or self.random.random() < 0.2:
            return
        runner.token_ids += self.tokens(max(0, runner.num_computed + 1 - len(runner.token_ids)))
        end = self.random.randrange(runner.num_computed, len(runner.token_ids)) + 1
        page_end = end - end % PAGE_SIZE
        end = page_end if page_end > runner.num_computed and self.random.random() < 0.7 else end
        if self.house.reserve(runner, end):
            self.house.plan(runner, end, self.random.choice(["nothing", "pages", "checkpoint", "checkpoint"]))
        elif runner in self.house.runners:
            self.house.leave(runner)  # preempted

    def free_pages(self) -> None:
        most = self.house.pool.num_free + self.house.cache.num_evictable
        assert not self.house.cache.free_pages(most + 1, self.house.before)
        count = most if self.random.random() < 0.2 else self.random.randrange(most + 1)
        assert self.house.cache.free_pages(count, self.house.before) and self.house.pool.num_free >= count

    def corrupt(self) -> None:
        stored = {*self.house.device.host_pages, *self.house.device.host_states}
        there = sorted(stored & set(self.house.cache._tiers.host))  # not what a request waits for already
        if there:
            handle = self.random.choice(there)
            self.house.device.corrupt(handle)
            self.house.broken.add(handle)

    def end(self) -> None:
        for runner in list(self.house.runners):
            self.house.leave(runner)
        self.house.run()
        cache = self.house.cache
        assert self.house.pool.num_free + cache.num_evictable == self.house.limits.num_pages
        self.house.flush()
        self.house.run()
        assert self.house.pool.num_free == self.house.limits.num_pages and cache.host_bytes_used == 0
        assert cache.num_free_checkpoints == self.house.limits.num_checkpoints
        assert not self.house.device.host_pages and not self.house.device.host_states


def path(node: Node) -> list[int]:
    """Tokens from the root to the end of the node."""
    return [token_id for above in reversed(list(ancestry(node))) for token_id in above.key]


@pytest.mark.parametrize("seed", range(40))
def test_any_history_keeps_accounts_contents_and_promises(seed: int) -> None:
    History(seed).run(NUM_STEPS)


def test_histories_see_everything_that_can_happen() -> None:
    histories = [History(seed) for seed in range(100, 110)]
    for history in histories:
        history.run(NUM_STEPS)
    counters = [history.house.cache.counters for history in histories]
    for name in ("num_evicted_pages", "num_evicted_checkpoints", "num_host_hits", "num_host_refused"):
        assert sum(getattr(each, name) for each in counters) > 5, name
    reasons = {reason for each in counters for reason, count in each.misses.items() if count}
    assert sum(history.num_hits for history in histories) > 50
    assert reasons >= {"too short", "salt", "evicted", "no checkpoint", "unseen", "no room"}
