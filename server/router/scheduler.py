"""Who runs next: admission, chunked prefill, page reservation, preemption. Policy on the host, no torch.

One step may hold a prefill batch (chunks of several prompts, at most `chunked_prefill_size` tokens) and a decode batch
(every request past its prompt), so a long prompt delays the others by one chunk at a time.
"""

from collections import deque
from dataclasses import dataclass, field

from server.config import Limits
from server.messages import TokenLogprobs, TokenOutput
from server.request import Batch, Request
from server.router.pages import Pool


@dataclass
class Counters:
    """Totals since start. Drafts behind the token that ends a request are not judged, so they do not count."""

    num_verify_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_proposed: int = 0
    num_accepted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)


class Scheduler:
    """Owns requests, pages and rows. Requests are served first come, first served; the youngest is preempted."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.pages = Pool(limits.num_pages)
        self.rows = Pool(limits.max_running_requests)
        self.counters = Counters(accepted_per_position=[0] * limits.mtp_step)
        self._by_id: dict[str, Request] = {}

    def add(self, request: Request) -> None:
        """Queue a request. Its longest form fits the cache: the engine checks max_model_len against it at start."""
        self._by_id[request.id] = request
        self.waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Drop a request and free what it holds; an unknown id is one that has already ended."""
        request = self._by_id.pop(request_id, None)
        if request is None:
            return
        if request in self.running:
            self._release(request)
        else:
            self.waiting.remove(request)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> list[Batch]:
        """The batches of one step, prefill first; requests in a batch hold rows, and pages for all they may write."""
        num_preemptions = self.counters.num_preemptions
        self._reserve_decode_pages()
        if self.counters.num_preemptions == num_preemptions:
            self._admit()
        decode = [request for request in self.running if request.is_decoding]
        batches = [self._cut_chunks(), Batch(decode, [self.limits.mtp_step + 1] * len(decode), is_verify=True)]
        return [batch for batch in batches if batch.requests]

    def collect(
        self, batch: Batch, token_ids: list[list[int]], accept_lens: list[int], logprobs: list[list[TokenLogprobs]]
    ) -> list[TokenOutput]:
        """Book what a pass gave: advance requests, find those that ended, free them.

        token_ids: the target's tokens per request; the first accept_lens of each count (0 for an unfinished prompt).
        """
        outputs = []
        for index, (request, accept_len) in enumerate(zip(batch.requests, accept_lens, strict=True)):
            request.num_computed += accept_len if batch.is_verify else batch.token_counts[index]
            self.counters.num_prompt_tokens += request.count_prompt()
            if accept_len == 0:
                continue
            request.is_decoding = True
            emitted, finish_reason = request.emit(token_ids[index][:accept_len])
            if batch.is_verify:
                self._count_drafts(request, len(emitted), accept_len, finish_reason is not None)
            self.counters.num_output_tokens += len(emitted)
            if finish_reason is not None:
                self._by_id.pop(request.id)
                self._release(request)
            outputs.append(_to_output(request, emitted, logprobs[index][: len(emitted)], finish_reason))
        return outputs

    def _count_drafts(self, request: Request, num_emitted: int, accept_len: int, has_ended: bool) -> None:
        num_accepted = min(num_emitted, accept_len - 1)
        num_judged = min(num_emitted, self.limits.mtp_step) if has_ended else self.limits.mtp_step
        request.num_steps += 1
        request.num_proposed += num_judged
        request.num_accepted += num_accepted
        self.counters.num_verify_steps += 1
        self.counters.num_proposed += num_judged
        self.counters.num_accepted += num_accepted
        for position in range(num_accepted):
            self.counters.accepted_per_position[position] += 1

    def _reserve_decode_pages(self) -> None:
        """Give every decoding request the pages it may write, oldest first; the youngest pays when there are none."""
        for request in list(self.running):
            if request.row is None or not request.is_decoding:
                continue
            needed = self.limits.pages_for(request.num_computed) - len(request.pages)
            while needed > self.pages.num_free and request.row is not None:
                self._preempt(self.running[-1])
            if request.row is not None and needed > 0:
                request.pages += self.pages.take(needed)

    def _admit(self) -> None:
        while self.waiting and self.rows.num_free:
            request = self.waiting[0]
            needed = self.limits.pages_for(request.num_known)
            if needed + self._num_pages_kept_free() > self.pages.num_free:
                return
            self.waiting.popleft()
            request.row = self.rows.take(1)[0]
            request.pages = self.pages.take(needed)
            self.running.append(request)

    def _num_pages_kept_free(self) -> int:
        """What the running requests may need at their next step: who is admitted now should not be preempted then."""
        return len(self.running) * -(-(self.limits.mtp_step + 1) // self.limits.page_size)

    def _cut_chunks(self) -> Batch:
        budget = self.limits.chunked_prefill_size
        requests, counts = [], []
        for request in self.running:
            if request.is_decoding or budget == 0:
                continue
            counts.append(min(budget, request.num_known - request.num_computed))
            requests.append(request)
            budget -= counts[-1]
        return Batch(requests, counts, is_verify=False)

    def _preempt(self, request: Request) -> None:
        self.counters.num_preemptions += 1
        self._release(request)
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        assert request.row is not None
        self.running.remove(request)
        self.rows.give_back([request.row])
        self.pages.give_back(request.pages)
        request.forget_device_state()


def _to_output(
    request: Request, emitted: list[int], logprobs: list[TokenLogprobs], finish_reason: str | None
) -> TokenOutput:
    last = emitted[-1]
    ended_by_request = finish_reason == "stop" and last in request.sampling.stop_token_ids
    return TokenOutput(
        request_id=request.id,
        token_ids=emitted,
        logprobs=logprobs,
        finish_reason=finish_reason,
        stop_token_id=last if ended_by_request else None,
        num_steps=request.num_steps,
        num_proposed=request.num_proposed,
        num_accepted=request.num_accepted,
    )
