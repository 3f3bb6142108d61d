"""Does a benchmark say the same when it runs again? `python -m benchmarks.agreement [FIRST SECOND]`.

Compares two results of one benchmark, by default each file of `benchmarks/results/repeats`, another run, with the one
in `benchmarks/results` that has its name but for the date. A number that was printed with the spread of its rounds (its
least and most, or the tenth and ninetieth percentile of its steps) agrees if both spreads have a value in common;
numbers without one are counts that follow from the settings, or times of a machine whose speed changes, and are not
compared. By chance alone the spreads of two runs have nothing in common in 1 of 10 cases if they are of 3 rounds each,
in 1 of 126 if of 5. Prints how many agree, and those that do not; the exit code is 1 if there is one.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, print_table
from benchmarks.report_page.results import Result, read_results

_ENDS = (("min", "max"), ("p10", "p90"))
_DATE_LEN = len("2026-01-31-")


@dataclass(frozen=True)
class Measured:
    """A number that two runs gave, with the lowest and the highest value that each had."""

    name: str
    first: tuple[float, float]
    second: tuple[float, float]

    @property
    def agrees(self) -> bool:
        """Some value lies within both spreads."""
        return max(self.first[0], self.second[0]) <= min(self.first[1], self.second[1])


def find_measured(first: Any, second: Any, name: str = "") -> Iterator[Measured]:
    """All numbers with a spread in two results of the same form. Raises ValueError for those of different ones."""
    if isinstance(first, dict) and isinstance(second, dict):
        label = ", ".join(str(value) for value in first.values() if isinstance(value, str))
        yield from _compare_row(first, second, f"{name} {label}".strip())
        for key in first.keys() & second.keys():
            yield from find_measured(first[key], second[key], f"{name}.{key}".strip("."))
    elif isinstance(first, list) and isinstance(second, list) and any(isinstance(one, dict) for one in first):
        if len(first) != len(second):
            raise ValueError(f"{name or 'results'}: {len(first)} rows in the first and {len(second)} in the second")
        for number, pair in enumerate(zip(first, second, strict=True)):
            yield from find_measured(*pair, f"{name}[{number}]")


def _compare_row(first: dict[str, Any], second: dict[str, Any], name: str) -> Iterator[Measured]:
    for key in sorted(first):
        for low, high in _ENDS:
            base = key.removesuffix(low)
            ends = [row.get(end) for row in (first, second) for end in (key, base + high)]
            known = [value for value in ends if isinstance(value, float | int)]
            if key != base and len(known) == len(ends):
                yield Measured(f"{name}: {base.strip('_') or 'value'}", (known[0], known[1]), (known[2], known[3]))


def find_pairs(paths: list[Path]) -> list[tuple[Path, Path]]:
    """The two files that were named, or every repeat with its original. Raises ValueError if one has none."""
    if paths:
        return [(paths[0], paths[1])]
    originals = {path.name[_DATE_LEN:]: path for path in sorted(RESULTS.glob("*.json"))}
    repeats = sorted((RESULTS / "repeats").glob("*.json"))
    lost = [path.name for path in repeats if path.name[_DATE_LEN:] not in originals]
    if lost:
        raise ValueError(f"repeats of nothing in {RESULTS}: {', '.join(lost)}")
    return [(originals[path.name[_DATE_LEN:]], path) for path in repeats]


def compare(first: Result, second: Result) -> list[Measured]:
    """What both measured. Raises ValueError for results that cannot be compared."""
    if first.benchmark != second.benchmark:
        raise ValueError(f"{first.name} is of {first.benchmark}, {second.name} of {second.benchmark}")
    measured = list(find_measured(first.results, second.results))
    if not measured:
        raise ValueError(f"{first.name} and {second.name} have no number with a spread")
    return measured


def main(argv: list[str]) -> int:
    """Compare and print; the exit code is 1 if some number does not agree, 2 if results cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="two results of one benchmark")
    paths = parser.parse_args(argv).files
    if len(paths) not in (0, 2):
        parser.error(f"{len(paths)} files were given; name two, or none for those of this project")
    rows, apart = [], []
    try:
        for pair in find_pairs(paths):
            results, unreadable = read_results(pair)
            if unreadable:
                raise ValueError("; ".join(unreadable))
            measured = compare(*results)
            rows.append(
                {"numbers": len(measured), "agree": sum(one.agrees for one in measured), "result": pair[1].name}
            )
            apart += [(pair[1].name, one) for one in measured if not one.agrees]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(rows)
    for result, one in apart:
        first, second = (f"{low:.3g} to {high:.3g}" for low, high in (one.first, one.second))
        print(f"apart: {result}: {one.name}: {first}, then {second}")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
