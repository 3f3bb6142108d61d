"""Who has a row: admission, prefix reuse, page reservation, preemption, and every way for a request to end early.

Policy on the host, no torch. Knows nothing of passes.
"""

import bisect
import math
from collections.abc import Callable, Collection

from server.cache_ops import CacheOp
from server.config import Limits
from server.errors import RequestTimeout
from server.messages import FINISH_ABORT, Failed, TokenOutput
from server.request import Request
from server.router.counters import Counters
from server.router.pages import Pool
from server.router.planner import SpeculationState
from server.router.prefix_cache import MIN_CHECKPOINT_GAP, Holding, Match, PrefixCache, choose_cuts
from server.router.watchdog import Watchdog

# Waiting requests that one step passes over because they cannot be admitted yet.
_MAX_PASSED_OVER = 64


class Admission:
    """Owns requests, pages and rows. The lowest `priority` is served first, then who came first; the last in this order
    is preempted. `turn_ids` are tokens that begin a turn of a chat; `is_intact` asks the device about host entries."""

    def __init__(
        self,
        limits: Limits,
        turn_ids: frozenset[int],
        is_intact: Callable[[int], bool],
        clock: Callable[[], float],
        watchdog: Watchdog | None,
    ):
        self.watchdog = watchdog or Watchdog(0, 0, 0.0, lambda: 0.0)
        self.limits, self.clock, self._turn_ids = limits, clock, turn_ids
        self.waiting: list[Request] = []  # in the order of service
        self.running: list[Request] = []  # in the order of admission
        self.pages = Pool(limits.num_pages)
        self.rows = Pool(limits.max_running_requests)
        self.cache = PrefixCache(limits, self.pages, is_intact)
        self.holdings: dict[str, Holding] = {}  # of the running ones, by id
        proposed, accepted = ([0] * limits.mtp_step for _ in range(2))
        self.counters = Counters(proposed_per_position=proposed, accepted_per_position=accepted)
        self._held: list[Request] | None = None  # what came since `hold_back`
        self._awaited: Collection[str] = ()
        self._by_id: dict[str, Request] = {}
        self._timed: dict[str, Request] = {}  # those with a deadline
        self._before = list[CacheOp]()
        self._notices: list[TokenOutput | Failed] = []
        self._num_arrived = 0

    def add(self, request: Request) -> None:
        """Queue a request. Its longest form fits the cache: the engine checks max_model_len against it at start."""
        self._num_arrived += 1
        request.arrival, request.added_at = self._num_arrived, self.clock()
        request.speculation = SpeculationState()
        self._by_id[request.id] = request
        if request.deadline < math.inf:
            self._timed[request.id] = request
        if self._held is None or request.id in self._awaited:
            bisect.insort(self.waiting, request, key=service_order)
        else:
            self._held.append(request)

    def abort(self, request_id: str) -> None:
        """Drop a request and free what it holds; an unknown id is one that has already ended."""
        request = self._by_id.get(request_id)
        if request is not None:
            self._end(request, keeps_state=True)

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self.waiting) + len(self._held or ())

    def flush_cache(self) -> None:
        """The weights are others now: nothing that was computed may be reused."""
        self.cache.flush(self._before)

    def take_ops(self) -> list[CacheOp]:
        """What the next step would carry out first."""
        ops, self._before = self._before, []
        return ops

    def take_notices(self) -> list[TokenOutput | Failed]:
        """Ends that no pass has brought about."""
        notices, self._notices = self._notices, []
        return notices

    # For pauses and weight updates, between two steps with nothing in flight.

    def hold_back(self, awaited: Collection[str]) -> None:
        """Nobody who comes is admitted until `let_in`, but for the requests `awaited`, which are on their way."""
        self._held, self._awaited = [], awaited

    def let_in(self) -> None:
        """Those that were held back wait like all others now."""
        held, self._held = self._held or [], None
        for request in held:
            bisect.insort(self.waiting, request, key=service_order)

    def __contains__(self, request_id: str) -> bool:
        """It waits or runs."""
        return request_id in self._by_id

    @property
    def num_begun(self) -> int:
        """Requests that have tokens or a row."""
        return sum(request.row is not None or bool(request.output_ids) for request in self._by_id.values())

    def in_flight(self) -> set[str]:
        """The requests that were not held back."""
        return self._by_id.keys() - {request.id for request in self._held or ()}

    def end_all(self) -> int:
        """Every request ends with what it has, as a notice says; how many there were."""
        self.give_up_check()
        ended = list(self._by_id.values())
        for request in ended:
            self._end(request, keeps_state=True)
            self._notices.append(request.make_output(FINISH_ABORT, self.clock()))
        return len(ended)

    def retract(self) -> int:
        """All that run wait again in their places and leave nothing that they computed; how many there were."""
        self.give_up_check()
        retracted = list(self.running)
        for request in retracted:
            self._leave(request, keeps_state=False, shares=False)
            bisect.insort(self.waiting, request, key=service_order)
        return len(retracted)

    def give_up_check(self) -> None:
        """The watchdog's shadow, if there is one, ends without a verdict."""
        shadow = self.watchdog.cancel()
        if shadow is not None:
            self._end(shadow, keeps_state=False)

    # Rows and pages.

    def _reserve_decode_pages(self) -> None:
        """Give every decoding request the pages it may write, first served first; the last one pays if there are
        none."""
        for request in sorted(self.running, key=service_order):
            if request.row is None or not request.is_decoding:
                continue
            holding = self.holdings[request.id]
            needed = self.limits.pages_for(request.longest_len) - holding.num_pages
            while needed > 0 and request.row is not None and not self.cache.free_pages(needed, self._before):
                self._preempt(max(self.running, key=service_order))
            if request.row is not None and needed > 0:
                holding.own_pages += self.pages.take(needed)

    def _admit(self) -> None:
        position = 0
        while position < min(len(self.waiting), _MAX_PASSED_OVER) and self.rows.num_free:
            request = self.waiting[position]
            known = request.known_ids(0, request.num_known)
            match = self._match(request, known)
            if request.widths_in_flight or self._is_being_computed(request, known, match.position):
                position += 1
            elif self._enter(request, known, match) or (not self.running and self._enter_anew(request, known)):
                self.running.append(self.waiting.pop(position))
            else:
                return

    def _match(self, request: Request, known: list[int]) -> Match:
        if request.wants_scores:
            return Match(request.cache_salt, reason="prompt_logprobs")
        return self.cache.match([] if request.is_isolated else known, request.cache_salt)

    def _enter(self, request: Request, known: list[int], match: Match) -> bool:
        """Give the request a row, what it can reuse, and pages for the rest; False if there are not enough."""
        needed = self.limits.pages_for(request.num_known) - match.position // self.limits.page_size
        room = (
            self.pages.num_free
            + self.cache.num_evictable
            - sum(node.page > 0 and not node.num_users for node in match.nodes)
        )
        if needed + self._num_pages_kept_free() > room:
            return False
        row = self.rows.take(1)[0]
        reused = self.cache.acquire(match, row, self._before) if match.position else None
        holding = reused or self.cache.hold(request.cache_salt)
        needed = self.limits.pages_for(request.num_known) - holding.num_pages
        if not self.cache.free_pages(needed, self._before):
            self.cache.finish(holding, [], 0, row, self._before)
            self.rows.give_back([row])
            return False
        if request.num_cached is None and not request.is_isolated:
            self.cache.count(match, reused is not None)
        holding.own_pages += self.pages.take(needed)
        self.holdings[request.id] = holding
        request.enter_row(row, match.position if reused else 0, self.clock())
        request.cuts = choose_cuts(self.limits, self._turn_ids, known, request.num_computed, match.shared_len)
        return True

    def _enter_anew(self, request: Request, known: list[int]) -> bool:
        """Where nobody will give pages back: what it would reuse may be what takes its room."""
        return self._enter(request, known, Match(request.cache_salt, reason="no room"))

    def _is_being_computed(self, request: Request, known: list[int], num_reused: int) -> bool:
        """Somebody in prefill has more of the same beginning: it can be reused in a moment."""
        end = num_reused + MIN_CHECKPOINT_GAP
        if end >= len(known) or not self.limits.num_checkpoints or request.is_isolated or request.wants_scores:
            return False
        return any(
            not other.is_decoding
            and not other.is_isolated
            and self._is_current(other)
            and other.cache_salt == request.cache_salt
            and other.known_ids(0, end) == known[:end]
            for other in self.running
        )

    def _num_pages_kept_free(self) -> int:
        """What the running requests may need at their next step: who is admitted now should not be preempted then."""
        return len(self.running) * -(-(self.limits.mtp_step + 1) // self.limits.page_size)

    def _preempt(self, request: Request) -> None:
        self.counters.num_preemptions += 1
        self._leave(request, keeps_state=True)
        bisect.insort(self.waiting, request, key=service_order)

    def _is_current(self, request: Request) -> bool:
        """Since the running request began no weights have changed, and what it computes may be others'."""
        return self.holdings[request.id].generation == self.cache.generation

    def has_late_requests(self) -> bool:
        """Some request's time is over."""
        return any(request.deadline < self.clock() for request in self._timed.values())

    def end_late_requests(self) -> None:
        """End those whose time is over, as notices say."""
        now = self.clock()
        for request in [request for request in self._timed.values() if request.deadline < now]:
            self.counters.num_timeouts += 1
            self._end(request, keeps_state=True)
            if request.output_ids:
                self._notices.append(request.make_output(FINISH_ABORT, now))
            else:
                message = "the request's time was over before its first token; raise timeout (or --request-timeout)"
                self._notices.append(Failed(request.id, RequestTimeout.__name__, message))

    def _end(self, request: Request, keeps_state: bool) -> None:
        del self._by_id[request.id]
        self._timed.pop(request.id, None)
        request.is_over = True
        if request.row is not None:
            self._leave(request, keeps_state)
        elif self._held and request in self._held:
            self._held.remove(request)
        else:
            self.waiting.remove(request)

    def _leave(self, request: Request, keeps_state: bool, shares: bool = True) -> None:
        """Give back row and pages; if it `shares`, what was computed stays for others, with a checkpoint where the
        state stands."""
        assert request.row is not None
        holding = self.holdings.pop(request.id)
        length = min(request.num_computed, request.num_known)  # tokens behind a stop are not known
        if request.is_isolated or not shares:
            self.cache.finish(holding, [], 0, request.row, self._before)
        else:
            keeps_state = keeps_state and request.is_decoding
            known = request.known_ids(0, length)
            self.cache.finish(holding, known, length, request.row, self._before, length if keeps_state else None)
        self.running.remove(request)
        self.rows.give_back([request.row])
        request.leave_row()


def service_order(request: Request) -> tuple[int, int]:
    """Who has less is served first."""
    return request.priority, request.arrival
