import itertools
import math
import random
import time
from collections.abc import Callable, Sequence

import pytest

from server.router.cost_table import CostTable
from server.router.planner import MAX_PROBE_INTERVAL, Acceptance, Planner, SpeculationState

BATCHES = (1, 2, 4, 8, 16)
K = 3
# The host hears of a step that many plans later.
LAG = 2


def make_table(mtp_step: int = K, draft: float = 0.15) -> CostTable:
    """Width is nearly free for one request and costs nearly its share for sixteen; the draft head costs by the call."""
    alone, crowd = (1.0, 1.05, 1.1, 1.18, 1.26), (1.0, 1.86, 2.7, 3.42, 4.2)
    verify = {}
    for batch in BATCHES:
        share = math.log2(batch) / 4
        for width in range(1, mtp_step + 2):
            factor = (1 - share) * alone[width - 1] + share * crowd[width - 1]
            verify[batch, width] = (1 + 0.35 * share) * factor
    return CostTable(verify, dict.fromkeys(BATCHES, draft), dict.fromkeys(verify, draft))


def free_table(mtp_step: int) -> CostTable:
    return CostTable({(1, 1): 1.0, (1, mtp_step + 1): 1.0}, {1: 0.0}, {(1, 1): 0.0})


def make_states(estimates: Sequence[Sequence[float]], max_draft: int = K) -> list[SpeculationState]:
    return [SpeculationState(max_draft=max_draft, acceptance=Acceptance(row)) for row in estimates]


def step_seconds(table: CostTable, depths: Sequence[int]) -> float:
    """The cost of a step, written down as the formula says."""
    drafting = [depth for depth in depths if depth]
    chain = sum(table.draft(sum(depth > step for depth in drafting)) for step in range(1, max(depths, default=0)))
    extend = table.extend(len(drafting), len(drafting) + sum(drafting))
    return table.verify(len(depths), len(depths) + sum(depths)) + extend + chain


class Simulation:
    """Requests whose drafts are accepted with given probabilities; results are heard of LAG plans late."""

    def __init__(self, planner: Planner, table: CostTable, batch: int, seed: int = 0, load: float = 1.0):
        self.planner, self.table, self.load, self.random = planner, table, load, random.Random(seed)
        self.states = [SpeculationState(max_draft=planner.mtp_step) for _ in range(batch)]
        self.depths: list[list[int]] = []
        self.seconds = 0.0
        self.num_tokens = 0
        self._in_flight: list[list[int]] = []

    def run(self, num_steps: int, probability: Callable[[int], float]) -> list[list[int]]:
        """The depths of each step; probability(i) is that of a draft of request i."""
        start = len(self.depths)
        for _ in range(num_steps):
            self._step(probability)
        return self.depths[start:]

    def _step(self, probability: Callable[[int], float]) -> None:
        depths = self.planner.plan(self.states)
        accepted = [self._num_accepted(depth, probability(index)) for index, depth in enumerate(depths)]
        seconds = self.load * step_seconds(self.table, depths)
        self.planner.record_step([depth + 1 for depth in depths], depths, len(depths) + sum(accepted), seconds)
        self.seconds += seconds
        self.num_tokens += len(depths) + sum(accepted)
        self.depths.append(depths)
        self._in_flight.append(accepted)
        if len(self._in_flight) > LAG:
            self._hear(self.depths[-1 - LAG], self._in_flight.pop(0))

    def _num_accepted(self, depth: int, probability: float) -> int:
        return next((index for index in range(depth) if self.random.random() >= probability), depth)

    def _hear(self, depths: list[int], accepted: list[int]) -> None:
        for state, depth, num_accepted in zip(self.states, depths, accepted, strict=True):
            if depth:
                self.planner.observe(state, depth, num_accepted)


def simulate(batch: int, seed: int = 0, table: CostTable | None = None) -> Simulation:
    table = table or make_table()
    return Simulation(Planner(K, table, is_adaptive=True), table, batch, seed)


# The cost table.


def test_costs_are_linear_between_samples_and_beyond_them() -> None:
    verify = {(batch, width): 1.0 + 2 * batch + 3 * width + batch * width for batch in (1, 4) for width in (1, 3)}
    table = CostTable(verify, {1: 1.0, 3: 2.0}, verify)
    for batch, num_rows in ((1, 1), (2, 3), (3, 6), (4, 9), (8, 40)):
        width = num_rows / batch
        expected = 1.0 + 2 * batch + 3 * width + num_rows
        assert table.verify(batch, num_rows) == pytest.approx(expected)
        assert table.extend(batch, num_rows) == pytest.approx(expected)
    assert [table.draft(batch) for batch in (0, 1, 2, 3, 5)] == pytest.approx([0, 1.0, 1.5, 2.0, 3.0])
    assert table.extend(0, 0) == 0


