"""Logits -> tokens, by each request's own settings, the same with and without drafts.

Every row of a verify step draws the target's token with random numbers keyed by (request seed, absolute position), so
a token does not depend on the batch, on K, or on the drafts. B requests, N rows of all of them, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kernels.sampling import compute_logprobs, draw, penalise, process
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
    request i has widths[i] rows (after prefill one, or none where no chunk ends a prompt). `logits` [N, V] are the raw
    ones, and is_finite [B] says that all of a request's are numbers. `ruled` [N, V] are those after masks and rules,
    None where they were never written.
    """

    token_ids: Tensor
    accept_lens: Tensor
    match_lens: Tensor
    next_ids: Tensor
    logits: Tensor
    is_finite: Tensor
    widths: Sequence[int]
    ruled: Tensor | None = None


class Sampler:
    """Draws for target and draft alike; `eos_ids` are masked until a request's min_tokens."""

    def __init__(self, table: RequestTable, eos_ids: tuple[int, ...]):
        self.table, self.eos_ids = table, eos_ids

    def sample(self, logits: Tensor, forward: ForwardBatch, batch: Batch, masks: TokenMasks | None = None) -> Sampled:
        """The tokens of one target pass; logits [N, V] of all verify rows, or [B, V] of each chunk's last token.
        `masks` apply before all other rules. Where no chunk ends a prompt nothing is drawn, and logits are not read."""
        if not batch.is_verify and not batch.ends_any_prompt:
            nothing = torch.zeros(len(batch.works), dtype=torch.int64, device=forward.token_ids.device)
            widths = [0] * len(batch.works)
            return Sampled(nothing[:, None], nothing, nothing, nothing[:0], logits, nothing == 0, widths)
        masked = logits if masks is None else masks.apply(logits)
        if batch.is_verify:
            return self._sample_windows(logits, masked, forward, batch, None if masks is None else masks.counts)
        positions = forward.positions[last_indices(forward)] + 1
        if self.table.rules is None or batch.wants_processed:
            token_ids, ruled = self._draw_by_law(masked, batch.works, positions)
        else:
            token_ids, ruled = self.draw(masked, batch.works, positions), None
        ends = to_device([int(work.ends_prompt) for work in batch.works], logits.device)
        is_finite = _is_finite(logits)
        return Sampled(token_ids[:, None], ends, ends, token_ids, logits, is_finite, [1] * len(ends), ruled)

    def _sample_windows(
        self, logits: Tensor, masked: Tensor, forward: ForwardBatch, batch: Batch, counts: Sequence[int] | None
    ) -> Sampled:
        view, widths, window = forward.view, forward.query_lens, forward.token_ids
        assert view is not None
        rows = view.row_ids if max(widths) == 1 else None
        next_ids, ruled = self._draw_by_law(masked, batch.works, forward.positions + 1, widths, window, rows)
        is_finite = _is_finite(logits)
        if rows is not None:
            ones = torch.ones_like(next_ids)
            return Sampled(next_ids[:, None], ones, ones, next_ids, logits, is_finite, widths, ruled)
        ids, match_lens, accept_lens = accept(
            next_ids, window, widths, *self.table.read_ends(view.row_ids, view.start_lens)
        )
        if counts is not None:
            most = to_device(counts, logits.device)
            match_lens, accept_lens = match_lens.minimum(most), accept_lens.minimum(most)
        is_finite = torch.stack([part.all() for part in is_finite.split(list(widths))])
        return Sampled(ids, accept_lens, match_lens, next_ids, logits, is_finite, widths, ruled)

    def draw(self, logits: Tensor, works: Sequence[Work], positions: Tensor, widths: Sequence[int] = ()) -> Tensor:
        """Tokens [N] for logits [N, V] at absolute positions [N], of which each work has widths[i] (one, if not
        given)."""
        if self.table.rules is None or all(_is_plain_greedy(work.sampling) for work in works):
            return self._draw_by_law(logits, works, positions, widths)[0]
        rows = _rows_of(works, widths or [1] * len(works), logits.device)
        return self.draw_by_table(logits, rows, positions)

    def _draw_by_law(
        self,
        logits: Tensor,
        works: Sequence[Work],
        positions: Tensor,
        widths: Sequence[int] = (),
        window: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`draw`, and the logits [N, V] after all rules.

        window [N] are the tokens that the rows were run on: of each work the newest committed one, then drafts, which
        penalties count. rows [N] are the table's, if anybody has them.
        """
        samplings = [work.sampling for work in works]
        if all(map(_is_plain_greedy, samplings)):
            return logits.argmax(-1), logits
        widths = widths or [1] * len(works)
        rows = _rows_of(works, widths, logits.device) if rows is None else rows
        if any(map(has_rules, samplings)):
            logits = self._apply_rules(logits, samplings, widths, rows, positions, window)
        return draw(logits, *self._read_law(rows), self.table.seed[rows], positions), logits

    def _read_law(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """temperature, top_k, top_p and min_p [N] of the table's rows [N]."""
        table = self.table
        return table.temperature[rows], table.top_k[rows], table.top_p[rows], table.min_p[rows]

    def draw_by_table(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """`draw` of one token for each of the table's rows [N], without a word from the host; the table keeps rules."""
        from kernels.gpu.sampling import draw as draw_triton
        from server.backend.decode_step import sampling_table

        return draw_triton(logits, sampling_table(self.table), rows, positions, None, 1)[0]

    def logprobs(self, sampled: Sampled, batch: Batch) -> PassLogprobs | None:
        """Log-probabilities for the requests that asked, on their way to the host; None if none did."""
        num_tops = [work.sampling.logprobs for work in batch.works]
        asked = [num_top for num_top in num_tops if num_top is not None]
        if not asked or not len(sampled.logits):
            return None
        logits = self._choose_logits(sampled, batch) if batch.wants_processed else sampled.logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        most, spans, places = min(max(asked), logits.shape[-1]), _spans(sampled.widths), None
        if len(asked) < len(num_tops):
            at = [at for num_top, span in zip(num_tops, spans, strict=True) if num_top is not None for at in span]
            places = to_device(at, logits.device)
            widths = [0 if num_top is None else len(span) for num_top, span in zip(num_tops, spans, strict=True)]
            spans = _spans(widths)
        return PassLogprobs(num_tops, spans, Readback(*compute_logprobs(logits, sampled.next_ids, most, places)))

    def _choose_logits(self, sampled: Sampled, batch: Batch) -> Tensor:
        """The processed logits for those whose log-probabilities are to be of these, the raw ones for the others: [N,
        V]."""
        assert sampled.ruled is not None
        widths, device = sampled.widths, sampled.logits.device
        processed = process(sampled.ruled, *self._read_law(_rows_of(batch.works, widths, device)))
        pairs = zip(batch.works, widths, strict=True)
        wants = [work.sampling.wants_processed for work, width in pairs for _ in range(width)]
        return torch.where(to_device(wants, device)[:, None], processed, sampled.logits)

    def _apply_rules(
        self,
        logits: Tensor,
        samplings: list[SamplingParams],
        widths: Sequence[int],
        rows: Tensor,
        positions: Tensor,
        window: Tensor | None,
    ) -> Tensor:
        """logits [N, V] after min_tokens' mask, logit_bias and penalties, where requests ask for them; the given ones
        stay as they are. Each request has widths[i] rows; rows [N]: each one's row of the table."""
        if any(sampling.min_tokens or sampling.logit_bias for sampling in samplings):
            logits = logits.clone()
            of_works = list(zip(samplings, _spans(widths), strict=True))
            self._mask_early_stops(logits, of_works, rows, positions)
            _add_biases(logits, of_works)
        if any(map(has_penalty, samplings)):
            logits = penalise(logits, rows, self.table.penalties, window)
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


def _add_biases(logits: Tensor, of_works: list[tuple[SamplingParams, range]]) -> None:
    """To logits [N, V] in place, what the works ask for in the rows that are theirs."""
    biases = [(at, *bias) for sampling, span in of_works for bias in sampling.logit_bias.items() for at in span]
    if biases:
        *where, values = zip(*biases, strict=True)
        added = to_device(values, logits.device).to(logits.dtype)
        logits.index_put_(_index(logits, *where), added, accumulate=True)


def _rows_of(works: Sequence[Work], widths: Sequence[int], device: torch.device) -> Tensor:
    """The table's row of each of the works' rows [N]."""
    return to_device([work.row for work, width in zip(works, widths, strict=True) for _ in range(width)], device)


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
