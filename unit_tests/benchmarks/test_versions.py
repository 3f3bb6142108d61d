"""The interval of a median, and two processes that take turns."""

import random
import statistics
from pathlib import Path

import pytest

from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.versions import HERE, Task, Version, compare_versions, median_interval


@pytest.mark.parametrize(("count", "num_cut"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (15, 3), (25, 7)])
def test_the_interval_cuts_as_many_values_as_the_sign_test_allows(count: int, num_cut: int) -> None:
    values = [float(value) for value in range(count)]
    assert median_interval(values[::-1]) == (num_cut, count - 1 - num_cut)


def test_the_interval_holds_the_true_median_in_95_of_100_cases() -> None:
    rng = random.Random(0)
    intervals = [median_interval([rng.lognormvariate(0, 0.3) for _ in range(9)]) for _ in range(2000)]
    share = statistics.fmean(low <= 1 <= high for low, high in intervals)
    assert 0.94 < share < 0.98


@pytest.mark.slow
def test_two_processes_decode_and_compute_prompts(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, "tiny")
    settings = {"model": str(tmp_path), "num_threads": 1, "max_model_len": 200, "prefix_cache": "off"}
    texts = ("One.", "Two and two.")
    tasks = [
        Task(settings | {"mtp_step": 1}, 2, 16, 3),
        Task({**settings, "model": str(HERE / "models" / "demo")}, 2, 16, 3, texts),
        Task(settings, 0, 64, 2),
    ]
    rows = compare_versions(HERE, tasks, 2)
    assert len(rows) == 3 and all(
        0 < row["new_over_old_min"] <= row["new_over_old"] <= row["new_over_old_max"] for row in rows
    )


@pytest.mark.slow
def test_a_folder_without_tandem_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"ended with status|is no checkout"):
        Version(tmp_path)