def test_costs_are_never_negative() -> None:
    falling = {(batch, width): 1.0 / batch for batch in (1, 2) for width in (1, 2)}
    table = CostTable(falling, {1: 1.0, 2: 0.5}, falling)
    assert table.verify(9, 9) == table.extend(9, 9) == table.draft(9) == 0


def test_a_single_sample_stands_for_all() -> None:
    table = CostTable({(1, 1): 2.0}, {1: 0.5}, {(1, 1): 1.0})
    assert (table.verify(3, 9), table.draft(7), table.extend(2, 2)) == (2.0, 0.5, 1.0)


def test_noisy_samples_become_monotone_and_stay_close() -> None:
    rng = random.Random(0)
    true = make_table()
    noisy = {key: seconds * rng.uniform(0.9, 1.1) for key, seconds in true.verify_seconds.items()}
    table = CostTable.from_samples(noisy, {1: 2.0, 2: 1.0, 4: 3.0}, noisy)
    for batch, width in noisy:
        assert table.verify_seconds[batch, width] == pytest.approx(true.verify_seconds[batch, width], rel=0.1)
        assert table.verify_seconds[batch, width] <= table.verify_seconds.get((2 * batch, width), math.inf)
        assert table.verify_seconds[batch, width] <= table.verify_seconds.get((batch, width + 1), math.inf)
    assert table.draft_seconds == {1: 1.5, 2: 1.5, 4: 3.0}


def test_monotone_samples_stay_as_they_are() -> None:
    table = make_table()
    assert CostTable.from_samples(table.verify_seconds, table.draft_seconds, table.extend_seconds) == table


def test_a_grid_with_holes_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="holes"):
        CostTable({(1, 1): 1.0, (2, 2): 1.0}, {1: 1.0}, {(1, 1): 1.0}).verify(1, 1)


# What is learned from results.


def test_a_new_request_starts_from_what_the_server_has_seen() -> None:
    planner = Planner(K, make_table(), is_adaptive=True)
    old, new = SpeculationState(max_draft=K), SpeculationState(max_draft=K)
    for _ in range(300):
        planner.observe(old, 1, 0)
    planner.plan([new])
    assert new.acceptance is not None and new.acceptance.estimates == pytest.approx([0.03, 0.7, 0.7], abs=0.02)


# The choice of depths.


@pytest.mark.parametrize(("costs", "is_adaptive"), [(None, True), (make_table(), False)])
def test_without_costs_or_when_fixed_everybody_gets_what_is_allowed(costs: CostTable | None, is_adaptive: bool) -> None:
    planner = Planner(K, costs, is_adaptive)
    states = [SpeculationState(max_draft=limit) for limit in (0, 2, 8)]
    for _ in range(3):
        assert planner.plan(states) == [0, 2, 3]
    assert planner.requests_per_depth == [3, 0, 3, 3]


def test_no_requests_and_no_drafts_are_planned_too() -> None:
    assert Planner(K, make_table(), is_adaptive=True).plan([]) == []
    assert Planner(0, make_table(0), is_adaptive=True).plan([SpeculationState(max_draft=5)]) == [0]


def test_drafts_that_cost_more_than_they_give_are_not_proposed() -> None:
    planner = Planner(K, make_table(draft=2.0), is_adaptive=True)
    assert planner.plan(make_states([[0.9] * K])) == [0]


def test_drafts_that_are_free_and_accepted_are_all_proposed() -> None:
    planner = Planner(8, free_table(8), is_adaptive=True)
    assert planner.plan(make_states([[0.9] * 8, [0.6] * 8], max_draft=8)) == [8, 8]


def test_drafts_pay_where_the_host_takes_long_between_steps() -> None:
    costs = CostTable({(4, 1): 1.0, (4, 4): 3.4}, {4: 0.2}, {(4, 1): 0.2, (4, 4): 0.2})
    planner, states = Planner(K, costs, is_adaptive=True), make_states([[0.95] * 3] * 4)
    assert planner.plan(states) == [0] * 4
    for _ in range(100):
        planner.record_overhead(1.0)
    assert [planner.plan(states) for _ in range(5)][-1] == [3] * 4
    for _ in range(200):
        planner.record_overhead(-0.1)
    assert planner.plan(states) == [0] * 4


