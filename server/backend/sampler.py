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
from server.router.request import Request
from server.router.scheduler import Batch


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
        columns = (column[rows] for column in (table.temperature, table.top_k, table.top_p, table.min_p, table.seed))
        return draw(logits.flatten(0, 1), *columns, positions.flatten()).view(positions.shape)

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
            parts = compute_logprobs(sampled.logits[index, rows], sampled.token_ids[index, rows], num_top)
            results.append([TokenLogprobs(*values) for values in zip(*(part.tolist() for part in parts), strict=True)])
        return results

    def _apply_rules(self, logits: Tensor, requests: list[Request], positions: Tensor, window: Tensor | None) -> Tensor:
        """min_tokens mask, logit_bias and penalties on logits [B, T, V], in place where they are asked for."""
        for index, request in enumerate(requests):
            sampling = request.sampling
            if sampling.min_tokens:
                output_index = positions[index] - self.table.prompt_len[request.row]
                stop_ids = torch.tensor([*self.eos_ids, *sampling.stop_token_ids], device=logits.device)
                masked = logits[index].index_fill(1, stop_ids, -torch.inf)
                is_early = output_index < sampling.min_tokens
                logits[index] = torch.where(is_early[:, None], masked, logits[index])
            if sampling.logit_bias:
                ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
                logits[index, :, ids] += torch.tensor(
                    list(sampling.logit_bias.values()), dtype=logits.dtype, device=logits.device
                )
            if has_penalty(sampling):
                logits[index] = self._penalise(logits[index], request, None if window is None else window[index])
        return logits

    def _penalise(self, logits: Tensor, request: Request, window: Tensor | None) -> Tensor:
        """One request's rows [T, V]: row t counts the committed output and the drafts before it in the window."""
        table, num_rows = self.table, len(logits)
        assert table.output_counts is not None and table.in_prompt is not None
        counts = table.output_counts[request.row].repeat(num_rows, 1)
        if window is not None:
            for row in range(1, num_rows):
                counts[row:, window[row]] += 1
        columns = (table.repetition, table.frequency, table.presence)
        penalties = (column[request.row].expand(num_rows).to(logits.dtype) for column in columns)
        return apply_penalties(logits, counts, table.in_prompt[request.row].expand(num_rows, -1), *penalties)


def _is_plain_greedy(request: Request) -> bool:
    sampling = request.sampling
    has_rules = bool(sampling.min_tokens or sampling.logit_bias) or has_penalty(sampling)
    return sampling.temperature == 0 and not has_rules
