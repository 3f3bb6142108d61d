"""Sizes of launches."""

import pytest

from kernels.gpu.launch import num_warps_for, power_of_two


@pytest.mark.parametrize(("least", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_two_is_the_next_one_up(least: int, power: int) -> None:
    assert power_of_two(least) == power


@pytest.mark.parametrize(("block", "warps"), [(1, 1), (256, 1), (1024, 4), (8192, 8)])
def test_warps_grow_with_the_block_within_bounds(block: int, warps: int) -> None:
    assert num_warps_for(block) == warps
