"""Fits find the law that points were made with, and a real run has a row for every point."""

import json

import pytest

from benchmarks import random_checkpoint, scaling
from benchmarks.scaling import find_steepest, fit, fit_all, main
from unit_tests.benchmarks.test_gpu_suite import NANO

X = [1, 2, 4, 8, 16, 32, 64]


def test_a_constant_and_something_linear_are_found_and_are_linear_at_most() -> None:
    found = fit(X, [5 + 0.5 * x for x in X])
    assert (found["a"], found["b"]) == pytest.approx((5, 0.5))
    assert found["linear_error"] < 1e-9 < found["power_error"]
    assert found["closer"] == "a + b x" and found["exponent"] < found["steepest"] < 1
    assert found["growth"] == "linear at most"


@pytest.mark.parametrize(
    ("exponent", "growth"), [(0.5, "linear at most"), (1.0, "linear at most"), (1.5, "superlinear")]
)
def test_a_power_law_is_found(exponent: float, growth: str) -> None:
    found = fit(X, [3 * x**exponent for x in X])
    assert found["exponent"] == pytest.approx(exponent) == found["steepest"]
    assert found["power_error"] < 1e-9 and found["growth"] == growth


def test_what_becomes_superlinear_late_is_seen_behind_a_constant() -> None:
    found = fit(X, [100 + 0.1 * x**2 for x in X])
    assert found["exponent"] < 1 and found["growth"] == "linear at most"
    found = fit([10 * x for x in X], [100 + 0.1 * (10 * x) ** 2 for x in X])
    assert found["exponent"] < 1.9 and found["growth"] == "superlinear"


def test_noise_between_neighbours_is_not_steepness() -> None:
    assert find_steepest([1, 2, 4], [1.0, 2.5, 4.0]) == pytest.approx(1.0)
    assert find_steepest([3, 2], [3.0, 2.0]) == pytest.approx(1.0)


def test_what_stays_the_same_has_exponent_zero_and_one_point_has_no_fit() -> None:
    assert fit(X, [7.0] * len(X))["exponent"] == pytest.approx(0, abs=1e-9)
    assert fit([1, 1], [1.0, 2.0]) == {}
    assert fit_all([]) == []


def test_every_point_of_every_axis_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(random_checkpoint.OTHER_PRESETS, "nano", NANO)
    monkeypatch.setattr(scaling, "PRESET_NAMES", ("nano",))
    monkeypatch.setattr(scaling, "LINEAR", 100.0)  # what is measured here is noise
    command = "--preset nano --context 64 256 --batch 1 2 --mtp-step 2 --steps 2 --rounds 1 --num-threads 1"
    assert main(command.split()) == 0
    written = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    points = [(point["axis"], point["x"]) for point in written["points"]]
    assert points == [
        ("context", 64),
        ("context", 256),
        ("batch", 1),
        ("batch", 2),
        ("rows", 1),
        ("rows", 2),
        ("rows", 3),
    ]
    memory = {fit["of"]: fit["exponent"] for fit in written["fits"] if fit["axis"] == "context"}
    assert memory["state_bytes"] == pytest.approx(0, abs=1e-9) and 0.7 < memory["kv_bytes"] <= 1
    assert {fit["axis"] for fit in written["fits"]} == {"context", "batch", "rows"}
