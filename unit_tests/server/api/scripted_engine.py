"""An engine that answers what a test tells it to, in steps of random sizes."""

import math
import random
from collections.abc import Sequence

from server.control import Control, Done
from server.messages import (
    FINISH_LENGTH,
    FINISH_STOP,
    EngineStats,
    Generate,
    Ready,
    TokenLogprobs,
    TokenOutput,
)

MAX_MODEL_LEN = 4096
MTP_STEP = 4


class ScriptedEngine:
    """Gives every request the tokens of `script` up to its max_tokens, 1..MTP_STEP + 1 at a time. `requests` records
    what was asked."""

    is_changing = False  # it has no weights
    patience = math.inf

    def __init__(self, vocab_size: int, eos_id: int, seed: int = 0):
        self.ready = Ready(MAX_MODEL_LEN, vocab_size, (eos_id,), MTP_STEP)
        self.script: Sequence[int] = [eos_id]
        self.requests: list[Generate] = []
        self._rng = random.Random(seed)
        self._outputs: dict[str, list[int]] = {}

    def add(self, request: Generate) -> None:
        """Start a request."""
        self.requests.append(request)
        self._outputs[request.request_id] = list(self.script[: request.sampling.max_tokens])

    def abort(self, request_id: str) -> None:
        """Forget a request."""
        self._outputs.pop(request_id, None)

    def control(self, command: Control) -> None:
        """Nobody tells it anything."""
        raise NotImplementedError(command)

    def take_done(self) -> list[Done]:
        """Nothing."""
        return []

    def has_work(self) -> bool:
        """Whether a request runs."""
        return bool(self._outputs)

    def step(self) -> list[TokenOutput]:
        """The next tokens of every request."""
        return [self._advance(request_id) for request_id in list(self._outputs)]

    def tell(self) -> list[TokenOutput]:
        """Nothing is kept back."""
        return []

    def stats(self) -> EngineStats:
        """Nothing of interest."""
        return EngineStats()

    def _advance(self, request_id: str) -> TokenOutput:
        left = self._outputs[request_id]
        size = self._rng.randint(1, MTP_STEP + 1)
        token_ids, self._outputs[request_id] = left[:size], left[size:]
        finish_reason = None
        if len(left) <= size:
            del self._outputs[request_id]
            finish_reason = FINISH_STOP if token_ids[-1] in self.ready.eos_token_ids else FINISH_LENGTH
        logprobs = [TokenLogprobs(-0.5, [token_id], [-0.5]) for token_id in token_ids]
        return TokenOutput(request_id, token_ids, logprobs, finish_reason)
