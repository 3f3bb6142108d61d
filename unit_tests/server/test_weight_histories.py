"""Any history of requests, steps, pauses and weight updates with drafts: nothing is lost, and no version reuses what
another has computed."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from server.control import PAUSE_MODES
from server.messages import SamplingParams
from server.router.prefix_tree import Node
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.commands import Client, pause, resume, update_from
from unit_tests.server.engines import assert_nothing_left, generate, make_engine

NUM_HISTORIES = 200
BASE = list(range(40, 140))
PARAMS = (
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1, seed=5, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=25, max_draft=1, ignore_eos=True),
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one shape."""
    root = tmp_path_factory.mktemp("histories")
    return [make_checkpoint(root / str(seed), num_layers=4, close_draft=True, seed=seed) for seed in (0, 1)]


class Histories:
    """An engine, what it was asked, and which checkpoint is behind each version."""

    def __init__(self, checkpoints: list[Path], **settings: Any):
        sizes = {"mtp_step": 3, "max_model_len": 160, "max_running_requests": 4, "chunked_prefill_size": 40}
        pages = {"page_size": 8, "max_total_tokens": 8 * 44, "prefix_cache": "on", "checkpoint_interval": 32}
        self.engine = make_engine(checkpoints[0], **sizes | pages | settings)
        self.client, self.random = Client(self.engine), random.Random(0)
        self.paths, self.which = checkpoints, {"default": 0}
        self.asked: dict[str, tuple[int, int]] = {}
        self.kept: set[str] = set()  # they ran through an update
        self.num_hits = self.num_whole = self.num_names = 0
        self._plain = [make_engine(path) for path in checkpoints]
        self._watch_ids()
        self._watch_reuse()

    @cache  # noqa: B019  (one object per test)
    def plain_tokens(self, which: int, length: int, params: int) -> list[int]:
        return generate(self._plain[which], [BASE[:length]], PARAMS[params])[0]

    def play(self) -> None:
        """One history, to its end."""
        rules = [self.add, self.add, self.step, self.step, self.abort, self.pause, self.resume, self.update]
        for _ in range(12):
            self.random.choice(rules)()
            self.check_accounts()
        self.client.do(resume())
        self.client.finish()
        assert_nothing_left(self.engine)
        for name, (length, params) in self.asked.items():
            tokens, versions = self.client.tokens[name], self.client.versions[name]
            assert self.client.ends[name] in ("length", "abort")
            if len(set(versions)) == 1 and self.client.ends[name] == "length" and name not in self.kept:
                self.num_whole += 1
                assert tokens == self.plain_tokens(self.which[versions[0]], length, params)
        self.asked.clear()

    def add(self) -> None:
        length, params, name = self.random.choice([1, 30, 65, 100]), self.random.randrange(3), str(self.num_names)
        self.num_names += 1
        self.asked[name] = length, params
        self.client.add(name, BASE[:length], PARAMS[params])

    def step(self) -> None:
        self.client.step(self.random.randrange(1, 5))

    def abort(self) -> None:
        running = [name for name in self.asked if name not in self.client.ends]
        if running:
            name = self.random.choice(running)
            self.engine.abort(name)
            del self.asked[name]

    def pause(self) -> None:
        self.client.send(pause(self.random.choice(PAUSE_MODES)))
        self.client.step()

    def resume(self) -> None:
        self.client.do(resume())

    def update(self) -> None:
        which, mode, is_paused = (
            self.random.randrange(2),
            self.random.choice(PAUSE_MODES),
            self.engine.controls.is_paused,
        )
        begun, before = {name for name in self.asked if name not in self.client.ends}, self.engine.stats()
        command = update_from(self.paths[which], in_flight=mode)
        self.client.send(command)
        done = self.client.await_done(command.control_id)
        if done.error:
            assert done.kind == "Conflict" and mode == "wait" and is_paused
            assert self.engine.stats().num_weight_updates == before.num_weight_updates
            return
        self.which[self.engine.stats().weight_version] = which
        self.kept |= {request.id for request in self.engine.scheduler.running} & begun

    def check_accounts(self) -> None:
        scheduler = self.engine.scheduler
        scheduler.cache.check(list(scheduler.holdings.values()))
        rows = [request.row for request in scheduler.running]
        assert len(set(rows)) == len(rows) == scheduler.rows.count - scheduler.rows.num_free

    def _watch_ids(self) -> None:
        run_pass, table = self.engine._run_pass, self.engine.runner.table

        def run(batches: Any) -> Any:
            for work in (work for batch in batches if batch.is_verify for work in batch.works):
                assert all(0 <= token < table.vocab_size for token in table.next_ids[work.row, : work.num_tokens])
            return run_pass(batches)

        self.engine._run_pass = run  # type: ignore[method-assign]

    def _watch_reuse(self) -> None:
        """Nodes of the prefix tree belong to the number of updates at which they were made."""
        cache, made = self.engine.scheduler.cache, dict[Node, int]()
        add_node, lend = cache._tree.add_node, cache._lend

        def add(parent: Node, key: tuple[int, ...]) -> Node:
            node = add_node(parent, key)
            made[node] = self.engine.controls.versions.num_updates
            return node

        def check(match: Any, *args: Any) -> Any:
            assert {made[node] for node in match.nodes} <= {self.engine.controls.versions.num_updates}
            self.num_hits += 1
            return lend(match, *args)

        cache._tree.add_node = add  # type: ignore[method-assign]
        cache._lend = check  # type: ignore[method-assign]


def run_histories(checkpoints: list[Path], count: int, **settings: Any) -> Histories:
    histories = Histories(checkpoints, **settings)
    for _ in range(count):
        histories.play()
    histories.engine.lane.close()
    return histories


def test_nothing_is_lost_in_a_few_histories(checkpoints: list[Path]) -> None:
    run_histories(checkpoints, 8)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_nothing_is_lost_in_many_histories(checkpoints: list[Path], overlap: str) -> None:
    histories = run_histories(checkpoints, NUM_HISTORIES, overlap=overlap, host_cache_bytes=2**20)
    assert histories.num_hits > 50 and histories.num_whole > 150
    assert histories.engine.stats().num_weight_updates > 200
    assert histories.engine.stats().num_proposed > 1000
