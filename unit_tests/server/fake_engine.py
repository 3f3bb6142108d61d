"""An engine without a model: it answers a prompt with the prompt's own tokens, several per step.

Deterministic, so a test chooses the output by choosing the prompt. `--mtp-step k` gives k + 1 tokens per step, of which
k count as accepted drafts. A prompt that begins with one of the ids below has a special effect. A step takes a second
of a request's `timeout`. A prompt that comes again with the same `cache_salt` reuses all but its last token.
"""

import math
import os
import time
from dataclasses import dataclass, field, replace

from server.config import EngineConfig
from server.control import Control, Done
from server.errors import CheckpointError, InvalidRequest
from server.messages import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_STOP,
    EngineStats,
    Failed,
    Generate,
    Ready,
    TokenLogprobs,
    TokenOutput,
)

MAX_MODEL_LEN = 256
VOCAB_SIZE = 400
EOS_ID = 2
# First prompt token -> what happens when the request is added or stepped; a broken one fails after its first token.
RAISE_ID, EXIT_ID, REFUSE_ID, FOREVER_ID, LONG_ID, BROKEN_ID = 390, 391, 392, 393, 394, 395


@dataclass
class _Running:
    request: Generate
    num_cached: int
    num_turns: int = 0
    num_output: int = 0
    num_steps: int = 0
    num_accepted: int = 0
    kept_back: list[TokenOutput] = field(default_factory=list)
    drafted_steps: list[tuple[int, int]] = field(default_factory=list)

    def tell(self) -> TokenOutput:
        """What is kept back, as one."""
        outputs, self.kept_back = self.kept_back, []
        steps, self.drafted_steps = self.drafted_steps, []
        return replace(
            outputs[-1],
            token_ids=[token_id for output in outputs for token_id in output.token_ids],
            logprobs=[one for output in outputs for one in output.logprobs],
            prompt_logprobs=[one for output in outputs for one in output.prompt_logprobs],
            drafted_steps=steps if self.request.told_whole else [],
        )


