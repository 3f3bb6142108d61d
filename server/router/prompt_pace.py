"""How many prompt tokens run beside a decode pass, and in which steps. Knows counts and seconds. No torch.

A prefill pass over n tokens takes about F + c · n seconds: F for the weights and for launching, however short it is. A
chunk in every step, small enough for the decoding requests, would be spent on F alone. So it is as long as
--stream-slowdown allows per step, or takes _FIXED_PARTS · F where that is longer, and then comes in fewer steps: on
average decoding requests are slowed down as asked for.

Where a chunk is short enough to share the decode pass there is no F: every step has one, and what it costs is what the
step took more than a decode pass alone does, which now and then runs alone to tell.

While more requests wait for their first token than decode, prompts get as much more: a second spent on them costs each
that decodes a second, and brings each that waits its first token so much sooner. For that no chunk is longer than
_MOST_PASSES decode passes.
"""

import math

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
# Steps in a row that share a pass, at most, and how many more or fewer may decode than when a decode pass ran alone:
# after that one does again.
_MOST_JOINT_STEPS = 32
_SIMILAR = 0.25
# Relative variance of the passes' lengths above which their times tell F and c apart.
_TELLING_VARIANCE = 0.02


class PromptPace:
    """The scheduler asks for `budget`, tells what it has planned and, in the same order, what that took."""

    def __init__(self, slowdown: float, max_joint_tokens: int = 0):
        self._max_joint_tokens = max_joint_tokens
        self.is_joint = False  # the newest chunk shares the decode pass
        # Who decodes now and did when a decode pass last ran alone, and steps that shared a pass since.
        self._num_decoding = self._num_alone = self._num_joint = 0
        self._has_decoded = False
        self._least_share = self._share = max(slowdown - 1, _LEAST_SHARE)
        self._chunk = self._last_chunk = math.inf
        self._costs = PassCosts()
        self._decode_seconds = 0.0
        # Seconds of prefill that decode passes have not made up for yet, of passes that are known and planned ones.
        self._owed, self._expected = 0.0, 0.0
        self._num_planned = 0

    def budget(self, num_decoding: int, num_waiting: int, most: int) -> int:
        """Prompt tokens that the next step may compute, no more than `most`, where so many requests decode and so many
        wait for their first token."""
        if not num_decoding or math.isinf(self._least_share):
            return most
        self._num_decoding = num_decoding
        if self._max_joint_tokens and not self._knows_decoding():
            return 0
        self._share = self._least_share * max(1.0, num_waiting / num_decoding)
        due = self._owed + self._expected - self._num_planned * self._share * self._decode_seconds
        self._chunk = self._size_chunk()
        return 0 if due > 1e-9 else int(min(self._chunk, most))

    def plan(self, num_tokens: int, has_decode: bool) -> None:
        """The next step computes num_tokens of prompts."""
        self.is_joint = has_decode and 0 < num_tokens <= self._max_joint_tokens
        self._num_joint = self._num_joint + 1 if self.is_joint else 0
        if has_decode and not self.is_joint:
            self._num_alone = self._num_decoding
        if not has_decode:
            self._owed, self._expected, self._num_planned = 0.0, 0.0, 0
            return
        self._num_planned += 1
        if num_tokens:
            self._last_chunk = self._chunk
            self._expected = self._costs.seconds(num_tokens)

    def collect(self, num_tokens: int, prefill_seconds: float, decode_seconds: float | None) -> None:
        """What a step took: seconds of its passes, None without a decode pass."""
        if num_tokens:
            self._costs.record(num_tokens, prefill_seconds)
        if decode_seconds is None or math.isinf(self._share):
            return
        self._has_decoded, self._decode_seconds = True, decode_seconds
        self._num_planned = max(0, self._num_planned - 1)
        allowance = self._share * decode_seconds
        self._owed = max(-allowance, min(self._owed + prefill_seconds - allowance, _MOST_WAITS * allowance))
        if num_tokens:
            self._expected = 0.0

    def collect_joint(self, num_tokens: int, seconds: float) -> None:
        """What a step took in which both shared a pass."""
        self.collect(num_tokens, max(0.0, seconds - self._decode_seconds), self._decode_seconds)

    def _knows_decoding(self) -> bool:
        """What a decode pass of about so many requests takes alone was measured not long ago, or soon will be."""
        is_similar = abs(self._num_decoding - self._num_alone) <= _SIMILAR * self._num_alone
        return self._has_decoded and is_similar and self._num_joint < _MOST_JOINT_STEPS

    def _size_chunk(self) -> float:
        """Tokens of a chunk; without a limit while nothing is known."""
        decode_seconds = self._decode_seconds
        if not decode_seconds or not self._costs.has_any:
            return math.inf
        shares = 0 < self._last_chunk <= self._max_joint_tokens
        fixed, per_token = (0.0, self._costs.seconds(1)) if shares else self._costs.split(decode_seconds)
        longest = max(_MOST_PASSES, self._least_share) * decode_seconds
        seconds = max(min(self._share * decode_seconds, longest), _FIXED_PARTS * fixed)
        wanted = (seconds - fixed) / max(per_token, 1e-12)
        return max(MIN_CHUNK, min(wanted, 2 * self._last_chunk, _LONGEST))


class PassCosts:
    """Seconds of prefill passes by their lengths: weighted sums for a straight line through them."""

    def __init__(self) -> None:
        self._weight = self._n = self._s = self._nn = self._ns = 0.0
        self._fixed: float | None = None

    @property
    def has_any(self) -> bool:
        """Some pass was recorded."""
        return self._weight > 0

    def record(self, num_tokens: int, seconds: float) -> None:
        """One pass."""
        values = (1.0, num_tokens, seconds, num_tokens**2, num_tokens * seconds)
        sums = (self._weight, self._n, self._s, self._nn, self._ns)
        self._weight, self._n, self._s, self._nn, self._ns = (
            _MEMORY * total + value for total, value in zip(sums, values, strict=True)
        )

    def seconds(self, num_tokens: int) -> float:
        """About what a pass over so many takes: as many for each as on average."""
        return num_tokens * self._s / self._n if self._n else 0.0

    def split(self, decode_seconds: float) -> tuple[float, float]:
        """F and c. Passes of one length do not tell them apart: F is then what it was, or at first that of a decode
        pass, which reads the same weights."""
        length, mean = self._n / self._weight, self._s / self._weight
        variance = self._nn / self._weight - length**2
        if variance > _TELLING_VARIANCE * length**2:
            per_token = (self._ns / self._weight - length * mean) / variance
            self._fixed = mean - min(max(0.0, per_token), mean / length) * length
        fixed = min(mean, decode_seconds if self._fixed is None else self._fixed)
        return fixed, (mean - fixed) / length
