"""The heart of the engine process: one `step()` schedules, verifies, accepts, drafts and commits.

The router (policy, no torch) decides who runs; the backend (device) runs it; they meet only here. The host plans step
t + 1 while the device runs step t, and hears of step t when it has handed step t + 1 over: lengths, accepted tokens and
drafts stay on the device in between. Where tokens are masked, which takes the host (`OutputMatcher`), step t + 1 waits
for step t.
"""

import logging
import math
import random
from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from server.backend.batch import build_forward_batch, drawn_rows, update_table
from server.backend.grammar_compiler import GrammarCompiler
from server.backend.grammar_queue import GrammarQueue
from server.backend.lane import Lane, NoTrace, Readback, Trace
from server.backend.memory_plan import memory_parts
from server.backend.pass_masks import DraftMasks, RowMasks
from server.backend.pass_result import PassLogprobs, PassResult, Stopwatch
from server.backend.prompt_scores import score_prompts
from server.backend.request_table import has_penalty
from server.backend.runner import build_runner
from server.backend.sampler import Sampled
from server.backend.step_costs import measure_costs
from server.config import EngineConfig
from server.control import Control, Done
from server.engine_control import EngineControl
from server.errors import InvalidRequest
from server.messages import EngineStats, Failed, Generate, Ready, SamplingParams, TokenOutput
from server.request import Batch, Request, Step
from server.router.cost_table import CostTable
from server.router.planner import Planner
from server.router.scheduler import Scheduler
from server.router.watchdog import Watchdog

_PROBE_PROMPT_LEN, _PROBE_OUTPUT_LEN = 48, 24
# How often to look whether a command can go on, and whether the time of a request is over in a pause.
_COMMAND_SECONDS, _PAUSE_SECONDS = 0.002, 0.05

log = logging.getLogger("tandem.engine")