class FakeEngine:
    """See the module; also records the ids of the requests that were aborted."""

    def __init__(self, config: EngineConfig):
        if config.chunked_prefill_size == 13:
            raise CheckpointError("model-00001.safetensors is truncated: it has 5 bytes, its header says 13")
        if config.chunked_prefill_size == 14:
            raise RuntimeError("a bug at start")
        self.ready = Ready(MAX_MODEL_LEN, VOCAB_SIZE, (EOS_ID,), config.mtp_step)
        self.aborted: list[str] = []
        self._controls: list[Control] = []
        self._running: dict[str, _Running] = {}
        self._remembered: set[tuple[str, tuple[int, ...]]] = set()
        self._num_accepted = self._num_proposed = self._num_verify_steps = self._num_steps = self._num_timeouts = 0

    def add(self, request: Generate) -> None:
        """Start a request."""
        prompt, salt = tuple(request.prompt_token_ids), request.cache_salt
        if prompt[0] == REFUSE_ID:
            raise InvalidRequest("the engine refuses this prompt", "prompt")
        num_cached = len(prompt) - 1 if (salt, prompt) in self._remembered else 0
        if salt:
            self._remembered.add((salt, prompt))
        self._running[request.request_id] = _Running(request, num_cached)

    def abort(self, request_id: str) -> None:
        """Forget a request."""
        self.aborted.append(request_id)
        self._running.pop(request_id, None)

    def control(self, command: Control) -> None:
        """Nothing that a command asks for is there, so it is done."""
        self._controls.append(command)

    def take_done(self) -> list[Done]:
        """All commands that have come."""
        commands, self._controls = self._controls, []
        return [Done(command.control_id) for command in commands]

    is_changing = False  # it has no weights
    patience = math.inf

    def has_work(self) -> bool:
        """Whether a request runs."""
        return bool(self._running)

    def step(self) -> list[TokenOutput | Failed]:
        """Give every request its next tokens. It takes a millisecond: endless requests must leave CPU to others."""
        time.sleep(0.001)
        self._num_steps += 1
        outputs: list[TokenOutput | Failed] = []
        for running in list(self._running.values()):
            output = self._take_turn(running)
            if isinstance(output, TokenOutput):
                running.kept_back.append(output)
                if output.finish_reason is None and running.request.told_whole:
                    continue
                output = running.tell()
            if isinstance(output, Failed) or output.finish_reason is not None:
                del self._running[output.request_id]
            outputs.append(output)
        return outputs

    def tell(self) -> list[TokenOutput]:
        """What requests that are told whole have kept back."""
        return [running.tell() for running in self._running.values() if running.kept_back]

    def count_next_tokens(self, is_first: bool) -> int:
        """How many tokens a step gives a request, unless it ends before: one at first, then with all drafts."""
        return 1 if is_first else self.ready.mtp_step + 1

    def stats(self) -> EngineStats:
        """One page per running request, of sixteen."""
        return EngineStats(
            num_running=len(self._running),
            num_pages=16,
            num_free_pages=16 - len(self._running),
            num_steps=self._num_steps,
            num_verify_steps=self._num_verify_steps,
            num_proposed=self._num_proposed,
            num_accepted=self._num_accepted,
            accepted_per_position=(self._num_verify_steps,) * self.ready.mtp_step,
            proposed_per_position=(self._num_verify_steps,) * self.ready.mtp_step,
            num_timeouts=self._num_timeouts,
        )

    def _take_turn(self, running: _Running) -> TokenOutput | Failed:
        request_id, timeout = running.request.request_id, running.request.timeout
        running.num_turns += 1
        if running.request.prompt_token_ids[0] == BROKEN_ID and running.num_output:
            return Failed(request_id, "ModelFailure", "the logits are not finite")
        if timeout is None or running.num_turns <= timeout:
            return self._advance(running)
        self._num_timeouts += 1
        if running.num_output == 0:
            return Failed(request_id, "RequestTimeout", "the request's time was over before its first token")
        return self._output(running, [], FINISH_ABORT, None)

    def _advance(self, running: _Running) -> TokenOutput:
        prompt, sampling = running.request.prompt_token_ids, running.request.sampling
        if prompt[0] == RAISE_ID:
            raise RuntimeError("a bug in a step")
        if prompt[0] == EXIT_ID and running.num_output:
            os._exit(7)
        room = MAX_MODEL_LEN - len(prompt)
        limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        if prompt[0] == FOREVER_ID:
            limit = 10**9
        if prompt[0] == LONG_ID:
            limit = 1500
        if limit == 0:
            return self._output(running, [], FINISH_LENGTH, None)
        token_ids, finish_reason, stop_id = [], None, None
        for _ in range(self.count_next_tokens(running.num_output == 0)):
            token_ids.append(prompt[running.num_output % len(prompt)])
            running.num_output += 1
            if token_ids[-1] in sampling.stop_token_ids:
                finish_reason, stop_id = FINISH_STOP, token_ids[-1]
            elif token_ids[-1] == EOS_ID and not sampling.ignore_eos:
                finish_reason = FINISH_STOP
            elif running.num_output >= limit:
                finish_reason = FINISH_LENGTH
            if finish_reason is not None:
                break
        if running.num_output > len(token_ids):
            self._count_verify(running, len(token_ids) - 1)
        return self._output(running, token_ids, finish_reason, stop_id)

    def _output(
        self, running: _Running, token_ids: list[int], finish_reason: str | None, stop_id: int | None
    ) -> TokenOutput:
        prompt, sampling = running.request.prompt_token_ids, running.request.sampling
        scored = prompt[1:] if running.num_output == len(token_ids) else []
        return TokenOutput(
            running.request.request_id,
            token_ids,
            _logprobs(token_ids, sampling.logprobs),
            finish_reason,
            stop_id,
            running.num_steps,
            running.num_steps * self.ready.mtp_step,
            running.num_accepted,
            running.num_cached,
            _logprobs(scored, sampling.prompt_logprobs),
        )

    def _count_verify(self, running: _Running, num_accepted: int) -> None:
        running.num_steps += 1
        running.num_accepted += num_accepted
        running.drafted_steps.append((self.ready.mtp_step, num_accepted))
        self._num_verify_steps += 1
        self._num_proposed += self.ready.mtp_step
        self._num_accepted += num_accepted


def _logprobs(token_ids: list[int], num_top: int | None) -> list[TokenLogprobs]:
    return [] if num_top is None else [_token_logprobs(token_id, num_top) for token_id in token_ids]


def _token_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    ids = [token_id, *(i for i in range(200, 230) if i != token_id)][:num_top]
    return TokenLogprobs(-0.5, ids, [-0.5, *[float("-inf")] * 30][: len(ids)])
