"""How many drafts each request gets at the next decode step: what costs least time per committed token. No torch.

A step with depths d_i verifies B + Σ d_i rows, runs the draft head over the rows of those that want drafts, and once
more for every further draft. What each of these costs is measured at start-up (`CostTable`), what it gives is learned
from what was accepted (`Acceptance`). Knows counts and seconds, never tokens.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from server.router.acceptance import Acceptance, evidence
from server.router.cost_table import CostTable

# Plans between two looks at the draft behind the last one that pays, when there is no reason to hurry or to give up.
PROBE_INTERVAL = 32
# After a probe that went well, or where drafts have just stopped to pay: noise should not cost long.
MIN_PROBE_INTERVAL = 4
# Nobody knows a new request: what it is like is worth knowing early.
FIRST_PROBE_INTERVAL = 8
MAX_PROBE_INTERVAL = 4 * PROBE_INTERVAL
# What the average over the server's requests starts from, and how fast it moves.
FIRST_ACCEPTANCE = 0.7
_SERVER_WEIGHT = 0.01
# Tokens per second that all probes together may cost, as a share, and how much of it, in steps, may be saved up.
_PROBE_SHARE = 0.005
_MAX_PROBE_BUDGET = 0.1
_GAIN_WEIGHT = 0.02
# How fast what steps really cost, over what the table says, is learned: from plain steps that come all the time or now
# and then; and what drafts add, within bounds relative to plain steps. A jump too high says nothing of the machine:
# something was compiled.
_PLAIN_WEIGHT, _RARE_PLAIN_WEIGHT, _MAX_PLAIN_JUMP, _MAX_JUMP = 0.1, 0.4, 2.0, 4.0
_DRAFTING_WEIGHT, _DRAFTING_BOUNDS = 0.05, (0.1, 6.0)
# Where drafts pay, plans until a plain step is tried for its cost: at first, and at most. What a verify step takes says
# nothing of plain ones, and drafts that seem to pay because the table has these too dear would never be found out.
_FIRST_PLAIN_INTERVAL, _MAX_PLAIN_INTERVAL = 8, 512
# What drafts add has changed so much that it may be the machine's speed, which plain steps tell.
_SURPRISE = 1.4
# Plans without drafts until a step has neither old nor new ones.
_PLAIN_PLANS = 2
# What so many steps with drafts showed counts as much as the table; each plain step since takes a share of it away. The
# machine may have been busy when it was measured.
_TABLE_STEPS, _MEMORY = 5, 0.998
_OVERHEAD_WEIGHT = 0.05
# Plans without drafts that repeat the one before them without a look.
_MAX_REPEATED = 3
# Plans whose choice is remembered.
_MAX_ANSWERS = 512

_Survivals = tuple[tuple[float, ...], ...]


@dataclass(eq=False)
class SpeculationState:
    """What the planner remembers of one request. The scheduler keeps it and sets `max_draft` before every plan.

    `depth` is what paid at the last plan; `num_waiting` plans ago one draft more was last tried, and after
    `probe_interval` it is tried again. `probed` is the draft that was tried and not heard of yet, 0: none.
    """

    max_draft: int = 0
    acceptance: Acceptance | None = None
    depth: int = 0
    probed: int = 0
    num_waiting: int = 0
    probe_interval: int = FIRST_PROBE_INTERVAL

    def settle(self, depth: int, num_plans: int = 1) -> None:
        """Note what pays at this plan, which counts for so many. What has just stopped to pay is looked at again
        soon."""
        if depth < self.depth:
            self.num_waiting, self.probe_interval = 0, MIN_PROBE_INTERVAL
        self.num_waiting += num_plans
        self.depth = depth

    def begin_probe(self) -> int:
        """The depth of a step that tries one draft more than pays."""
        self.num_waiting, self.probed = 0, self.depth + 1
        return self.probed

    def end_probe(self, num_proposed: int, num_accepted: int) -> int:
        """The draft that this result is a probe of (0: none). One that was accepted is tried again soon, else later."""
        probed = self.probed
        if not 0 < probed <= num_proposed:
            return 0
        self.probed = 0
        if num_accepted >= probed:
            self.probe_interval = MIN_PROBE_INTERVAL
        elif num_accepted == probed - 1:
            self.probe_interval = min(2 * self.probe_interval, MAX_PROBE_INTERVAL)
        return probed


class _Gain:
    """Time that plain decoding would need for some tokens over the time they took; the last ones count most."""

    def __init__(self) -> None:
        self._plain_seconds = self._seconds = 0.0

    def add(self, plain_seconds: float, seconds: float) -> None:
        self._plain_seconds += _GAIN_WEIGHT * (plain_seconds - self._plain_seconds)
        self._seconds += _GAIN_WEIGHT * (seconds - self._seconds)

    @property
    def value(self) -> float:
        # Both averages started from 0 with the same weights, so their ratio is right from the first step on.
        return self._plain_seconds / self._seconds if self._seconds else 1.0


@dataclass
class _Costs:
    """A CostTable that remembers its answers: they are asked for hundreds of times per plan."""

    table: CostTable
    mtp_step: int
    _verify: dict[int, list[float]] = field(default_factory=dict)
    _draft: list[float] = field(default_factory=lambda: [0.0])
    _extend: dict[tuple[int, int], float] = field(default_factory=dict)
    _ragged: dict[int, float] = field(default_factory=dict)
    # What drafts add to a step costs so many times what the table says, relative to what plain steps do.
    drafting_factor: float = 1.0
    # What the host takes between two steps, in seconds: the more tokens of a step, the fewer share it.
    overhead: float = 0.0

    def verify(self, batch: int) -> list[float]:
        """Seconds to verify 0, 1, ... drafts of a batch."""
        if batch not in self._verify:
            counts = range(batch * self.mtp_step + 1)
            self._verify[batch] = [max(self.table.verify(batch, batch + count), 1e-9) for count in counts]
        return self._verify[batch]

    def plain(self, batch: int) -> float:
        """Seconds from one step without drafts to the next."""
        return self.verify(batch)[0] + self.overhead

    def draft(self, batch: int) -> list[float]:
        """Seconds of one draft for 0, 1, ... at least `batch` requests."""
        while len(self._draft) <= batch:
            self._draft.append(self.table.draft(len(self._draft)))
        return self._draft

    def prefixes(self, batch: int, positions: Iterable[int], factor: float) -> list[float]:
        """Seconds of the steps with the first 1, 2, ... of these drafts, each given by its index in its request, if
        what drafts add costs `factor` times what the table says."""
        verify, draft, extend, seconds = self.verify(batch), self.draft(batch), self._extend, []
        alive = [0] * self.mtp_step
        chain, ragged = 0.0, self.ragged(batch)
        for count, position in enumerate(positions, start=1):
            alive[position] += 1
            if position:
                chain += draft[alive[position]] - draft[alive[position] - 1]
            key = (alive[0], alive[0] + count)
            if key not in extend:
                extend[key] = self.table.extend(*key)
            added = verify[count] - verify[0] + extend[key] + chain + ragged * (_num_depths(batch, alive) - 1)
            seconds.append(self.plain(batch) + factor * added)
        return seconds

    def added(self, widths: Sequence[int], depths: Sequence[int]) -> float:
        """Seconds that drafts add to a step that verifies `widths` and proposes `depths`, as the table says."""
        batch, num_rows = len(widths), sum(widths)
        active = [width for width, depth in zip(widths, depths, strict=True) if width > 1 or depth]
        chain = sum(self.draft(batch)[sum(depth > step for depth in depths)] for step in range(1, max(depths)))
        ragged = self.ragged(batch) * (len(set(widths)) - 1)
        verify = self.verify(batch)
        return verify[num_rows - batch] - verify[0] + self.table.extend(len(active), sum(active)) + chain + ragged

    def ragged(self, batch: int) -> float:
        """Seconds that every depth but one adds."""
        if batch not in self._ragged:
            self._ragged[batch] = self.table.ragged(batch)
        return self._ragged[batch]

    def step(self, depths: Sequence[int]) -> float:
        """Seconds of a step with these depths."""
        positions = [position for depth in depths for position in range(depth)]
        if not positions:
            return self.plain(len(depths))
        return self.prefixes(len(depths), positions, self.drafting_factor)[-1]

    def rate(self, survivals: Sequence[Sequence[float]], depths: Sequence[int]) -> float:
        """Tokens per second that a step with these depths promises."""
        return _num_expected(survivals, depths) / self.step(depths)


class Planner:
    """Chooses depths, learns from results, and says what speculation gains.

    Without costs, or when not adaptive, everybody gets as many drafts as allowed, mtp_step at most. Else the drafts of
    all requests compete. A draft counts by the probability that it is reached and accepted; what the verify costs
    depends on their number, what the draft head costs mostly on the longest chain. So for every longest chain the
    drafts are taken by probability, and the number of them is kept that gives most tokens per second.

    Probes: what is never proposed is never judged, so now and then a request gets one draft more than pays. This
    happens only where it would pay if it were accepted every time and as cheap as the steps of late leave room for, and
    rather for several requests in one step: the draft head and a wider verify cost much for the first of them and
    little for the others. Who has waited half its interval joins the first that must. What probes cost together is
    bounded by _PROBE_SHARE: what the table says, or where only probes draft, what their steps really took. Plain steps
    are tried, too, ever more rarely, where drafts pay.

    `requests_per_depth[d]` counts how often a request was given d drafts; `measured_gain` explains `plain_factor`.
    """

    def __init__(self, mtp_step: int, costs: CostTable | None, is_adaptive: bool):
        self.mtp_step, self.is_adaptive = mtp_step, is_adaptive
        self.requests_per_depth = [0] * (mtp_step + 1)
        self.server_acceptance = [FIRST_ACCEPTANCE] * mtp_step
        self.plain_factor = 1.0  # what plain steps really cost, over what the table says
        self._added = self._excess = 0.0  # seconds that drafts add to a step: by the table, and on a machine like it
        self._num_seen = 0.0  # steps that showed it, of late
        self._num_drafting, self._plain_interval = 0, _FIRST_PLAIN_INTERVAL  # plans since the last plain one
        self._familiar_factor = 1.0  # what drafts added when plain steps were last hurried
        self._overhead = 0.0  # the host's between two steps, an average
        self._probe_budget = 0.0
        self._is_plain = True  # the last plan wanted no drafts but those of probes
        self._costs = None if costs is None else _Costs(costs, mtp_step)
        self._predicted, self._measured = _Gain(), _Gain()
        self._answers: dict[object, list[int]] = {}
        self._idle_requests: list[SpeculationState] = []  # of the last plan, if it gave no drafts
        self._num_repeated = 0

    @property
    def predicted_gain(self) -> float:
        """Tokens per second that the plans promise, over plain decoding; 1.0 before the first or without costs."""
        return self._predicted.value

    @property
    def measured_gain(self) -> float:
        """Tokens per second as they came, over plain decoding on the machine as it is now; 1.0 before the first step.

        What a plain step costs now is its cost at start-up times `plain_factor`, which plain steps show. Where drafts
        pay these are rare: a machine that gets slower is noticed within some hundred steps.
        """
        return self._measured.value

    def plan(self, requests: Sequence[SpeculationState]) -> list[int]:
        """Drafts of each request at its next step, 0..min(mtp_step, max_draft). All that decode together belong in one
        call: what a draft costs depends on the others."""
        if self._costs is not None and self._may_repeat(requests):
            return self._count(self._promise(self._costs, (), [0] * len(requests)))
        limits = [min(request.max_draft, self.mtp_step) for request in requests]
        if self._costs is None or not requests:
            return self._count(limits)
        survivals = tuple(self._acceptance(request).survivals for request in requests)
        if not self.is_adaptive or not any(limits):
            return self._count(self._promise(self._costs, survivals, limits))
        depths = self._recall(self._costs, survivals, tuple(limits)).copy()
        self._add_probes(self._costs, requests, survivals, limits, depths)
        self._idle_requests = [] if any(depths) else list(requests)
        if self._must_try_plain(self._costs.drafting_factor, depths):
            depths = [0] * len(depths)
        return self._count(self._promise(self._costs, survivals, depths))

    def forget(self) -> None:
        """The weights are others now: what was accepted says nothing of what will be, and is soon learned anew. The
        requests' states are the caller's to renew."""
        self.server_acceptance = [FIRST_ACCEPTANCE] * self.mtp_step
        self._probe_budget, self._idle_requests, self._num_repeated = 0.0, [], 0

    def _may_repeat(self, requests: Sequence[SpeculationState]) -> bool:
        """Where nobody drafts nothing is learned: most plans for the same requests are the last one again."""
        if requests != self._idle_requests or not requests or self._num_repeated == _MAX_REPEATED:
            return False
        self._num_repeated += 1
        return True

    def _must_try_plain(self, factor: float, depths: list[int]) -> bool:
        """Whether it is time for a step without the drafts that seem to pay, whose costs are as the table says times
        the factor."""
        self._num_drafting = self._num_drafting + 1 if any(depths) else 0
        is_familiar = 1 / _SURPRISE < factor / self._familiar_factor < _SURPRISE
        if not is_familiar and self._num_drafting > PROBE_INTERVAL:
            self._familiar_factor, self._plain_interval = factor, _FIRST_PLAIN_INTERVAL
            self._num_drafting = _FIRST_PLAIN_INTERVAL + 1
        if self._num_drafting >= self._plain_interval + _PLAIN_PLANS:
            self._num_drafting, self._plain_interval = 0, min(2 * self._plain_interval, _MAX_PLAIN_INTERVAL)
            return True
        return self._num_drafting > self._plain_interval

    def _count(self, depths: list[int]) -> list[int]:
        for depth in depths:
            self.requests_per_depth[depth] += 1
        return depths

    def _recall(self, costs: _Costs, survivals: _Survivals, limits: tuple[int, ...]) -> list[int]:
        """The best depths, which are asked for the same most of the time: survivals are rounded for this."""
        question = (survivals, limits, costs.drafting_factor, costs.overhead)
        if question not in self._answers:
            if len(self._answers) >= _MAX_ANSWERS:
                self._answers.clear()
            self._answers[question] = _choose(costs, survivals, limits, costs.drafting_factor)
        return self._answers[question]

    def observe(self, request: SpeculationState, num_proposed: int, num_accepted: int) -> None:
        """Learn that of num_proposed drafts that were judged, the first num_accepted were right."""
        self._acceptance(request).update(num_proposed, num_accepted, request.end_probe(num_proposed, num_accepted))
        for position, is_accepted in evidence(num_proposed, num_accepted):
            self.server_acceptance[position] += _SERVER_WEIGHT * (is_accepted - self.server_acceptance[position])

    def record_step(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        num_committed: int,
        seconds: float,
        is_typical: bool = True,
    ) -> None:
        """Learn that a decode step that verified `widths` and proposed `depths` of each request took so long on the
        device and gave num_committed tokens. A step that is not typical, because the draft head caught up, counts where
        drafts come and go, but not when it was a probe."""
        batch = len(widths)
        if self._costs is None or batch == 0 or seconds <= 0:
            return
        plain = self._costs.verify(batch)[0]
        has_drafts = any(depths) or max(widths) > 1
        if has_drafts and self._is_plain:
            lost = min(seconds / plain / self.plain_factor, _MAX_JUMP) - num_committed / batch
            self._probe_budget -= max(0.0, lost)
        if not has_drafts:
            weight = _PLAIN_WEIGHT if self._is_plain else _RARE_PLAIN_WEIGHT
            self.plain_factor += weight * (
                min(seconds / plain, _MAX_PLAIN_JUMP * self.plain_factor) - self.plain_factor
            )
            self._num_seen *= _MEMORY
        elif is_typical or not self._is_plain:
            self._learn_drafting(self._costs, plain, self._costs.added(widths, depths), seconds)
        overhead = self._costs.overhead
        self._measured.add(num_committed / batch * (plain * self.plain_factor + overhead), seconds + overhead)

    def record_overhead(self, seconds: float) -> None:
        """Learn what the host took between two decode steps of the same requests."""
        if self._costs is not None:
            self._overhead += _OVERHEAD_WEIGHT * (max(0.0, seconds) - self._overhead)
            self._costs.overhead = float(f"{self._overhead:.0e}")

    def _learn_drafting(self, costs: _Costs, plain: float, added: float, seconds: float) -> None:
        """A step that the table says takes plain + added seconds. What plain steps do not explain is due to drafts."""
        low, high = _DRAFTING_BOUNDS
        excess = min(seconds / self.plain_factor - plain, high * added)
        # Averages of both rather than of their ratio: where drafts add little, what is measured is mostly noise.
        self._added = self._added or added
        self._excess = self._excess or added
        weight = max(_DRAFTING_WEIGHT, 1 / (self._num_seen + _TABLE_STEPS))
        self._num_seen = min(self._num_seen + 1, 1 / _DRAFTING_WEIGHT)
        self._added += weight * (added - self._added)
        self._excess += weight * (excess - self._excess)
        if self._added > 0:
            factor = min(max(self._excess / self._added, low), high)
            costs.drafting_factor = round(factor, 2)

    def _hopeful_factor(self, costs: _Costs) -> float:
        """What drafts add may cost so little: the less was seen of it lately, the less is known of it."""
        return costs.drafting_factor * self._num_seen / (self._num_seen + _TABLE_STEPS)

    def _acceptance(self, request: SpeculationState) -> Acceptance:
        if request.acceptance is None:
            request.acceptance = Acceptance(self.server_acceptance)
        return request.acceptance

    def _add_probes(
        self,
        costs: _Costs,
        requests: Sequence[SpeculationState],
        survivals: Sequence[Sequence[float]],
        limits: Sequence[int],
        depths: list[int],
    ) -> None:
        """Deepen `depths` where a probe is due and could lead to something."""
        num_plans, self._num_repeated = 1 + self._num_repeated, 0
        for request, depth in zip(requests, depths, strict=True):
            request.settle(depth, num_plans)
        self._is_plain = not any(depths)
        self._probe_budget = min(self._probe_budget + num_plans * _PROBE_SHARE, _MAX_PROBE_BUDGET)
        if self._probe_budget < 0:
            return
        rooms = [limit - depth for limit, depth in zip(limits, depths, strict=True)]
        if not any(room and _is_due(request, 1.0) for request, room in zip(requests, rooms, strict=True)):
            return
        hopes = [
            [*survival[:depth], *[survival[depth - 1] if depth else 1.0] * room]
            for survival, depth, room in zip(survivals, depths, rooms, strict=True)
        ]
        hoped = _choose(costs, hopes, limits, self._hopeful_factor(costs))
        before = costs.rate(survivals, depths)
        for index, request in enumerate(requests):
            if _is_due(request, 0.5) and hoped[index] > depths[index]:
                depths[index] = request.begin_probe()
            elif _is_due(request, 0.5):
                request.num_waiting = 0
        if not self._is_plain:
            self._probe_budget -= 1 - costs.rate(survivals, depths) / before

    def _promise(self, costs: _Costs, survivals: _Survivals, depths: list[int]) -> list[int]:
        """Note what a step with these depths should give and take; the depths again."""
        batch, plain = len(depths), costs.plain(len(depths))
        seconds, num_tokens = plain, float(batch)
        if any(depths):
            seconds, num_tokens = costs.step(depths), _num_expected(survivals, depths)
        self._predicted.add(num_tokens / batch * plain, seconds)
        return depths


def _num_expected(survivals: Sequence[Sequence[float]], depths: Sequence[int]) -> float:
    return len(depths) + sum(sum(survival[:depth]) for survival, depth in zip(survivals, depths, strict=True))


def _is_due(request: SpeculationState, share: float) -> bool:
    return request.num_waiting >= share * request.probe_interval


def _choose(
    costs: _Costs, survivals: Sequence[Sequence[float]], limits: Sequence[int], drafting_factor: float
) -> list[int]:
    """Depths with the most expected tokens per second, as far as `Planner` looks."""
    drafts = sorted(
        (-survival, position, index)
        for index, limit in enumerate(limits)
        for position, survival in enumerate(survivals[index][:limit])
    )
    batch = len(limits)
    best_ratio, best = batch / costs.plain(batch), drafts[:0]
    for longest in range(1, max(limits) + 1):
        chosen = [draft for draft in drafts if draft[1] < longest]
        num_tokens, num_best = float(batch), 0
        for count, seconds in enumerate(costs.prefixes(batch, (draft[1] for draft in chosen), drafting_factor)):
            num_tokens -= chosen[count][0]
            if num_tokens > best_ratio * seconds:
                best_ratio, num_best = num_tokens / seconds, count + 1
        best = chosen[:num_best] or best
    depths = [0] * batch
    for _, _, index in best:
        depths[index] += 1
    return depths


def _num_depths(batch: int, alive: Sequence[int]) -> int:
    """How many different depths there are, given how many requests have more than 0, 1, ... drafts."""
    return sum(more > fewer for more, fewer in itertools.pairwise((batch, *alive, 0)))
