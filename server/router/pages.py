"""Who owns which KV page and which row. Page 0 and row 0 are padding and never handed out. No torch."""

import heapq


class Pool:
    """Numbers 1..count, lowest first (consecutive rows let the device work without copies)."""

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(1, count + 1))
        self._is_free = [False] + [True] * count

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` numbers. The caller has checked `num_free`."""
        assert count <= len(self._free)
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for number in taken:
            self._is_free[number] = False
        return taken

    def give_back(self, numbers: list[int]) -> None:
        """Return numbers that were taken."""
        for number in numbers:
            assert not self._is_free[number], f"number {number} was given back twice"
            self._is_free[number] = True
            heapq.heappush(self._free, number)
