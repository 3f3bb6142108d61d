"""How likely drafts are accepted, learned from what was. Knows counts only. No torch."""

import itertools
import operator
from collections.abc import Iterable, Sequence

# The server's average counts as much as this many observations of a new request, which may be quite another kind.
_PRIOR_OBSERVATIONS = 1
_WEIGHT = 0.02
_DRIFT_WEIGHT = 0.1
_PROBE_WEIGHT = 0.3


class Acceptance:
    """How likely the drafts of one request are accepted: per position, given that those before it were.

    Exponential averages: they start from `prior`, which counts as much as a few observations, so that a request's own
    first steps move them most. Afterwards they move slowly, or a draft that pays would be given up for noise; but when
    they err to the same side for long, the text has changed and they move fast (as in Trigg and Leach, 1967).
    `survivals[j]` is the probability that the first j + 1 drafts are all accepted, rounded to whole percents.
    """

    def __init__(self, prior: Sequence[float]):
        self.estimates = list(prior)
        self.survivals: tuple[float, ...] = ()
        self._counts = [0] * len(prior)
        self._drifts = [0.0] * len(prior)
        self._multiply()

    def update(self, num_proposed: int, num_accepted: int, probed: int = 0) -> None:
        """Learn from one verify step. The draft after the accepted ones was refused, those behind it show nothing.
        Draft number `probed` (0: none) is looked at so seldom that what it shows counts more."""
        for position, is_accepted in evidence(num_proposed, num_accepted):
            self._counts[position] += 1
            error = is_accepted - self.estimates[position]
            self._drifts[position] += _DRIFT_WEIGHT * (error - self._drifts[position])
            weight = max(_WEIGHT, 1 / (self._counts[position] + _PRIOR_OBSERVATIONS), self._drifts[position] ** 2)
            if position == probed - 1:
                weight = max(weight, _PROBE_WEIGHT)
            self.estimates[position] += weight * error
        self._multiply()

    def _multiply(self) -> None:
        products = itertools.accumulate(self.estimates, operator.mul)
        self.survivals = tuple(round(survival, 2) for survival in products)


def evidence(num_proposed: int, num_accepted: int) -> Iterable[tuple[int, bool]]:
    """(index, accepted) of every draft that was judged."""
    return ((index, index < num_accepted) for index in range(min(num_proposed, num_accepted + 1)))
