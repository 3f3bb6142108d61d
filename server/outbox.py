"""What the engine process has said and not sent yet: an answer that nobody reads before it ends need not be told token
by token, which costs both processes more than a small model's step.

Knows outputs, neither the engine nor the channel. No torch.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from server.messages import Abort, Failed, Generate, Request, TokenOutput

# Tokens are kept back for so many seconds at most: if their request is ended meanwhile, they are lost.
KEEP_SECONDS = 0.1


@dataclass
class _Held:
    """What is kept back of a request, when that began, and drafts proposed and accepted before it."""

    outputs: list[TokenOutput] = field(default_factory=list)
    since: float = 0.0
    num_proposed: int = 0
    num_accepted: int = 0

    def take(self, now: float) -> TokenOutput:
        """What is kept back, at least one output, as one; it is sent now."""
        outputs, self.outputs = self.outputs, []
        steps = []
        for output in outputs:
            if output.num_proposed > self.num_proposed:
                steps.append((output.num_proposed - self.num_proposed, output.num_accepted - self.num_accepted))
            self.num_proposed, self.num_accepted = output.num_proposed, output.num_accepted
        return replace(
            outputs[-1],
            token_ids=[token_id for output in outputs for token_id in output.token_ids],
            logprobs=[one for output in outputs for one in output.logprobs],
            prompt_logprobs=[one for output in outputs for one in output.prompt_logprobs],
            drafted_steps=steps,
            age=now - self.since,
        )


class Outbox:
    """Passes outputs on; those of requests that are `told_whole` every KEEP_SECONDS, at their end, and when asked
    for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._sent_at = clock()
        self._held: dict[str, _Held] = {}

    @property
    def is_due(self) -> bool:
        """Something should be said, if only how the engine is."""
        return self._clock() - self._sent_at >= KEEP_SECONDS

    def note(self, request: Request) -> None:
        """A request that is handed to the engine."""
        if isinstance(request, Generate) and request.told_whole:
            self._held[request.request_id] = _Held()
        elif isinstance(request, Abort):
            self._held.pop(request.request_id, None)

    def collect(
        self, outputs: Iterable[TokenOutput], failed: Iterable[Failed], tells_all: bool = False
    ) -> list[TokenOutput]:
        """What is to be sent after a step that gave these; if it `tells_all`, nothing is kept back."""
        for failure in failed:
            self._held.pop(failure.request_id, None)
        now = self._clock()
        sent = [ready for output in outputs if (ready := self._put(output, now)) is not None]
        if tells_all or now - self._sent_at >= KEEP_SECONDS:
            self._sent_at = now
            sent += [held.take(now) for held in self._held.values() if held.outputs]
        return sent

    def _put(self, output: TokenOutput, now: float) -> TokenOutput | None:
        """The output, or with it what was kept back; None: it is kept back, too."""
        held = self._held.get(output.request_id)
        if held is None:
            return output
        if not held.outputs:
            held.since = now
        held.outputs.append(output)
        if output.finish_reason is None:
            return None
        del self._held[output.request_id]
        return held.take(now)