def test_nobody_gets_more_than_allowed() -> None:
    planner = Planner(K, free_table(K), is_adaptive=True)
    states = make_states([[0.9] * K] * 4)
    for state, limit in zip(states, (0, 1, 2, 99), strict=True):
        state.max_draft = limit
    assert planner.plan(states) == [0, 1, 2, 3]


def test_in_one_batch_predictable_requests_get_drafts_and_others_none() -> None:
    planner = Planner(K, make_table(), is_adaptive=True)
    assert planner.plan(make_states([[0.98] * K, [0.05] * K, [0.98] * K, [0.05] * K])) == [K, 0, K, 0]


def test_a_lone_request_gets_drafts_where_a_crowd_gets_none() -> None:
    planner = Planner(K, make_table(), is_adaptive=True)
    assert planner.plan(make_states([[0.7] * K]))[0] > 0
    assert planner.plan(make_states([[0.7] * K] * 16)) == [0] * 16


def random_instance(rng: random.Random) -> tuple[CostTable, list[list[float]]]:
    """At most three requests, with per-row and per-call costs of any proportion."""
    per_row, per_draft, per_call = rng.uniform(0, 0.5), rng.uniform(0, 0.1), rng.uniform(0, 0.3)
    grid = list(itertools.product((1, 2, 4), range(1, K + 2)))
    verify = {(batch, width): 1 + per_row * batch * (width - 1) ** rng.uniform(0.8, 1.2) for batch, width in grid}
    draft = {batch: per_call + per_draft * batch for batch in (1, 2, 4)}
    extend = {(batch, width): per_call + per_draft * batch * width for batch, width in grid}
    return CostTable.from_samples(verify, draft, extend), [
        [rng.random() ** 0.5 for _ in range(K)] for _ in range(rng.randint(1, 3))
    ]


def test_the_choice_is_within_one_percent_of_the_best() -> None:
    rng = random.Random(1)
    for _ in range(150):
        table, estimates = random_instance(rng)
        states = make_states(estimates)

        def rate(depths: Sequence[int]) -> float:
            drafts = [math.prod(row[: j + 1]) for row, d in zip(estimates, depths, strict=True) for j in range(d)]  # noqa: B023
            return (len(depths) + sum(drafts)) / step_seconds(table, depths)  # noqa: B023

        best = max(rate(depths) for depths in itertools.product(range(K + 1), repeat=len(states)))
        assert rate(Planner(K, table, is_adaptive=True).plan(states)) >= 0.99 * best


def test_a_plan_is_made_in_little_time() -> None:
    planner = Planner(4, make_table(4), is_adaptive=True)
    states = make_states([[0.3 + 0.04 * index] * 4 for index in range(16)], max_draft=4)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        planner.plan(states)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 5e-3


# Over many steps.


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("probability", [0.0, 0.3, 0.6, 0.95])
def test_adaptive_is_hardly_slower_than_the_best_fixed_depth(batch: int, probability: float) -> None:
    table = make_table()
    fixed = [
        step_seconds(table, [depth] * batch) / (batch * sum(probability**j for j in range(depth + 1)))
        for depth in range(K + 1)
    ]
    runs = [simulate(batch, seed, table) for seed in range(10 if batch == 1 else 1)]
    for simulation in runs:
        simulation.run(3000 if batch == 1 else 800, lambda index: probability)
    assert sum(run.seconds for run in runs) <= 1.03 * min(fixed) * sum(run.num_tokens for run in runs)


def test_a_mixed_batch_is_served_better_than_by_any_fixed_depth() -> None:
    table = make_table()
    adaptive = simulate(4, table=table)
    adaptive.run(1500, lambda index: 0.95 if index < 2 else 0.1)
    for depth in range(K + 1):
        per_step = sum(p**j for p in (0.95, 0.95, 0.1, 0.1) for j in range(depth + 1))
        assert adaptive.seconds / adaptive.num_tokens < step_seconds(table, [depth] * 4) / per_step


@pytest.mark.parametrize("seed", range(4))
def test_a_request_that_turns_unpredictable_loses_its_drafts_and_gets_them_back(seed: int) -> None:
    simulation = simulate(1, seed)
    assert simulation.run(300, lambda index: 0.95)[-1] == [K]
    gone = simulation.run(600, lambda index: 0.0)
    assert [0] in gone[:30]
    back = simulation.run(2 * MAX_PROBE_INTERVAL + 40, lambda index: 0.95)
    assert [K] in back


