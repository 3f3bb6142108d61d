"""Logits -> tokens, by each request's own settings, the same with and without drafts.

Every row of a verify step draws the target's token with random numbers keyed by (request seed, absolute position), so
a token does not depend on the batch, on K, or on the drafts. B requests, T rows each, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.sampling import apply_penalties, compute_logprobs, draw
from kernels.speculative import count_accepted
from models.forward_batch import ForwardBatch
from server.backend.batch import last_indices
from server.backend.request_table import RequestTable, has_penalty
from server.messages import SamplingParams, TokenLogprobs
from server.request import Batch, Work


@dataclass(frozen=True)
class Sampled:
    """What a pass emits: token_ids [B, T] (T = 1 after prefill, else the widest window; narrower ones end in zeros),
    accept_lens [B] of them count, 0 inside a prompt.

    match_lens [B] are the same before they are cut at the request's end. next_ids [N] are the tokens again, row by row
    of the pass (after prefill: one per request). `logits` [N, V] are the raw ones, and is_finite [B] says that all of a
    request's are numbers.
    """

    token_ids: Tensor
    accept_lens: Tensor
    match_lens: Tensor
    next_ids: Tensor
    logits: Tensor
    is_finite: Tensor


class Sampler:
    """Draws for target and draft alike; `eos_ids` are masked until a request's min_tokens."""

    def __init__(self, table: RequestTable, eos_ids: tuple[int, ...]):
        self.table, self.eos_ids = table, eos_ids

    def sample(self, logits: Tensor, forward: ForwardBatch, batch: Batch) -> Sampled:
        """The tokens of one target pass; logits [N, V] of all verify rows, or [B, V] of each chunk's last token."""
        if batch.is_verify:
            return self._sample_windows(logits, forward, batch)
        positions = forward.positions[last_indices(forward)][:, None] + 1
        token_ids = self.draw(logits[:, None], batch.works, positions)
        ends = torch.tensor([work.ends_prompt for work in batch.works], device=logits.device).long()
        return Sampled(token_ids, ends, ends, token_ids.flatten(), logits, _is_finite(logits))

    def _sample_windows(self, logits: Tensor, forward: ForwardBatch, batch: Batch) -> Sampled:
        """Windows of one width at a time; logits [N, V]."""
        widest = max(forward.query_lens)
        ids, padded, accept_lens, match_lens, is_finite, first = [], [], [], [], [], 0
        for span, part in forward.parts:
            count, width = part.num_requests, part.query_lens[0]
            rows = logits[span].unflatten(0, (count, width))
            window = part.token_ids.view(count, width)
            positions = part.positions.view(count, width) + 1
            token_ids = self.draw(rows, batch.works[first : first + count], positions, window)
            match_lens.append(count_accepted(token_ids, window[:, 1:]))
            accept_lens.append(self._cut(part, token_ids, match_lens[-1]))
            is_finite.append(_is_finite(rows))
            ids.append(token_ids.flatten())
            padded.append(token_ids if width == widest else F.pad(token_ids, (0, widest - width)))
            first += count
        return Sampled(_join(padded), _join(accept_lens), _join(match_lens), _join(ids), logits, _join(is_finite))

    def _cut(self, part: ForwardBatch, token_ids: Tensor, match_lens: Tensor) -> Tensor:
        """match_lens [B] of token_ids [B, T], ended where the request ends."""
        view = part.view
        if view is None or token_ids.shape[1] == 1:
            return match_lens
        return self.table.cut(view.row_ids, view.start_lens, token_ids, match_lens)

    def draw(self, logits: Tensor, works: Sequence[Work], positions: Tensor, window: Tensor | None = None) -> Tensor:
        """Tokens [B, T] for logits [B, T, V] at absolute positions [B, T]; window [B, T] are the tokens the rows were
        run on (the newest committed one, then drafts), which penalties count from the second on."""
        if all(_is_plain_greedy(work.sampling) for work in works):
            return logits.argmax(-1)
        logits = self._apply_rules(logits.clone(), works, positions, window)
        rows = torch.tensor([work.row for work in works], device=logits.device)
        rows = rows.repeat_interleave(logits.shape[1])
        table = self.table
        return draw(
            logits.flatten(0, 1),
            temperature=table.temperature[rows],
            top_k=table.top_k[rows],
            top_p=table.top_p[rows],
            min_p=table.min_p[rows],
            seeds=table.seed[rows],
            positions=positions.flatten(),
        ).view(positions.shape)

    def read_logprobs(self, sampled: Sampled, batch: Batch) -> list[list[TokenLogprobs]]:
        """Raw log-probabilities of the emitted tokens, for the requests that asked; [] for the others."""
        if all(work.sampling.logprobs is None for work in batch.works):
            return [[] for _ in batch.works]
        accept_lens = sampled.accept_lens.tolist()
        results: list[list[TokenLogprobs]] = []
        first = 0
        for work, accept_len in zip(batch.works, accept_lens, strict=True):
            num_top, start = work.sampling.logprobs, first
            first += work.num_tokens if batch.is_verify else 1
            if num_top is None or accept_len == 0:
                results.append([])
                continue
            num_top, rows = min(num_top, sampled.logits.shape[-1]), slice(start, start + accept_len)
            parts = compute_logprobs(sampled.logits[rows], sampled.next_ids[rows], num_top)
            results.append([TokenLogprobs(*values) for values in zip(*(part.tolist() for part in parts), strict=True)])
        return results

    def _apply_rules(self, logits: Tensor, works: Sequence[Work], positions: Tensor, window: Tensor | None) -> Tensor:
        """min_tokens mask, logit_bias and penalties on logits [B, T, V], in place, where requests ask for them."""
        self._mask_early_stops(logits, works, positions)
        biases = [(i, *bias) for i, work in enumerate(works) for bias in work.sampling.logit_bias.items()]
        if biases:
            index, ids, values = zip(*biases, strict=True)
            where = _index(logits, index, ids)
            added = torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]
            logits.transpose(1, 2).index_put_(where, added.expand(-1, logits.shape[1]), accumulate=True)
        penalised = [i for i, work in enumerate(works) if has_penalty(work.sampling)]
        if penalised:
            rows = torch.tensor([works[i].row for i in penalised], device=logits.device)
            logits[penalised] = self._penalise(logits[penalised], rows, None if window is None else window[penalised])
        return logits

    def _mask_early_stops(self, logits: Tensor, works: Sequence[Work], positions: Tensor) -> None:
        stops = [
            (i, stop_id)
            for i, work in enumerate(works)
            if work.sampling.min_tokens
            for stop_id in {*self.eos_ids, *work.sampling.stop_token_ids}
        ]
        if not stops:
            return
        rows = torch.tensor([work.row for work in works], device=logits.device)
        output_index = positions - self.table.prompt_len[rows, None]
        is_early = output_index < self.table.min_tokens[rows, None]  # [B, T]
        where = _index(logits, *zip(*stops, strict=True))
        by_token = logits.transpose(1, 2)
        by_token[where] = by_token[where].masked_fill(is_early[where[0]], -torch.inf)

    def _penalise(self, logits: Tensor, rows: Tensor, window: Tensor | None) -> Tensor:
        """Rows [B, T, V] of the requests in `rows` [B]: row t counts the committed output and the drafts before it."""
        table, num_rows = self.table, logits.shape[1]
        assert table.output_counts is not None and table.in_prompt is not None
        counts = table.output_counts[rows][:, None].repeat(1, num_rows, 1)
        if window is not None:
            for row in range(1, num_rows):
                drafted = window[:, row, None, None].expand(-1, num_rows - row, 1)
                counts[:, row:].scatter_add_(2, drafted, torch.ones_like(drafted, dtype=counts.dtype))
        columns = (table.repetition, table.frequency, table.presence)
        penalties = (column[rows].repeat_interleave(num_rows).to(logits.dtype) for column in columns)
        in_prompt = table.in_prompt[rows].repeat_interleave(num_rows, dim=0)
        return apply_penalties(logits.flatten(0, 1), counts.flatten(0, 1), in_prompt, *penalties).view_as(logits)


def _index(logits: Tensor, *columns: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(column, device=logits.device) for column in columns)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _is_finite(logits: Tensor) -> Tensor:
    """[B] of logits [B, ...]: no row has a NaN or +inf, which its maximum would show."""
    return logits.amax(-1).isfinite().view(len(logits), -1).all(1)


def _is_plain_greedy(sampling: SamplingParams) -> bool:
    has_rules = bool(sampling.min_tokens or sampling.logit_bias) or has_penalty(sampling)
    return sampling.is_greedy and not has_rules
