"""The heart of the engine process: one `step()` schedules, verifies, accepts, drafts and commits.

The router (policy, no torch) decides who runs; the backend (device) runs it; they meet only here.
"""

import torch

from server.backend.batch import build_forward_batch, last_indices
from server.backend.request_table import has_penalty
from server.backend.runner import build_runner
from server.backend.sampler import Sampled
from server.config import EngineConfig
from server.errors import InvalidRequest
from server.messages import EngineStats, Generate, Ready, TokenOutput
from server.request import Batch, Request
from server.router.scheduler import Scheduler


class Engine:
    """Serves one checkpoint. Not thread-safe: one caller adds, aborts and steps. Knows token ids, never text."""

    def __init__(self, config: EngineConfig):
        """Load the model and allocate the caches. Raises ConfigError."""
        self.config = config
        self.runner = build_runner(config)
        self.scheduler = Scheduler(self.runner.plan.limits)
        self.ready = Ready(
            max_model_len=self.runner.plan.max_model_len,
            vocab_size=self.runner.table.vocab_size,
            eos_token_ids=self.runner.eos_ids,
            mtp_step=config.mtp_step,
        )
        self._num_steps = 0

    def add(self, message: Generate) -> None:
        """Queue a request. Raises InvalidRequest for what can never be served."""
        prompt_ids, limit = message.prompt_token_ids, self.ready.max_model_len
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty, at least one token is needed", "prompt")
        if len(prompt_ids) >= limit:
            raise InvalidRequest(
                f"This model's maximum context length is {limit} tokens. However, the prompt has {len(prompt_ids)} "
                f"tokens and one must be left for the output: shorten it (or raise --max-model-len)",
                "prompt",
            )
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self.ready.vocab_size:
            raise InvalidRequest(f"prompt token ids must lie in 0..{self.ready.vocab_size - 1}", "prompt")
        message.sampling.check(self.ready.vocab_size)
        self.scheduler.add(Request.create(message, self.ready.eos_token_ids, limit))

    def abort(self, request_id: str) -> None:
        """Drop a request; its row and pages are free at the next step. Unknown ids are ignored."""
        self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        """Some request waits or runs."""
        return self.scheduler.has_work()

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        """Run one prefill batch and one decode batch, whichever have work, and return what they emitted."""
        self._num_steps += 1
        return [output for batch in self.scheduler.schedule() for output in self._run(batch)]

    def _run(self, batch: Batch) -> list[TokenOutput]:
        runner = self.runner
        forward = build_forward_batch(batch, runner.table)
        hidden = runner.target(forward)  # [N, H]: KV is written, GDN folds the accepted tokens, then verifies
        rows = hidden if batch.is_verify else hidden[last_indices(forward)]
        logits = runner.target.compute_logits(rows).unflatten(0, (len(batch.requests), -1))  # [B, T, V]
        sampled = runner.sampler.sample(logits, forward, batch)
        self._count_outputs(batch, sampled)
        newest = sampled.token_ids.gather(1, (sampled.accept_lens - 1).clamp(min=0)[:, None])
        drafts = newest[:, :0]
        if runner.drafter is not None:
            drafts = runner.drafter.propose(hidden, sampled, forward, batch)
        runner.table.commit(forward, newest[:, 0], drafts, sampled.accept_lens)
        logprobs = runner.sampler.read_logprobs(sampled, batch)
        return self.scheduler.collect(batch, sampled.token_ids.tolist(), sampled.accept_lens.tolist(), logprobs)

    def _count_outputs(self, batch: Batch, sampled: Sampled) -> None:
        """Penalties of the drafts and of later steps need to know what this one emitted."""
        which = [i for i, request in enumerate(batch.requests) if has_penalty(request.sampling)]
        if which:
            rows = torch.tensor([batch.requests[i].row for i in which], device=sampled.token_ids.device)
            self.runner.table.count_outputs(rows, sampled.token_ids[which], sampled.accept_lens[which])

    def stats(self) -> EngineStats:
        """Gauges now, and counters since start."""
        scheduler, counters = self.scheduler, self.scheduler.counters
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_pages=scheduler.pages.count,
            num_free_pages=scheduler.pages.num_free,
            num_steps=self._num_steps,
            num_verify_steps=counters.num_verify_steps,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_output_tokens=counters.num_output_tokens,
            num_preemptions=counters.num_preemptions,
            num_proposed=counters.num_proposed,
            num_accepted=counters.num_accepted,
            accepted_per_position=tuple(counters.accepted_per_position),
        )