def test_a_position_that_was_refused_is_tried_again_behind_those_that_pay() -> None:
    planner = Planner(K, make_table(), is_adaptive=True)
    states = make_states([[0.95, 0.95, 0.05]])
    depths = []
    for _ in range(300):
        depths += planner.plan(states)
        planner.observe(states[0], depths[-1], depths[-1])
    assert depths[0] == 2 and [depth for depth in depths[-100:] if depth] == [3] * depths[-100:].count(3)
    assert depths[-100:].count(3) >= 96


def test_a_hopeless_request_is_hardly_ever_probed() -> None:
    depths = simulate(1).run(3000, lambda index: 0.0)
    assert sum(depth != [0] for depth in depths) < 0.03 * len(depths)


def test_requests_of_a_batch_are_probed_together() -> None:
    depths = simulate(4).run(2000, lambda index: 0.0)[200:]
    probes = [step for step in depths if any(step)]
    assert probes and all(all(step) for step in probes)


def test_what_would_not_pay_if_all_were_right_is_tried_for_its_cost_alone() -> None:
    table = make_table(draft=5.0)
    simulation = simulate(1, table=table)
    depths = simulation.run(3000, lambda index: 1.0)
    assert 0 < sum(depth != [0] for depth in depths) <= 10
    assert simulation.num_tokens / simulation.seconds > 0.985 / table.verify(1, 1)


@pytest.mark.parametrize("error", [0.2, 5.0, 20.0])
def test_a_table_that_was_measured_on_a_busy_machine_is_found_out(error: float) -> None:
    """Drafts seem to cost many times what they do, or a fifth of it."""
    for probability, draft, best in ((0.9, 0.15, [K]), (0.5, 0.9, [0])):
        truth, wrong = make_table(draft=draft), make_table(draft=draft * error)
        simulation = Simulation(Planner(K, wrong, is_adaptive=True), truth, batch=1)
        simulation.run(1000, lambda index, probability=probability: probability)
        depths = simulation.run(500, lambda index, probability=probability: probability)
        assert sum(depth == best for depth in depths) > 400


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("error", [1.0, 2.0, 3.0])
def test_a_machine_that_was_slow_when_it_was_measured_is_found_out_by_plain_steps(error: float, batch: int) -> None:
    """Plain steps seem so dear that drafts pay, and then there are none that tell. Where they do pay, plain steps that
    are tried for what they take cost next to nothing."""
    truth = make_table()
    verify = {key: seconds * error for key, seconds in truth.verify_seconds.items()}
    wrong = CostTable(verify, truth.draft_seconds, truth.extend_seconds)
    for probability in (0.3, 0.95):
        simulation = Simulation(Planner(K, wrong, is_adaptive=True), truth, batch)
        simulation.run(500, lambda _, probability=probability: probability)
        start = simulation.num_tokens, simulation.seconds
        simulation.run(1000, lambda _, probability=probability: probability)
        speed = (simulation.num_tokens - start[0]) / (simulation.seconds - start[1])
        gains = [sum(probability**j for j in range(depth + 1)) for depth in range(K + 1)]
        fixed = [batch * gain / step_seconds(truth, [depth] * batch) for depth, gain in enumerate(gains)]
        assert speed > 0.96 * max(fixed)


@pytest.mark.parametrize(("load", "probability"), [(1.4, 0.85), (2.0, 0.6)])
def test_a_machine_that_gets_slower_is_found_out_soon(load: float, probability: float) -> None:
    """What seems to be dearer drafts, while there are no plain steps, is all of it."""
    simulation = simulate(1)
    simulation.run(1000, lambda _: probability)
    simulation.load = load
    simulation.run(200, lambda _: probability)
    assert simulation.planner.plain_factor == pytest.approx(load, rel=0.06)
    depths = simulation.run(400, lambda _: probability)
    assert sum(depth[0] > 0 for depth in depths) > 360


def test_a_plain_step_is_tried_after_one_that_verifies_what_was_drafted_before() -> None:
    depths = simulate(1).run(3000, lambda _: 1.0)
    runs = [
        len(list(group)) for is_plain, group in itertools.groupby(depths, key=lambda depth: depth == [0]) if is_plain
    ]
    assert runs == [2] * len(runs) and 8 <= len(runs) <= 12


