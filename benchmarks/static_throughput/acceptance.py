"""How many tokens a decode step emits: as many as its drafts earn, or as many as was drawn or recorded beforehand.

Forced acceptance changes one thing: the accept lengths that the sampler returns. The step verifies, draws and compares
as ever, then commits and folds that many of the target's own tokens. Nothing is drawn while the clock runs.
"""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Acceptance:
    """By `rate`: a draft is right with this probability if the one before it was. By `trace`: a step's accept length
    follows that of the step before. With neither the drafts decide."""

    name: str
    rate: float | None = None
    trace: tuple[int, ...] = ()

    def draw(self, num_steps: int, batch: int, mtp_step: int, first_step: int = 0) -> list[Tensor] | None:
        """Accept lengths [B] of so many steps from first_step on, the same at every call; None where the drafts decide.
        Requests go through a trace from places that are evenly apart, and over again; where it has more tokens than a
        step emits, the first ones are accepted."""
        if mtp_step == 0 or (self.rate is None and not self.trace):
            return None
        ends = first_step, first_step + num_steps
        columns = [itertools.islice(self._lengths(index, batch, mtp_step), *ends) for index in range(batch)]
        return [torch.tensor(lens) for lens in zip(*columns, strict=True)]

    def _lengths(self, index: int, batch: int, mtp_step: int) -> Iterator[int]:
        if self.rate is not None:
            rng = random.Random(index)
            while True:
                yield 1 + next((k for k in range(mtp_step) if rng.random() >= self.rate), mtp_step)
        first = index * len(self.trace) // batch
        for accept_len in itertools.cycle(self.trace[first:] + self.trace[:first]):
            yield min(accept_len, mtp_step + 1)


REAL = Acceptance("real")


class ForcedAcceptance:
    """Stands before a sampler. `force` says what the next verify steps accept; `num_steps` have."""

    def __init__(self, sampler: Any):
        self.num_steps = 0
        self._lens: Iterator[Tensor] | None = None
        self._sample = sampler.sample
        sampler.sample = self.sample

    def force(self, lens: Sequence[Tensor] | None) -> None:
        """Accept lengths [B] of so many steps, one after the other and over again; None: as the drafts earn."""
        self.num_steps, self._lens = 0, None if lens is None else itertools.cycle(lens)

    def sample(self, logits: Tensor, forward: Any, batch: Any, *rest: Any) -> Any:
        """What the sampler gives, with those accept lengths."""
        sampled = self._sample(logits, forward, batch, *rest)
        if self._lens is None or not batch.is_verify:
            return sampled
        lens = next(self._lens)
        self.num_steps += 1
        return replace(sampled, accept_lens=lens, match_lens=lens)


def choose_acceptances(rates: Sequence[float], trace: Path | None) -> list[Acceptance]:
    """One for each rate and for the trace; without any, the real one. Raises SystemExit for what cannot be used."""
    for rate in rates:
        if not 0 <= rate <= 1:
            raise SystemExit(f"--accept-rate is {rate}, it must lie in 0..1")
    chosen = [Acceptance(f"{rate:g}", rate=rate) for rate in rates]
    if trace is not None:
        chosen.append(Acceptance("trace", trace=read_trace(trace)))
    return chosen or [REAL]


def read_trace(path: Path) -> tuple[int, ...]:
    """Accept lengths, bonus token included: a JSON list, or one per line. Raises SystemExit in one line."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if text.lstrip().startswith("[") else [int(line) for line in text.split("\n") if line]
    except (OSError, ValueError) as error:
        raise SystemExit(f"--acceptance-trace {path} cannot be read: {error}") from error
    if not values or not all(isinstance(value, int) and value >= 1 for value in values):
        raise SystemExit(f"--acceptance-trace {path} must be accept lengths: whole numbers from 1 on, at least one")
    return tuple(values)