class Engine:
    """Serves one checkpoint. Not thread-safe: one caller adds, aborts and steps. Knows token ids, never text."""

    def __init__(self, config: EngineConfig):
        """Load the model and allocate the caches. Raises ConfigError."""
        self.config = config
        self.runner = build_runner(config)
        self.lane = Lane(is_threaded=self.runner.overlaps and not self.runner.table.seq_len.is_cuda)
        self.trace: Trace | NoTrace = NoTrace()
        is_adaptive = config.speculation == "adaptive" and self.runner.drafter is not None
        samples = measure_costs(self.runner, config.mtp_step) if is_adaptive else None
        planner = Planner(config.mtp_step, samples and CostTable.from_samples(*samples), is_adaptive)
        mover = self.runner.mover
        watchdog = Watchdog(config.watchdog, 0, self.runner.state_tolerance, lambda: mover.state_error)
        self.scheduler = Scheduler(
            self.runner.plan.limits, planner, self.runner.turn_ids, mover.is_intact, watchdog=watchdog
        )
        plan, table = self.runner.plan, self.runner.table
        self.ready = Ready(
            max_model_len=plan.max_model_len,
            vocab_size=table.vocab_size,
            eos_token_ids=self.runner.eos_ids,
            mtp_step=config.mtp_step,
            dtype=str(table.cache.kv.data.dtype).removeprefix("torch."),
            device=str(table.device),
            max_running_requests=plan.limits.max_running_requests,
            page_size=plan.limits.page_size,
            num_pages=plan.limits.num_pages,
            num_checkpoints=plan.limits.num_checkpoints,
            memory_bytes=memory_parts(plan),
        )
        compiler = GrammarCompiler(config.model, table.vocab_size, self.runner.eos_ids)
        self.grammars = GrammarQueue(compiler, self.runner.eos_ids, table.vocab_size)
        self.masks = RowMasks(table.vocab_size, table.device)
        self.controls = EngineControl(self.runner, self.scheduler, self.grammars, self.drain, self.flush_cache)
        self._num_steps = 0
        self._in_flight: tuple[Step, Future[list[PassResult]]] | None = None
        if config.watchdog:
            self._probe()

    def add(self, message: Generate) -> None:
        """Queue a request. Raises InvalidRequest for what can never be served."""
        prompt_ids, limit = message.prompt_token_ids, self.ready.max_model_len
        least_output = 0 if message.sampling.max_tokens == 0 else 1
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty, at least one token is needed", "prompt")
        if len(prompt_ids) + least_output > limit:
            rest = ", and at least one is needed for the output" if least_output else ""
            raise InvalidRequest(
                f"This model's maximum context length is {limit} tokens. However, your prompt has {len(prompt_ids)} "
                f"tokens{rest}: the prompt is too long (--max-model-len)",
                "prompt",
            )
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self.ready.vocab_size:
            raise InvalidRequest(f"prompt token ids must lie in 0..{self.ready.vocab_size - 1}", "prompt")
        message.sampling.check(self.ready.vocab_size)
        seconds = self.config.request_timeout if message.timeout is None else message.timeout
        deadline = float("inf") if seconds is None else self.scheduler.clock() + seconds
        request = Request.create(message, self.ready.eos_token_ids, limit, deadline)
        if message.sampling.is_masked:
            self.grammars.add(request)
        else:
            self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Drop a request; its row and pages are free at the next step. Unknown ids are ignored."""
        self.grammars.remove(request_id)
        self.scheduler.abort(request_id)

    def control(self, command: Control) -> None:
        """Take a command; `take_done` says what became of it."""
        self.controls.add(command)

    def take_done(self) -> list[Done]:
        """The commands that have been carried out or refused."""
        return self.controls.take_done()

    @property
    def is_changing(self) -> bool:
        """What was emitted so far must be told before the next step, which begins with other weights."""
        return self.controls.is_changing

    @property
    def patience(self) -> float:
        """After so many seconds there may be work that no message brought: a command can go on, or the time of a
        request is over."""
        if self.controls.is_waiting:
            return _COMMAND_SECONDS
        return _PAUSE_SECONDS if self.controls.is_frozen else math.inf

    def has_work(self) -> bool:
        """Some request waits or runs, or a step is under way; in a pause, some time is over. Or a command can go on."""
        if self.controls.is_frozen:
            works = self.scheduler.has_late_requests()
        else:
            works = self._in_flight is not None or self.scheduler.has_work()
        return works or len(self.grammars) > 0 or self.controls.has_work()

    def step(self) -> list[TokenOutput | Failed]:
        """Hand the device one step (a prefill pass and a decode pass, whichever have work, or both in one) and return
        what the step before it emitted; without overlap, what this one did."""
        outputs = self.controls.advance()
        if self.is_changing:
            return outputs
        outputs += self._take_ready()
        if self.controls.is_frozen:
            self.scheduler.end_late_requests()
            return outputs + self.scheduler.take_notices()
        if self.scheduler.waits_for_results():
            outputs += self.drain()
        with self.trace.span("schedule", "host"):
            step = self.scheduler.schedule()
        ended, self._in_flight = self._in_flight, None
        if step is not None:
            self._num_steps += 1
            self._in_flight = step, self.lane.submit(self._run, step)
        outputs += self.scheduler.take_notices()
        if ended is not None:
            outputs += self._collect(*ended)
        return outputs if self.runner.overlaps else outputs + self.drain()

    def drain(self) -> list[TokenOutput | Failed]:
        """Wait for the step under way, if there is one, and return what it emitted; nothing new is planned."""
        ended, self._in_flight = self._in_flight, None
        return [] if ended is None else self._collect(*ended)

    def tell(self) -> list[TokenOutput]:
        """What requests that are told whole have emitted and `step` has not returned."""
        return self.scheduler.tell()

    def _take_ready(self) -> list[TokenOutput | Failed]:
        """Hand the scheduler the requests whose grammars are compiled; the others' failures."""
        if not len(self.grammars):
            return []
        if self._in_flight is None and not self.scheduler.has_work():
            self.grammars.wait()
        ready, failed = self.grammars.take(self.scheduler.clock())
        for request in ready:
            self.scheduler.add(request)
        return [*failed]

    def _collect(self, step: Step, future: "Future[list[PassResult]]") -> list[TokenOutput | Failed]:
        with self.trace.span("wait", "host"):
            outcomes = [result.read() for result in future.result()]
        with self.trace.span("collect", "host"):
            outputs = self.scheduler.collect(step, outcomes)
            return self._end_failed(step, outputs) if any(batch.has_matchers for batch in step.batches) else outputs

    def _end_failed(self, step: Step, outputs: list[TokenOutput | Failed]) -> list[TokenOutput | Failed]:
        """The same, but those whose grammar cannot be followed any further have failed."""
        requests = [work.request for batch in step.batches for work in batch.works]
        failures = {request.id: request.matcher.failure for request in requests if request.matcher is not None}
        failures = {request_id: failure for request_id, failure in failures.items() if failure is not None}
        kept = [output for output in outputs if output.request_id not in failures]
        for request_id, failure in failures.items():
            self.scheduler.abort(request_id)
            kept.append(Failed(request_id, InvalidRequest.__name__, failure.message, failure.param))
        return kept

    @torch.inference_mode()
    def _run(self, step: Step) -> list[PassResult]:
        """On the device: cache operations and passes in their order."""
        passes = [step.batches] if step.is_joint else [[batch] for batch in step.batches]
        with self.trace.span("step", "device", passes=len(passes)):
            self.runner.mover.run(step.before)
            results = [result for batches in passes for result in self._run_pass(batches)]
            self.runner.mover.run(step.after)
            return results

    def _run_pass(self, batches: list[Batch]) -> list[PassResult]:
        """One batch, or prompts and a verify that share a pass."""
        runner, watch, first = self.runner, Stopwatch(self.runner.table.device), batches[0]
        for batch in batches:
            update_table(batch, runner.table)
        is_eager = first.has_matchers or first.wants_processed
        if first.is_verify and runner.decode is not None and not is_eager:
            with self.trace.span("decode", "device", rows=first.num_tokens):
                return [self._result(runner.decode.run(first), first, watch)]
        forwards = [build_forward_batch(batch, runner.table) for batch in batches]
        token_ids = [forward.token_ids for forward in forwards]
        read_masks = self.masks.start(batches, token_ids)
        name = "joint" if len(batches) > 1 else "verify" if first.is_verify else "prefill"
        with self.trace.span(name, "device", rows=sum(map(len, token_ids))):
            hidden = runner.target.forward_jointly(forwards)  # KV is written, GDN folds accepted tokens, then verifies
            logits = self._compute_logits([drawn_rows(*each) for each in zip(batches, forwards, hidden, strict=True)])
            inputs = zip(logits, forwards, batches, read_masks(), strict=True)
            samples = [runner.sampler.sample(*each) for each in inputs]
            scores = [score_prompts(runner.target, runner.table, *each) for each in zip(hidden, batches, strict=True)]
        results = []
        for batch, forward, states, sampled, scored in zip(batches, forwards, hidden, samples, scores, strict=True):
            if any(has_penalty(work.sampling) for work in batch.works):  # of the drafts and of later steps
                runner.table.count_outputs(forward, sampled.token_ids, sampled.accept_lens)
            newest = sampled.token_ids.gather(1, (sampled.accept_lens - 1).clamp(min=0)[:, None])
            drafts = newest[:, :0]
            if runner.drafter is not None and not batch.is_idle:
                with self.trace.span("draft", "device"):
                    guide = DraftMasks(batch, sampled) if batch.has_matchers else None
                    drafts = runner.drafter.propose(states, sampled, forward, batch, guide)
            runner.table.commit(forward, newest[:, 0], drafts, sampled.accept_lens)
            results.append(self._result(sampled, batch, watch, scored))
        return results

    def _compute_logits(self, rows: list[Tensor]) -> Sequence[Tensor]:
        """Of each batch's rows [n, H], [n, V]: the output head is read once, and not at all for none."""
        counts = [len(part) for part in rows]
        if not any(counts):
            return [part.new_empty(0, self.runner.table.vocab_size) for part in rows]
        return self.runner.target.compute_logits(rows[0] if len(rows) == 1 else torch.cat(rows)).split(counts)

    def _result(
        self, sampled: Sampled, batch: Batch, watch: Stopwatch, scores: PassLogprobs | None = None
    ) -> PassResult:
        """What the host will read of a pass, on its way."""
        readback = Readback(sampled.token_ids, sampled.accept_lens, sampled.match_lens, sampled.is_finite)
        return PassResult(readback, self.runner.sampler.logprobs(sampled, batch), watch.stop(), scores)

    def _probe(self) -> None:
        """Serve one request at start and check its state, so that a broken machine or build is told before it
        serves."""
        prompt_len = min(_PROBE_PROMPT_LEN, self.ready.max_model_len // 2)
        prompt = random.Random(0).choices(range(self.ready.vocab_size), k=prompt_len)
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=_PROBE_OUTPUT_LEN)
        watchdog, interval = self.scheduler.watchdog, self.scheduler.watchdog.interval
        watchdog.interval = 1
        self.add(Generate("probe", prompt, params))
        while self.has_work():
            self.step()
        watchdog.interval = interval
        accept_length = 1 + self.scheduler.counters.num_accepted / max(1, self.scheduler.counters.num_verify_steps)
        log.info(
            "start-up probe: %d checks, state off by %.2g at most (limit %.2g), accept length %.2f",
            watchdog.num_checks,
            watchdog.worst_error,
            watchdog.tolerance,
            accept_length,
        )
        self.flush_cache()

    def start_trace(self) -> Trace:
        """Record what host and device do from now on."""
        self.trace = Trace()
        return self.trace

    def flush_cache(self) -> None:
        """Forget every prefix that was computed, because the weights are others now."""
        self.scheduler.flush_cache()
        self.lane.submit(self.runner.mover.run, self.scheduler.take_ops())  # there may be no step for a while
        self.lane.submit(self.runner.mover.start_generation)

    def stats(self) -> EngineStats:
        """Gauges now, and counters since start."""
        scheduler, counters, planner = self.scheduler, self.scheduler.counters, self.scheduler.planner
        cache, versions = scheduler.cache, self.controls.versions
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting + len(self.grammars),
            num_pages=scheduler.pages.count,
            num_free_pages=scheduler.pages.num_free + cache.num_evictable,
            num_steps=self._num_steps,
            num_verify_steps=counters.num_verify_steps,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_output_tokens=counters.num_output_tokens,
            num_preemptions=counters.num_preemptions,
            num_proposed=counters.num_proposed,
            num_accepted=counters.num_accepted,
            accepted_per_position=tuple(counters.accepted_per_position),
            proposed_per_position=tuple(counters.proposed_per_position),
            requests_per_depth=tuple(planner.requests_per_depth),
            predicted_gain=planner.predicted_gain,
            measured_gain=planner.measured_gain,
            num_cached_pages=cache.num_cached_pages,
            num_checkpoints=cache.num_checkpoints,
            num_free_checkpoints=cache.num_free_checkpoints,
            host_cache_bytes_used=cache.host_bytes_used,
            num_cached_tokens=cache.counters.num_cached_tokens,
            num_cache_hits=cache.counters.num_hits,
            cache_misses=dict(cache.counters.misses),
            num_evicted_pages=cache.counters.num_evicted_pages,
            num_evicted_checkpoints=cache.counters.num_evicted_checkpoints,
            num_host_hits=cache.counters.num_host_hits,
            num_host_refused=cache.counters.num_host_refused,
            num_timeouts=counters.num_timeouts,
            faults=dict(counters.faults),
            weight_version=versions.weight_version,
            mtp_weight_version=versions.mtp_weight_version,
            mtp_stale=versions.is_stale,
            is_paused=self.controls.is_paused,
            is_frozen=self.controls.is_frozen,
            released_tags=tuple(sorted(self.runner.released.tags)),
            num_weight_updates=versions.num_updates,
            drafts_by_version=versions.drafts,
        )
