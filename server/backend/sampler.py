"""Logits -> tokens, by each request's own settings, the same with and without drafts.

Every row of a verify step draws the target's token with random numbers keyed by (request seed, absolute position), so
a token does not depend on the batch, on K, or on the drafts. B requests, T rows each, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sampling import apply_penalties, compute_logprobs, draw
from kernels.speculative import count_accepted
from models.forward_batch import ForwardBatch
from server.backend.batch import last_indices
from server.backend.request_table import RequestTable, has_penalty
from server.messages import TokenLogprobs
from server.request import Batch, Request


@dataclass(frozen=True)
class Sampled:
    """What a pass emits: token_ids [B, T] (T = 1 after prefill), accept_lens [B] of them count, 0 inside a prompt.

    `logits` [B, T, V] are the raw ones.
    """

    token_ids: Tensor
    accept_lens: Tensor
    logits: Tensor


class Sampler:
    """Draws for target and draft alike; `eos_ids` are masked until a request's min_tokens."""

    def __init__(self, table: RequestTable, eos_ids: tuple[int, ...]):
        self.table, self.eos_ids = table, eos_ids

    def sample(self, logits: Tensor, forward: ForwardBatch, batch: Batch) -> Sampled:
        """The tokens of one target pass; logits [B, T, V] of all verify rows, or of each chunk's last token (T = 1)."""
        num_rows = logits.shape[1]
        if batch.is_verify:
            positions = forward.positions.view(-1, num_rows) + 1
            window = forward.token_ids.view(-1, num_rows)
            token_ids = self.draw(logits, batch, positions, window)
            return Sampled(token_ids, count_accepted(token_ids, window[:, 1:]), logits)
        positions = forward.positions[last_indices(forward)][:, None] + 1
        ends = torch.tensor([batch.ends_prompt(i) for i in range(len(batch.requests))], device=logits.device)
        return Sampled(self.draw(logits, batch, positions), ends.long(), logits)

    def draw(self, logits: Tensor, batch: Batch, positions: Tensor, window: Tensor | None = None) -> Tensor:
        """Tokens [B, T] for absolute positions [B, T]; window [B, T] are the tokens the rows were run on (the newest
        committed one, then drafts), which penalties count from the second on."""
        requests = batch.requests
        if all(_is_plain_greedy(request) for request in requests):
            return logits.argmax(-1)
        logits = self._apply_rules(logits.clone(), requests, positions, window)
        rows = torch.tensor([request.row for request in requests], device=logits.device)
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
        accept_lens = sampled.accept_lens.tolist()
        results: list[list[TokenLogprobs]] = []
        for index, request in enumerate(batch.requests):
            num_top = request.sampling.logprobs
            rows = slice(0, accept_lens[index])
            if num_top is None or accept_lens[index] == 0:
                results.append([])
                continue
            num_top = min(num_top, sampled.logits.shape[-1])
            parts = compute_logprobs(sampled.logits[index, rows], sampled.token_ids[index, rows], num_top)
            results.append([TokenLogprobs(*values) for values in zip(*(part.tolist() for part in parts), strict=True)])
        return results

    def _apply_rules(self, logits: Tensor, requests: list[Request], positions: Tensor, window: Tensor | None) -> Tensor:
        """min_tokens mask, logit_bias and penalties on logits [B, T, V], in place, where requests ask for them."""
        self._mask_early_stops(logits, requests, positions)
        biases = [(i, *bias) for i, request in enumerate(requests) for bias in request.sampling.logit_bias.items()]
        if biases:
            index, ids, values = zip(*biases, strict=True)
            where = _index(logits, index, ids)
            added = torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]
            logits.transpose(1, 2).index_put_(where, added.expand(-1, logits.shape[1]), accumulate=True)
        penalised = [i for i, request in enumerate(requests) if has_penalty(request.sampling)]
        if penalised:
            rows = torch.tensor([requests[i].row for i in penalised], device=logits.device)
            logits[penalised] = self._penalise(logits[penalised], rows, None if window is None else window[penalised])
        return logits

    def _mask_early_stops(self, logits: Tensor, requests: list[Request], positions: Tensor) -> None:
        stops = [
            (i, stop_id)
            for i, request in enumerate(requests)
            if request.sampling.min_tokens
            for stop_id in {*self.eos_ids, *request.sampling.stop_token_ids}
        ]
        if not stops:
            return
        rows = torch.tensor([request.row for request in requests], device=logits.device)
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


def _is_plain_greedy(request: Request) -> bool:
    sampling = request.sampling
    has_rules = bool(sampling.min_tokens or sampling.logit_bias) or has_penalty(sampling)
    return sampling.is_greedy and not has_rules
