"""Logits -> tokens, by each request's own settings, the same with and without drafts.

Every row of a verify step draws the target's token with random numbers keyed by (request seed, absolute position), so
a token does not depend on the batch, on K, or on the drafts. B requests, N rows of all of them, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kernels.sampling import apply_penalties, compute_logprobs, compute_ranks, draw
from kernels.speculative import accept
from models.forward_batch import ForwardBatch, to_device
from server.backend.batch import last_indices
from server.backend.lane import Readback
from server.backend.pass_result import PassLogprobs
from server.backend.request_table import RequestTable, has_penalty, has_rules
from server.backend.token_masks import TokenMasks
from server.messages import SamplingParams
from server.request import Batch, Work


@dataclass(frozen=True)
class Sampled:
    """What a pass emits: token_ids [B, T] (T = 1 after prefill, else the widest window; what stands behind a narrower
    one means nothing), accept_lens [B] of them count, 0 inside a prompt.

    match_lens [B] are the same before they are cut at the request's end. next_ids [N] are the tokens again, row by row:
    request i has widths[i] rows (after prefill one). `logits` [N, V] are the raw ones, and is_finite [B] says that all
    of a request's are numbers.
    """

    token_ids: Tensor
    accept_lens: Tensor
    match_lens: Tensor
    next_ids: Tensor
    logits: Tensor
    is_finite: Tensor
    widths: Sequence[int]


class Sampler:
    """Draws for target and draft alike; `eos_ids` are masked until a request's min_tokens."""

    def __init__(self, table: RequestTable, eos_ids: tuple[int, ...]):
        self.table, self.eos_ids = table, eos_ids

    def sample(self, logits: Tensor, forward: ForwardBatch, batch: Batch, masks: TokenMasks | None = None) -> Sampled:
        """The tokens of one target pass; logits [N, V] of all verify rows, or [B, V] of each chunk's last token.
        `masks` apply before all other rules."""
        masked = logits if masks is None else masks.apply(logits)
        if batch.is_verify:
            return self._sample_windows(logits, masked, forward, batch)
        token_ids = self.draw(masked, batch.works, forward.positions[last_indices(forward)] + 1)
        ends = to_device([int(work.ends_prompt) for work in batch.works], logits.device)
        return Sampled(token_ids[:, None], ends, ends, token_ids, logits, _is_finite(logits), [1] * len(ends))

    def _sample_windows(self, logits: Tensor, masked: Tensor, forward: ForwardBatch, batch: Batch) -> Sampled:
        view, widths, window = forward.view, forward.query_lens, forward.token_ids
        assert view is not None
        next_ids = self.draw(masked, batch.works, forward.positions + 1, widths, window)
        is_finite = _is_finite(logits)
        if max(widths) == 1:
            ones = torch.ones_like(next_ids)
            return Sampled(next_ids[:, None], ones, ones, next_ids, logits, is_finite, widths)
        ids, match_lens, accept_lens = accept(
            next_ids, window, widths, *self.table.read_ends(view.row_ids, view.start_lens)
        )
        is_finite = torch.stack([part.all() for part in is_finite.split(list(widths))])
        return Sampled(ids, accept_lens, match_lens, next_ids, logits, is_finite, widths)

    def draw(
        self,
        logits: Tensor,
        works: Sequence[Work],
        positions: Tensor,
        widths: Sequence[int] = (),
        window: Tensor | None = None,
    ) -> Tensor:
        """Tokens [N] for logits [N, V] at absolute positions [N], of which each work has widths[i] (one, if not given).

        window [N] are the tokens that the rows were run on: of each work the newest committed one, then drafts, which
        penalties count.
        """
        if all(_is_plain_greedy(work.sampling) for work in works):
            return logits.argmax(-1)
        spans = _spans(widths or [1] * len(works))
        rows = to_device([work.row for work, span in zip(works, spans, strict=True) for _ in span], logits.device)
        if window is None and self.table.rules is not None:
            return self._draw_by_table(logits, rows, positions)
        if any(has_rules(work.sampling) for work in works):
            logits = self._apply_rules(logits.clone(), works, spans, rows, positions, window)
        table = self.table
        return draw(
            logits,
            temperature=table.temperature[rows],
            top_k=table.top_k[rows],
            top_p=table.top_p[rows],
            min_p=table.min_p[rows],
            seeds=table.seed[rows],
            positions=positions,
        )

    def _draw_by_table(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """`draw` of one token for each of the table's rows [N], without a word from the host."""
        from kernels.gpu.sampling import draw as draw_triton
        from server.backend.decode_step import sampling_table

        return draw_triton(logits, sampling_table(self.table), rows, positions, None, 1)[0]

    def logprobs(self, sampled: Sampled, batch: Batch) -> PassLogprobs | None:
        """Raw log-probabilities of the requests that asked, on their way to the host; None if none did."""
        num_tops = [work.sampling.logprobs for work in batch.works]
        if all(num_top is None for num_top in num_tops):
            return None
        most = min(max(num_top or 0 for num_top in num_tops), sampled.logits.shape[-1])
        asked: list[int] = []
        spans = []
        for num_top, span in zip(num_tops, _spans(sampled.widths), strict=True):
            spans.append(range(len(asked), len(asked) + (0 if num_top is None else len(span))))
            asked += [] if num_top is None else list(span)
        rows = to_device(asked, sampled.logits.device)
        logits = sampled.logits[rows].to(torch.promote_types(sampled.logits.dtype, torch.float32))
        token_ids = sampled.next_ids[rows]
        columns = (*compute_logprobs(logits, token_ids, most), compute_ranks(logits, token_ids))
        return PassLogprobs(num_tops, spans, Readback(*columns))

    def _apply_rules(
        self,
        logits: Tensor,
        works: Sequence[Work],
        spans: list[range],
        rows: Tensor,
        positions: Tensor,
        window: Tensor | None,
    ) -> Tensor:
        """min_tokens mask, logit_bias and penalties on logits [N, V], in place, where requests ask for them. spans: the
        places of each work's rows; rows [N]: each place's row of the table."""
        of_works = list(zip([work.sampling for work in works], spans, strict=True))
        self._mask_early_stops(logits, of_works, rows, positions)
        biases = [(at, *bias) for sampling, span in of_works for bias in sampling.logit_bias.items() for at in span]
        if biases:
            *where, values = zip(*biases, strict=True)
            added = to_device(values, logits.device).to(logits.dtype)
            logits.index_put_(_index(logits, *where), added, accumulate=True)
        penalised = [span for sampling, span in of_works if has_penalty(sampling)]
        if penalised:
            (places,) = _index(logits, [at for span in penalised for at in span])
            logits[places] = self._penalise(logits[places], rows[places], _count_drafts(penalised, window))
        return logits

    def _mask_early_stops(
        self, logits: Tensor, of_works: list[tuple[SamplingParams, range]], rows: Tensor, positions: Tensor
    ) -> None:
        stops = [
            (at, stop_id)
            for sampling, span in of_works
            if sampling.min_tokens
            for stop_id in {*self.eos_ids, *sampling.stop_token_ids}
            for at in span
        ]
        if not stops:
            return
        is_early = positions - self.table.prompt_len[rows] < self.table.min_tokens[rows]  # [N]
        where = _index(logits, *zip(*stops, strict=True))
        logits[where] = logits[where].masked_fill(is_early[where[0]], -torch.inf)

    def _penalise(self, logits: Tensor, rows: Tensor, drafts: tuple[Tensor, Tensor] | None) -> Tensor:
        """logits [n, V] of the table's rows [n]: each counts the committed output and the drafts before it, which are
        given as pairs of (index in n, token)."""
        table = self.table
        assert table.output_counts is not None and table.in_prompt is not None
        counts = table.output_counts[rows]
        if drafts is not None:
            counts.index_put_(drafts, torch.ones_like(drafts[0], dtype=counts.dtype), accumulate=True)
        penalties = (column[rows].to(logits.dtype) for column in (table.repetition, table.frequency, table.presence))
        return apply_penalties(logits, counts, table.in_prompt[rows], *penalties)


def _count_drafts(spans: list[range], window: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Which drafts of window [N] stand before the rows of the spans: (index of the row among them all, token)."""
    pairs, first = [], 0
    for span in spans:
        pairs += [(first + row, span[draft]) for row in range(len(span)) for draft in range(1, row + 1)]
        first += len(span)
    if window is None or not pairs:
        return None
    places, sources = _index(window, *zip(*pairs, strict=True))
    return places, window[sources]


def _spans(widths: Sequence[int]) -> list[range]:
    """The places of requests with so many rows each, one request after the other."""
    return [range(end - width, end) for width, end in zip(widths, accumulate(widths), strict=True)]


def _index(like: Tensor, *columns: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(to_device(column, like.device) for column in columns)


def _is_finite(logits: Tensor) -> Tensor:
    """[N] of logits [N, V]: no NaN or +inf, which the maximum would show."""
    return logits.amax(-1).isfinite()


def _is_plain_greedy(sampling: SamplingParams) -> bool:
    return sampling.is_greedy and not has_rules(sampling)
