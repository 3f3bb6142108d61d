"""What a pass gave, on its way to the host: read when it has arrived, one step later."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from server.backend.lane import Readback
from server.messages import TokenLogprobs
from server.request import Outcome


class Stopwatch:
    """Seconds from its making to `stop`: of the host's clock, or of the stream's work on a GPU."""

    def __init__(self, device: str):
        self._is_cuda = device == "cuda"
        self._start: Any = self._now()
        self._end: Any = None

    def stop(self) -> "Stopwatch":
        """The end has come; itself."""
        self._end = self._now()
        return self

    @property
    def seconds(self) -> float:
        """What lies between the two; on a GPU this waits until the stream has passed the end."""
        if self._is_cuda:
            self._end.synchronize()
            return float(self._start.elapsed_time(self._end)) / 1e3
        return float(self._end - self._start)

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class PassLogprobs:
    """Log-probabilities of rows of a pass: of each request num_tops[i] (None: not asked for) best ones, in rows
    spans[i] of the four tensors [n], [n, most], [n, most], [n] that `readback` brings: the token's own, the best ids
    and values, and the token's rank."""

    num_tops: Sequence[int | None]
    spans: Sequence[range]
    readback: Readback

    def read(self, accept_lens: Sequence[int]) -> list[list[TokenLogprobs]]:
        """Of the first accept_lens[i] tokens of each request."""
        entries = list(map(TokenLogprobs, *self.readback.read()))
        most = max(num_top or 0 for num_top in self.num_tops)
        each = []
        for num_top, span, count in zip(self.num_tops, self.spans, accept_lens, strict=True):
            own = [] if num_top is None else entries[span.start : span.start + count]
            for entry in own if num_top != most else ():
                del entry.top_ids[num_top:], entry.top_logprobs[num_top:]
            each.append(own)
        return each

    def read_all(self) -> list[list[TokenLogprobs]]:
        """Of all rows of each request."""
        return self.read([len(span) for span in self.spans])


@dataclass(frozen=True)
class PassResult:
    """Tokens [B, T], accept_lens, match_lens and is_finite [B] in `readback`: see Sampled. `prompt_logprobs` are of
    the prompt tokens that follow the pass's own."""

    readback: Readback
    logprobs: PassLogprobs | None
    watch: Stopwatch
    prompt_logprobs: PassLogprobs | None = None

    def read(self) -> Outcome:
        """Waits for the device."""
        token_ids, accept_lens, match_lens, is_finite = self.readback.read()
        logprobs = self.logprobs.read(accept_lens) if self.logprobs else [[] for _ in accept_lens]
        of_prompts = self.prompt_logprobs.read_all() if self.prompt_logprobs else []
        return Outcome(token_ids, accept_lens, match_lens, logprobs, is_finite, self.watch.seconds, of_prompts)
