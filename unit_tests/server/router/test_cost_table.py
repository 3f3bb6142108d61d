"""Costs between and beyond measured sizes, from samples that are noisy."""

import pytest

from server.router.cost_table import CostTable


def test_costs_are_linear_between_samples_and_beyond_them() -> None:
    verify = {(1, 1): 1.0, (1, 3): 2.0, (4, 1): 2.0, (4, 3): 6.0}
    table = CostTable(verify, {1: 0.1, 4: 0.4}, verify)
    assert table.verify(1, 2) == pytest.approx(1.5) and table.verify(4, 8) == pytest.approx(4.0)
    assert table.verify(2, 2) == pytest.approx(1.0 + 1 / 3) and table.verify(1, 5) == pytest.approx(3.0)
    assert table.extend(4, 4) == 2.0 and table.extend(0, 0) == 0.0
    assert table.draft(2) == pytest.approx(0.2) and table.draft(8) == pytest.approx(0.8) and table.draft(0) == 0.0


def test_noisy_samples_become_costs_that_never_fall_with_size() -> None:
    table = CostTable.from_samples(
        {(1, 1): 2.0, (1, 2): 1.0, (2, 1): 1.5, (2, 2): 3.0}, {1: 0.2, 2: 0.1}, {(1, 1): 1.0}
    )
    cells = table.verify_seconds
    assert cells[1, 1] <= cells[1, 2] <= cells[2, 2] and cells[1, 1] <= cells[2, 1] <= cells[2, 2]
    assert table.draft_seconds[1] <= table.draft_seconds[2]


def test_a_measured_mixed_step_tells_what_different_depths_cost() -> None:
    verify = {(batch, width): float(batch * width) for batch in (1, 2, 4) for width in (1, 2)}
    extend = dict.fromkeys(verify, 0.5)
    table = CostTable.from_samples(verify, {1: 0.1, 4: 0.1}, extend, {2: 4.0, 4: 6.0})
    assert table.ragged(2) == pytest.approx(4.0 - 3 - 0.5)
    assert table.ragged(4) == 0, "less than the uniform cost is noise"
    assert table.ragged(3) == pytest.approx(0.25)
    assert CostTable.from_samples(verify, {1: 0.1}, extend).ragged(4) == 0
