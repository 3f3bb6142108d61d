"""Bytes in use and bandwidth are those of this process and machine."""

import torch

from benchmarks.static_throughput.machine import (
    BandwidthProbe,
    free_memory,
    peak_memory,
    reset_peak,
    used_memory,
)

MIB = 2**20


def test_the_peak_is_that_since_the_last_reset() -> None:
    before = used_memory("cpu")
    reset_peak("cpu")
    large = torch.ones(16 * MIB)
    assert large.sum() > 0
    del large
    assert 60 * MIB <= peak_memory("cpu") - before < 128 * MIB
    used_memory("cpu")
    reset_peak("cpu")
    assert peak_memory("cpu") - before < 32 * MIB
    assert free_memory("cpu") > 64 * MIB


def test_bandwidth_is_bytes_over_the_median_time() -> None:
    probe = BandwidthProbe("cpu", 8 * MIB)
    for _ in range(3):
        probe.read()
    assert 1e8 < probe.bytes_per_second < 1e13
