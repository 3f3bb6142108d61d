"""What the parts of a decode step cost, from measurements at start-up. Knows seconds and sizes only. No torch."""

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

Grid = Mapping[tuple[int, int], float]


@dataclass(frozen=True)
class CostTable:
    """Seconds of the parts of a decode step, by (batch, rows per request) or batch; every grid is complete.

    `verify_seconds`: the target over that many rows of each request. `extend_seconds`: the draft head over as many
    rows, the first draft included. `draft_seconds`: the draft head once more, on one row of each request.
    `ragged_seconds`, by batch: what every further depth adds where requests of one step have different ones.
    """

    verify_seconds: dict[tuple[int, int], float]
    draft_seconds: dict[int, float]
    extend_seconds: dict[tuple[int, int], float]
    ragged_seconds: dict[int, float] = field(default_factory=dict)

    @classmethod
    def from_samples(
        cls, verify: Grid, draft: Mapping[int, float], extend: Grid, mixed: Mapping[int, float] | None = None
    ) -> "CostTable":
        """From noisy measurements: more requests or rows never cost less. Samples that obey this stay as they are.

        `mixed`, by batch: a step in which half of the requests (rounded down) have one draft and want one, the others
        neither.
        """
        table = cls(_monotone(verify), _monotone_line(draft), _monotone(extend))
        for batch, seconds in (mixed or {}).items():
            half = batch // 2
            uniform = table.verify(batch, batch + half) + table.extend(half, 2 * half)
            table.ragged_seconds[batch] = max(0.0, seconds - uniform)
        return table

    def verify(self, batch: int, num_rows: int) -> float:
        """Seconds to verify `batch` >= 1 requests with num_rows >= batch rows in all, linear beyond samples too."""
        return _interpolate_grid(self._verify_lines, batch, num_rows / batch)

    def draft(self, batch: int) -> float:
        """Seconds to propose one more draft for each of `batch` requests."""
        return max(0.0, _interpolate(self._draft_line, batch)) if batch else 0.0

    def extend(self, batch: int, num_rows: int) -> float:
        """Seconds to run the draft head over num_rows >= batch rows of `batch` requests and propose the first draft."""
        return _interpolate_grid(self._extend_lines, batch, num_rows / batch) if batch else 0.0

    def ragged(self, batch: int) -> float:
        """Seconds that every depth but one adds to a step of `batch` requests."""
        line = sorted(self.ragged_seconds.items())
        return max(0.0, _interpolate(line, batch)) if line else 0.0

    @cached_property
    def _verify_lines(self) -> "_Lines":
        return _lines(self.verify_seconds)

    @cached_property
    def _extend_lines(self) -> "_Lines":
        return _lines(self.extend_seconds)

    @cached_property
    def _draft_line(self) -> "_Line":
        return sorted(self.draft_seconds.items())


_Line = list[tuple[int, float]]  # (place, seconds), by place
_Lines = list[tuple[int, _Line]]  # (batch, line over the width), by batch


def _monotone(samples: Grid) -> dict[tuple[int, int], float]:
    """The middle between the lowest monotone surface above the samples and the highest one below them."""

    def below(key: tuple[int, int]) -> Iterable[float]:
        return (seconds for other, seconds in samples.items() if other[0] <= key[0] and other[1] <= key[1])

    def above(key: tuple[int, int]) -> Iterable[float]:
        return (seconds for other, seconds in samples.items() if other[0] >= key[0] and other[1] >= key[1])

    return {key: (max(below(key)) + min(above(key))) / 2 for key in samples}


def _monotone_line(samples: Mapping[int, float]) -> dict[int, float]:
    smooth = _monotone({(batch, 1): seconds for batch, seconds in samples.items()})
    return {batch: seconds for (batch, _), seconds in smooth.items()}


def _lines(grid: Grid) -> _Lines:
    batches, widths = (sorted({key[axis] for key in grid}) for axis in (0, 1))
    assert len(grid) == len(batches) * len(widths), "a grid of costs has holes"
    return [(batch, [(width, grid[batch, width]) for width in widths]) for batch in batches]


def _interpolate(line: _Line, place: float) -> float:
    """On the straight line through the two samples around the place, or the two nearest to it."""
    if len(line) == 1:
        return line[0][1]
    right = min(max(bisect.bisect_left(line, (place,)), 1), len(line) - 1)
    (x0, y0), (x1, y1) = line[right - 1], line[right]
    return y0 + (y1 - y0) * (place - x0) / (x1 - x0)


def _interpolate_grid(lines: _Lines, batch: int, width: float) -> float:
    return max(0.0, _interpolate([(size, _interpolate(line, width)) for size, line in lines], batch))
