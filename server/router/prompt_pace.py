"""How many prompt tokens run beside a decode pass, and in which steps. Knows counts and seconds. No torch.

A prefill pass over n tokens takes about F + c · n seconds: F for the weights and for launching, however short it is. A
chunk in every step, small enough for the decoding requests, would be spent on F alone. So it is as long as
--stream-slowdown allows per step, or takes _FIXED_PARTS · F where that is longer, and then comes in fewer steps: on
average decoding requests are slowed down as asked for.

Where chunks of up to max_joint_tokens share the decode pass there is no F: there may be one in every step, and what it
costs is what the step took more than such decode passes do alone. Now and then one runs alone to tell.

While more requests wait for their first token than decode, prompts get as much more: a second spent on them costs each
that decodes a second, and brings each that waits its first token so much sooner. For that no chunk is longer than
_MOST_PASSES decode passes.
"""

import math
from collections.abc import Sequence

MIN_CHUNK = 16
# Of three fixed parts one is lost; longer chunks are gaps in the streams that decode.
_FIXED_PARTS = 3
_MOST_PASSES = 2
# Of the decode passes' time, at least, that prompts get: they may not starve.
_LEAST_SHARE = 0.05
# Where tokens cost nothing a chunk is as long as the scheduler has any.
_LONGEST = 2**20
# Steps without a chunk in a row, at most: a pass that was slow for once shall not keep prompts waiting for long.
_MOST_WAITS = 64
# What a pass tells counts less with every later one, but a line through a few noisy ones would say anything.
_MEMORY = 0.99
# Steps in a row that share a pass, at most: so many for every decode pass that was seen alone, up to the most.
_JOINT_STEPS, _MOST_JOINT_STEPS = 2, 32
# What tokens take in passes of their own counts as so many shared passes do; a token adds no less to these than a part
# of that: where less is seen, decode passes take less than they did alone.
_FIRST_PASSES, _LEAST_COST = 4, 0.25
# Chunks wanted that much longer than what may share a pass have one of their own.
_LONGER = 1.5
# Relative variance of 1 / tokens above which the passes' times tell F and c apart.
_TELLING_VARIANCE = 0.02
# A pass that took so many times what was expected, or such a part of it, was no pass like the others.
_MOST_TIMES = 4


class PromptPace:
    """The scheduler asks for `budget`, tells what it has planned and, in the same order, what that took."""

    def __init__(self, slowdown: float, max_joint_tokens: int = 0):
        self._max_joint_tokens = max_joint_tokens
        self.is_joint = False  # the newest chunk shares the decode pass
        self._num_joint = 0  # steps that did so since a decode pass ran alone
        self._least_share = self._share = max(slowdown - 1, _LEAST_SHARE)
        self._chunk = self._last_chunk = math.inf
        self._prefills, self._joints, self._decodes = PassCosts(), PassCosts(), PassCosts()
        self._decode_seconds = 0.0  # of the step that is planned
        # Seconds of prefill that decode passes have not made up for yet, of passes that are known and planned ones.
        self._owed, self._expected = 0.0, 0.0
        self._num_planned = 0

    def budget(self, widths: Sequence[int], num_waiting: int, most: int) -> int:
        """Prompt tokens that the next step may compute, no more than `most`, where requests decode that run so many
        tokens each, and so many wait for their first token."""
        if self._max_joint_tokens and self._num_joint >= min(_MOST_JOINT_STEPS, _JOINT_STEPS * self._decodes.weight):
            return 0 if widths else most
        if not widths or math.isinf(self._least_share):
            return most
        self._share = self._least_share * max(1.0, num_waiting / len(widths))
        self._decode_seconds = self._decodes.at(sum(widths))
        due = self._owed + self._expected - self._num_planned * self._share * self._decode_seconds
        self._chunk = self._size_chunk()
        return 0 if due > 1e-9 else int(min(self._chunk, most) + 1e-6)

    def plan(self, num_tokens: int, has_decode: bool) -> None:
        """The next step computes num_tokens of prompts."""
        self.is_joint = has_decode and 0 < num_tokens <= self._max_joint_tokens
        if not has_decode:
            self._owed, self._expected, self._num_planned = 0.0, 0.0, 0
            return
        self._num_joint = self._num_joint + 1 if self.is_joint else 0
        self._num_planned += 1
        if num_tokens:
            self._last_chunk = self._chunk
            self._expected = (self._joints if self.is_joint else self._prefills).seconds(num_tokens)

    def collect(self, num_tokens: int, prefill_seconds: float, num_rows: int, decode_seconds: float) -> None:
        """What a step took whose passes ran one after the other: one over prompts, one over the rows that decode; 0 of
        what it had none."""
        if num_tokens:
            self._prefills.record(num_tokens, prefill_seconds)
        if num_rows:
            self._decodes.record(num_rows, decode_seconds)
            self._settle(num_tokens, prefill_seconds, decode_seconds)

    def collect_joint(self, num_tokens: int, num_rows: int, seconds: float) -> float:
        """What a step took in which both shared a pass; gives the seconds of it that are due to the rows that
        decode."""
        decode_seconds = self._decodes.at(num_rows)
        self._joints.add(num_tokens, seconds - decode_seconds)
        self._settle(num_tokens, seconds - decode_seconds, decode_seconds)
        return max(0.0, seconds - self._joints.seconds(num_tokens))

    def _settle(self, num_tokens: int, prefill_seconds: float, decode_seconds: float) -> None:
        if math.isinf(self._share):
            return
        self._num_planned = max(0, self._num_planned - 1)
        allowance = self._share * decode_seconds
        self._owed = max(-allowance, min(self._owed + prefill_seconds - allowance, _MOST_WAITS * allowance))
        if num_tokens:
            self._expected = 0.0

    def _size_chunk(self) -> float:
        """Tokens of a chunk; without a limit while nothing is known."""
        decode_seconds = self._decode_seconds
        if not decode_seconds or not (self._prefills.weight or self._joints.weight):
            return math.inf
        longest = max(_MOST_PASSES, self._least_share) * decode_seconds
        seconds = min(self._share * decode_seconds, longest)
        if self._max_joint_tokens:
            per_token = self._joint_cost()
            if seconds <= _LONGER * self._max_joint_tokens * per_token:
                return self._bound(min(seconds / per_token, self._max_joint_tokens))
        fixed, per_token = self._prefills.split(decode_seconds)
        return self._bound((max(seconds, _FIXED_PARTS * fixed) - fixed) / max(per_token, 1e-12))

    def _joint_cost(self) -> float:
        """Seconds that a token adds to a decode pass."""
        alone, shared = self._prefills.seconds(1), self._joints.seconds(1)
        mean = (_FIRST_PASSES * alone + self._joints.weight * shared) / (_FIRST_PASSES + self._joints.weight)
        return max(mean, _LEAST_COST * alone, 1e-12)

    def _bound(self, wanted: float) -> float:
        return max(MIN_CHUNK, min(wanted, 2 * self._last_chunk, _LONGEST))


