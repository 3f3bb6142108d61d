"""Any history of requests, aborts, evictions, preemptions, pauses and flushes: the accounts balance after every single
operation, and every request that ends has the tokens of plain decoding."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from server.engine import Engine
from server.messages import Failed, Generate, SamplingParams, TokenOutput
from server.router.planner import SpeculationState
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.engines import assert_nothing_left, generate, make_engine

NUM_HISTORIES, NUM_OPERATIONS = 50, 200
BASE = [list(range(40, 40 + 97)), list(range(200, 71, -1))]
PARAMS = (
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1, seed=5, max_tokens=9, ignore_eos=True, repetition_penalty=1.2),
    SamplingParams(temperature=0, max_tokens=30, max_draft=0),
    SamplingParams(temperature=0.7, seed=1, max_tokens=20, max_draft=1, min_tokens=4),
)


@cache
def checkpoint() -> Path:
    return make_checkpoint(Path(tempfile.mkdtemp(prefix="tandem-")), num_layers=4, close_draft=True)


@cache
def plain_engine() -> Engine:
    return make_engine(checkpoint())


@cache
def plain_tokens(prompt: tuple[int, ...], params_index: int) -> list[int]:
    return generate(plain_engine(), [list(prompt)], PARAMS[params_index])[0]


class Histories(RuleBasedStateMachine):
    """The engine under test, and what its clients have received."""

    @initialize(
        mtp_step=st.sampled_from([0, 1, 3]),
        overlap=st.sampled_from(["on", "off"]),
        host=st.sampled_from([0, 2**18, 2**30]),
        pages=st.sampled_from([30, 44, 90]),
    )
    def start(self, mtp_step: int, overlap: str, host: int, pages: int) -> None:
        self.engine = make_engine(
            checkpoint(),
            mtp_step=mtp_step,
            overlap=overlap,
            prefix_cache="on",
            host_cache_bytes=host,
            max_model_len=160,
            max_running_requests=4,
            chunked_prefill_size=40,
            checkpoint_interval=32,
            page_size=8,
            max_total_tokens=8 * pages,
        )
        self.depths: list[int] = [mtp_step]
        self.engine.scheduler.planner.plan = self.choose_depths  # type: ignore[method-assign]
        self.asked: dict[str, tuple[tuple[int, ...], int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.num_asked = 0

    def choose_depths(self, states: list[SpeculationState]) -> list[int]:
        return [min(self.depths[index % len(self.depths)], state.max_draft) for index, state in enumerate(states)]

    def receive(self, outputs: list[TokenOutput | Failed]) -> None:
        for output in outputs:
            assert isinstance(output, TokenOutput)
            tokens = self.tokens[output.request_id]
            tokens += output.token_ids
            expected = plain_tokens(*self.asked[output.request_id])
            assert tokens == expected[: len(tokens)]
            if output.finish_reason is not None:
                assert tokens == expected
                self.forget(output.request_id)

    def forget(self, name: str) -> None:
        del self.asked[name], self.tokens[name]

    @rule(
        base=st.integers(0, 1),
        length=st.sampled_from([1, 30, 64, 65, 90, 97]),
        tail=st.lists(st.integers(0, 3), max_size=3),
        params_index=st.integers(0, len(PARAMS) - 1),
        priority=st.integers(0, 1),
        salt=st.sampled_from(["", "", "a"]),
    )
    def add(self, base: int, length: int, tail: list[int], params_index: int, priority: int, salt: str) -> None:
        if len(self.asked) >= 12:
            return
        prompt, name = (*BASE[base][:length], *tail), str(self.num_asked)
        self.num_asked += 1
        self.asked[name], self.tokens[name] = (prompt, params_index), []
        self.engine.add(Generate(name, list(prompt), PARAMS[params_index], priority=priority, cache_salt=salt))

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.receive(self.engine.step())
            self.check_accounts()

    @rule(which=st.integers(0, 11))
    def abort(self, which: int) -> None:
        if self.asked:
            name = list(self.asked)[which % len(self.asked)]
            self.engine.abort(name)
            self.forget(name)

    @rule(depths=st.lists(st.integers(0, 3), min_size=1, max_size=4))
    def change_depths(self, depths: list[int]) -> None:
        self.depths = depths

    @rule(which=st.integers(0, 3))
    def preempt(self, which: int) -> None:
        running = self.engine.scheduler.running
        if running:
            self.engine.scheduler._preempt(running[which % len(running)])

    @rule(count=st.integers(1, 60))
    def evict(self, count: int) -> None:
        scheduler = self.engine.scheduler
        most = scheduler.pages.num_free + scheduler.cache.num_evictable
        assert scheduler.cache.free_pages(min(count, most), scheduler._before)

    @rule()
    def pause(self) -> None:
        """Nothing is planned for a while; what was under way arrives."""
        self.receive(self.engine.drain())

    @rule()
    def flush(self) -> None:
        self.engine.flush_cache()

    @rule()
    def finish(self) -> None:
        while self.engine.has_work():
            self.receive(self.engine.step())
        assert not self.asked
        assert_nothing_left(self.engine)

    @invariant()
    def check_accounts(self) -> None:
        if hasattr(self, "engine"):
            scheduler = self.engine.scheduler
            scheduler.cache.check(list(scheduler.holdings.values()))
            rows = [request.row for request in scheduler.running]
            assert len(set(rows)) == len(rows) == scheduler.rows.count - scheduler.rows.num_free
            assert {request.id for request in (*scheduler.running, *scheduler.waiting)} <= set(self.asked)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.finish()
            self.engine.lane.close()


def run_histories(**limits: Any) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Histories,
        settings=settings(deadline=None, derandomize=True, database=None, suppress_health_check=checks, **limits),
    )


def test_accounts_balance_and_tokens_are_right_in_a_few_histories() -> None:
    run_histories(max_examples=4, stateful_step_count=60)


@pytest.mark.slow
def test_accounts_balance_and_tokens_are_right_over_ten_thousand_operations() -> None:
    assert NUM_HISTORIES * NUM_OPERATIONS >= 10_000
    run_histories(max_examples=NUM_HISTORIES, stateful_step_count=NUM_OPERATIONS)