def test_drafts_that_were_dear_for_a_while_come_back() -> None:
    table, busy = make_table(), make_table(draft=4.0)
    simulation = Simulation(Planner(K, table, is_adaptive=True), table, batch=1)
    assert simulation.run(300, lambda index: 0.9)[-1] == [K]
    simulation.table = busy
    assert sum(depth == [0] for depth in simulation.run(500, lambda index: 0.9)) > 300
    simulation.table = table
    simulation.run(1500, lambda index: 0.9)
    assert sum(depth == [K] for depth in simulation.run(300, lambda index: 0.9)) > 250


# What speculation gains.


def test_gains_are_one_before_anything_is_known() -> None:
    for costs in (None, make_table()):
        planner = Planner(K, costs, is_adaptive=True)
        assert planner.predicted_gain == planner.measured_gain == 1.0
    planner = Planner(K, None, is_adaptive=True)
    planner.plan([SpeculationState(max_draft=K)])
    planner.record_step([4], [3], 4, 0.1)
    assert planner.predicted_gain == planner.measured_gain == 1.0


@pytest.mark.parametrize("load", [1.0, 2.5])
def test_gains_say_what_plain_decoding_would_need_on_the_machine_as_it_is(load: float) -> None:
    table = make_table()
    simulation = Simulation(Planner(K, table, is_adaptive=True), table, batch=1, load=load)
    simulation.run(1500, lambda index: 0.95)
    planner, plain = simulation.planner, table.verify(1, 1)
    gain = plain / step_seconds(table, [K]) * sum(0.95**j for j in range(K + 1))
    assert planner.predicted_gain == pytest.approx(gain, rel=0.1)
    assert planner.measured_gain == pytest.approx(gain, rel=0.1)
    assert planner.plain_factor == pytest.approx(load, rel=0.02)


def test_drafts_that_never_help_show_as_a_loss() -> None:
    table = make_table()
    simulation = Simulation(Planner(K, table, is_adaptive=False), table, batch=1)
    simulation.run(500, lambda index: 0.0)
    loss = table.verify(1, 1) / step_seconds(table, [K])
    assert simulation.planner.measured_gain == pytest.approx(loss, rel=0.01)


def test_one_step_that_took_very_long_does_not_change_the_load_much() -> None:
    planner = Planner(K, make_table(), is_adaptive=True)
    planner.record_step([1], [0], 1, 1000.0)
    assert planner.plain_factor < 1.5


def test_different_depths_are_given_only_where_they_pay_for_what_they_cost() -> None:
    estimates = [[0.95] * 3] * 2 + [[0.02] * 3] * 2
    cheap = CostTable({(4, 1): 1.0, (4, 4): 2.5}, {4: 0.02}, {(4, 1): 0.02, (4, 4): 0.02})
    assert Planner(K, cheap, is_adaptive=True).plan(make_states(estimates)) == [3, 3, 0, 0]
    dear = CostTable(cheap.verify_seconds, cheap.draft_seconds, cheap.extend_seconds, {4: 1.0})
    assert Planner(K, dear, is_adaptive=True).plan(make_states(estimates)) == [0] * 4
    almost_all = [[0.95] * 3] * 3 + [[0.6] * 3]
    assert Planner(K, dear, is_adaptive=True).plan(make_states(almost_all)) == [3] * 4


def test_what_drafts_really_cost_is_learned_from_the_steps() -> None:
    """The table says that drafts pay; steps with them take so much longer that they do not."""
    table = CostTable({(4, 1): 1.0, (4, 4): 1.3}, {4: 0.02}, {(4, 1): 0.02, (4, 4): 0.02})
    planner, states = Planner(K, table, is_adaptive=True), make_states([[0.8] * 3] * 4)
    assert planner.plan(states) == [3] * 4
    for _ in range(5):
        planner.record_step([1] * 4, [0] * 4, 4, 1.1)
    for _ in range(60):
        planner.record_step([4] * 4, [3] * 4, 12, 1.1 * 2.9)
    assert planner.plan(states)[0] < 3
    for _ in range(100):
        planner.record_step([4] * 4, [3] * 4, 12, 1.1 * 1.36)
    assert planner.plan(states) == [3] * 4


def test_what_was_learned_of_other_weights_is_forgotten() -> None:
    simulation = simulate(4)
    assert not any(map(any, simulation.run(400, lambda _: 0.0)[-20:]))
    simulation.planner.forget()
    simulation.states = [SpeculationState(max_draft=K) for _ in simulation.states]
    simulation._in_flight.clear()
    simulation.depths.clear()
    assert any(simulation.run(1, lambda _: 0.9)[0]), "nobody tries the new drafts"
    assert sum(map(sum, simulation.run(100, lambda _: 0.9)[-20:])) > 20 * 4