class PassCosts:
    """Seconds of passes by their lengths: weighted sums for a straight line through seconds per token by 1 / tokens, in
    which no long pass outweighs all others."""

    def __init__(self) -> None:
        # Of 1, tokens, seconds, 1 / tokens, seconds per token, and the last two's products with 1 / tokens.
        self._sums = [0.0] * 7
        self._fixed: float | None = None

    @property
    def weight(self) -> float:
        """How many passes it is that are remembered."""
        return self._sums[0]

    def record(self, length: int, seconds: float) -> None:
        """One pass. Where it took far longer than expected something else came between, such as a kernel that was
        compiled; where far shorter, this is what happened to those before."""
        if self.weight:
            expected = self.at(length), self.seconds(length)
            if seconds < min(expected) / _MOST_TIMES:
                self._sums, self._fixed = [0.0] * 7, None
            else:
                seconds = min(seconds, _MOST_TIMES * max(expected))
        self.add(length, seconds)

    def add(self, length: int, seconds: float) -> None:
        """One pass, or what it took more than another, whatever that is."""
        inverse, per_token = 1 / length, seconds / length
        values = (1.0, length, seconds, inverse, per_token, inverse**2, inverse * per_token)
        self._sums = [_MEMORY * total + value for total, value in zip(self._sums, values, strict=True)]

    def seconds(self, length: int) -> float:
        """About what a pass of that length takes: as many for each token as on average."""
        _, lengths, seconds, *_ = self._sums
        return length * seconds / lengths if lengths else 0.0

    def at(self, length: int) -> float:
        """The same by the line; the average where passes of one length tell none."""
        if not self.weight:
            return 0.0
        fixed, per_token = self.split(math.inf)
        return fixed + per_token * length

    def split(self, most_fixed: float) -> tuple[float, float]:
        """F and c. Passes of one length do not tell them apart: F is then what it was, or at first most_fixed, which
        may be what a decode pass takes, for it reads the same weights."""
        length, mean, inverse, per_token, squares, products = (total / self.weight for total in self._sums[1:])
        variance = squares - inverse**2
        if variance > _TELLING_VARIANCE * inverse**2:
            slope = (products - inverse * per_token) / variance
            self._fixed = max(0.0, min(slope, per_token / inverse))
            return self._fixed, per_token - self._fixed * inverse
        fixed = min(mean, most_fixed if self._fixed is None else self._fixed)
        return fixed, (mean - fixed) / length
