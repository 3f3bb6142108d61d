"""What runs next: chunked prefill, verify steps and their drafts, and the books of both. Policy on the host, no torch.

One step may hold a prefill pass (chunks of several prompts) and a decode pass (every request past its prompt), which
are one pass where the chunks are short enough for it. A step is planned before the results of the last one are known:
lengths are upper bounds, a request whose end the host has not heard of runs once more for nothing, and what a request
leaves behind is carried out in the order of planning.
"""

import bisect
import logging
import time
from collections.abc import Callable
from typing import Any

from server.cache_ops import CacheOp, ClearPage
from server.config import MAX_MTP_STEP, Limits
from server.errors import ModelFailure
from server.messages import Failed, TokenOutput
from server.request import Batch, Outcome, Request, Step, Work
from server.router.admission import Admission, service_order
from server.router.planner import Planner, SpeculationState
from server.router.prompt_pace import PromptPace
from server.router.watchdog import Watchdog

# Verify steps in a row without one accepted draft that are a fault. Where depths adapt, the request goes on
# without drafts.
MAX_REFUSED_STEPS = 64

log = logging.getLogger("tandem.engine")


class Scheduler(Admission):
    """Plans passes of those who have rows, and books what came of them. `planner` chooses how many drafts they get."""

    def __init__(
        self,
        limits: Limits,
        planner: Planner,
        turn_ids: frozenset[int] = frozenset(),
        is_intact: Callable[[int], bool] = lambda handle: True,
        clock: Callable[[], float] = time.monotonic,
        watchdog: Watchdog | None = None,
    ):
        super().__init__(limits, turn_ids, is_intact, clock, watchdog)
        self.planner = planner
        self._after = list[CacheOp]()
        self._pace = PromptPace(limits.stream_slowdown, limits.max_joint_tokens)
        self._collected_at = clock()  # the last step was collected then

    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._notices or self._before)

    def waits_for_results(self) -> bool:
        """Which tokens may come next is known only when those in flight are: nothing can be planned before."""
        return any(request.matcher is not None and request.widths_in_flight for request in self.running)

    def schedule(self) -> Step | None:
        """The next step; requests in it hold rows, and pages for all they may write. None if there is nothing to do."""
        self.cache.begin_step()
        self.end_late_requests()
        shadow = self.watchdog.begin(filter(self._is_current, self.running), self._before)
        if shadow is not None:
            self.add(shadow)
        num_preemptions = self.counters.num_preemptions
        self._reserve_decode_pages()
        if self.counters.num_preemptions == num_preemptions:
            self._admit()
        batches = self._plan_passes()
        step = Step(self._before, batches, self._after, self._pace.is_joint and len(batches) > 1)
        self._before, self._after = [], []
        return step if step.batches or step.before else None

    def collect(self, step: Step, outcomes: list[Outcome]) -> list[TokenOutput | Failed]:
        """Book what a step gave: advance requests, find those that ended, free them."""
        self._learn_times(step, outcomes)
        passes = zip(step.batches, outcomes, strict=True)
        return [output for batch, outcome in passes for output in self._book_pass(batch, outcome)]

    def _book_pass(self, batch: Batch, outcome: Outcome) -> list[TokenOutput | Failed]:
        outputs = []
        for index, (work, accept_len) in enumerate(zip(batch.works, outcome.accept_lens, strict=True)):
            if outcome.prompt_logprobs:
                work.request.keep_scores(work.start, outcome.prompt_logprobs[index])
            if accept_len == 0:
                continue
            work.request.widths_in_flight.pop(0)
            if not work.request.is_over:
                outputs.append(self._book(batch, outcome, index))
        return [output for output in outputs if output is not None]

    def _learn_times(self, step: Step, outcomes: list[Outcome]) -> None:
        """What planner and pace need to know of a step."""
        since, self._collected_at = self._collected_at, self.clock()
        lengths, seconds = {False: 0, True: 0}, {False: 0.0, True: 0.0}  # of the prompts' pass, and of the verify
        for batch, outcome in zip(step.batches, outcomes, strict=True):
            lengths[batch.is_verify], seconds[batch.is_verify] = batch.num_tokens, outcome.seconds
        if step.is_joint:
            seconds[True] = self._pace.collect_joint(lengths[False], lengths[True], seconds[True])
        else:
            self._pace.collect(lengths[False], seconds[False], lengths[True], seconds[True])
        for batch, outcome in zip(step.batches, outcomes, strict=True):
            if batch.is_verify:
                num_tokens, is_typical = sum(outcome.accept_lens), not batch.catches_up
                self.planner.record_step(*batch.widths_and_depths, num_tokens, seconds[True], is_typical)
                if len(step.batches) == 1 and any(work.request.num_steps for work in batch.works):
                    self.planner.record_overhead(self._collected_at - since - outcome.seconds)

    # What a pass gave.

    def _book(self, batch: Batch, outcome: Outcome, index: int) -> TokenOutput | Failed | None:
        work, accept_len = batch.works[index], outcome.accept_lens[index]
        request, is_current = work.request, work.epoch == work.request.epoch
        if self.watchdog.is_shadow(request):
            self._end_check(request)
            return None
        if not outcome.is_finite[index]:
            return self._distrust(request) if is_current else None
        if request.is_isolated and not is_current:
            return None  # it follows on what was not finite, and is computed again
        emitted, finish_reason = request.emit(outcome.token_ids[index][:accept_len])
        if batch.is_verify:
            request.num_computed += accept_len if is_current else 0
            self._count_drafts(work, len(emitted), outcome.match_lens[index], finish_reason is not None)
        self.counters.num_output_tokens += len(emitted)
        request.logprobs += outcome.logprobs[index][: len(emitted)]
        if finish_reason is not None:
            self._end(request, keeps_state=is_current and len(emitted) == accept_len)
        elif request.told_whole and not request.scores:  # an answer to scores is no good without them
            request.keep_back(self.clock())
            return None
        return request.make_output(finish_reason, self.clock())

    def tell(self) -> list[TokenOutput]:
        """What requests that are told whole have kept back."""
        return [request.make_output(None, self.clock()) for request in self._by_id.values() if request.has_untold]

    def _count_drafts(self, work: Work, num_emitted: int, match_len: int, has_ended: bool) -> None:
        request, num_drafts = work.request, work.num_tokens - 1
        num_accepted = min(num_emitted, match_len - 1)
        num_judged = min(num_emitted, num_drafts) if has_ended else num_drafts
        request.num_steps += 1
        request.num_proposed += num_judged
        request.num_accepted += num_accepted
        self.counters.count_drafts(num_judged, num_accepted)
        if num_judged:
            self.planner.observe(request.speculation, num_judged, num_accepted)
            if request.told_whole:
                request.drafted_steps.append((num_judged, num_accepted))
            request.num_refused = 0 if num_accepted else request.num_refused + 1
        if num_judged and request.num_refused == MAX_REFUSED_STEPS:
            what = f"had no draft accepted in {MAX_REFUSED_STEPS} steps"
            self._report(request, "zero_acceptance", what, is_plain=self.planner.is_adaptive)

    def start_version(self) -> None:
        """The weights are others now, nothing is in flight and the cache is flushed: drafts are dropped, and what was
        learned of them."""
        self.give_up_check()
        self.planner.forget()
        for request in self._by_id.values():
            assert not request.widths_in_flight
            request.is_plain &= request.num_refused < MAX_REFUSED_STEPS
            request.num_drafts, request.num_refused, request.speculation = 0, 0, SpeculationState()

    def skip_time(self) -> None:
        """The time since the last step went to something else: it is not what the host takes between two."""
        self._collected_at = self.clock()

    def _end_check(self, shadow: Request) -> None:
        self._end(shadow, keeps_state=False)
        found = self.watchdog.finish()
        if found is not None:
            request, error = found
            self._report(request, "divergence", f"has a state that is off by {error:.3g} of its size")

    def _report(self, request: Request, fault: str, what: str, is_plain: bool = True) -> None:
        """Count and log a fault; `is_plain`: the request goes on without drafts."""
        self.counters.faults[fault] += 1
        request.is_plain |= is_plain
        log.warning("request %s %s%s", request.id, what, "; it goes on without drafts" if is_plain else "")

    def _distrust(self, request: Request) -> Failed | None:
        """Logits that are no numbers: compute everything again, without drafts and without what others computed. The
        second time it fails."""
        self._report(request, "non_finite", "got logits that are not finite")
        has_failed_before = request.is_isolated
        request.is_isolated = True
        holding = self.holdings[request.id]
        self._before += [ClearPage(page) for page in (*holding.own_pages, *holding.duplicates.values())]
        self.flush_cache()  # what it has shared may be no better
        if not has_failed_before:
            self._leave(request, keeps_state=False)
            bisect.insort(self.waiting, request, key=service_order)
            return None
        self._end(request, keeps_state=False)
        message = "the model gave logits that are not finite, again after everything was computed anew"
        return Failed(request.id, ModelFailure.__name__, message)

    # What a step runs.

    def _plan_passes(self) -> list[Batch]:
        """A prefill and a verify. The depths of all that have a next step are chosen together."""
        decoding = [request for request in self.running if request.is_decoding and not request.surely_ends]
        decoding.sort(key=lambda request: -request.num_drafts)  # equal widths side by side
        chunks = self._cut_chunks([1 + request.num_drafts for request in decoding])
        ending = [request for request, end in chunks if end == request.num_known]
        ending = [request for request in ending if len(request.output_ids) + 1 < request.max_output]
        depths = dict(zip([*decoding, *ending], self._plan_depths([*decoding, *ending]), strict=True))
        verify = [self._verify_work(request, depths[request]) for request in decoding]
        prefill = [self._prefill_work(request, end, depths.get(request, 0)) for request, end in chunks]
        batches = (Batch(prefill, is_verify=False), Batch(verify, is_verify=True))
        return [batch for batch in batches if batch.works]

    def _plan_depths(self, requests: list[Request]) -> list[int]:
        """Drafts to propose at the end of the coming pass, never more than the request can still use."""
        for request in requests:
            asked = request.sampling.max_draft
            most = 0 if request.is_plain else self.limits.mtp_step if asked is None else asked
            room = request.max_output - len(request.output_ids) - len(request.widths_in_flight) - 2
            request.speculation.max_draft = max(0, min(most, self.limits.mtp_step, room))
        return self.planner.plan([request.speculation for request in requests])

    def _verify_work(self, request: Request, depth: int) -> Work:
        width = request.num_drafts + 1
        is_idle = depth == 0 and width == 1 and self.limits.max_behind > 0
        work = self._work(request, width, num_drafts=depth, num_behind=request.num_behind, is_idle=is_idle)
        request.num_drafts = depth
        request.num_behind = min(request.num_behind + 1, self.limits.max_behind) if is_idle else 0
        request.widths_in_flight.append(width)
        return work

    def _cut_chunks(self, widths: list[int]) -> list[tuple[Request, int]]:
        """Who computes known tokens in this step, and up to where, beside requests that decode so many tokens each."""
        waiting = [request for request in self.running if not request.is_decoding]
        room, most_joint = self.limits.chunked_prefill_size, self.limits.max_joint_tokens
        budget = self._pace.budget(widths, len(waiting), room)
        room = min(room, most_joint) if budget <= most_joint else room
        chunks = []
        for request in waiting:
            if budget > 0:
                start, rest = request.num_computed, request.num_known - request.num_computed
                is_short = rest < 1.5 * budget and rest <= room
                size = rest if is_short else budget  # a short rest is not worth a pass of its own
                end = min([start + size, request.num_known, *(cut for cut in request.cuts if cut > start)])
                chunks.append((request, end))
                budget, room = budget - (end - start), room - (end - start)
        self._pace.plan(sum(end - request.num_computed for request, end in chunks), len(widths) > 0)
        return chunks

    def _prefill_work(self, request: Request, end: int, depth: int) -> Work:
        start, ends_prompt = request.num_computed, end == request.num_known
        work = self._work(
            request,
            end - start,
            start=start,
            token_ids=tuple(request.known_ids(start, end)),
            following_ids=tuple(request.known_ids(end, end + MAX_MTP_STEP)),
            ends_prompt=ends_prompt,
            num_drafts=depth,
            num_scored=request.count_scored(start, end),
        )
        request.num_computed, request.is_decoding, request.num_drafts = end, ends_prompt, depth
        if ends_prompt:
            request.widths_in_flight.append(0)
            self.watchdog.compare(request, self._after)
        if not self.watchdog.is_shadow(request):
            self.counters.num_prompt_tokens += request.count_prompt()
        self._keep_prefix(request)
        return work

    def _work(self, request: Request, num_tokens: int, **fields: Any) -> Work:
        """With the pages that the device does not know of yet, and what it must know of a request new to its row."""
        assert request.row is not None
        holding, sent = self.holdings[request.id], request.num_pages_sent
        pages = holding.page_list[sent:] if holding.num_pages > sent else []
        request.num_pages_sent = holding.num_pages
        return Work(
            request=request,
            row=request.row,
            num_tokens=num_tokens,
            epoch=request.epoch,
            first_page=sent,
            pages=tuple(pages),
            output_ids=tuple(request.output_ids) if sent == 0 else None,
            **fields,
        )

    def _keep_prefix(self, request: Request) -> None:
        """Let others use what the chunk computes; a chunk that ends where reuse begins leaves a checkpoint."""
        if request.is_isolated:
            return
        assert request.row is not None
        holding, end = self.holdings[request.id], request.num_computed
        known = request.known_ids(0, end)
        if end in request.cuts:
            self.cache.add_checkpoint(holding, known, end, request.row, self._before, self._after)
        else:
            self.cache.extend(holding, known, end)
