"""Sizes of launches that several kernels choose alike."""


def power_of_two(at_least: int) -> int:
    """The smallest power of two that is not below `at_least`."""
    return 1 << max(0, at_least - 1).bit_length()


def num_warps_for(block: int) -> int:
    """Warps of a program that works on `block` values once: 8 values or more per lane, 8 warps at most."""
    return max(1, min(8, block // 256))
