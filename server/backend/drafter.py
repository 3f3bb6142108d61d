"""Proposes drafts with the draft head, and keeps the head's KV cache level with the target's.

`eagle`: one MTP layer, called again on its own output. `vanilla`: several layers, one per draft; past the last layer it
recurses on that one. Drafts use the request's own sampling settings and the random numbers of the very positions they
guess, so they follow the target's draws also under sampling. They can change speed only, never the output.

A request that gets no drafts for a while costs nothing here: its newest hidden states are put aside, and the head
catches up on them at once when drafts are wanted again. In place of what it has missed before, it attends to whatever
its cache holds there. B requests, N rows, R rows of the table.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kernels.speculative import roll_next_ids
from models.forward_batch import ForwardBatch
from models.qwen3_5_mtp.model import Qwen35MTP
from server.backend.batch import following_ids, last_indices
from server.backend.sampler import Sampled, Sampler
from server.config import MAX_BEHIND
from server.request import Batch, Work


@dataclass(frozen=True)
class _Extension:
    """What the first layer runs on: next_ids [N] after the positions of `forward`, states [N, H], and last [b], the
    flat index of each request's newest real row. The b requests come with most drafts wanted first; `order` are their
    indices in the pass. known [b, num_layers] are tokens that the prompt knows to follow (-1: none)."""

    works: list[Work]
    order: Tensor
    forward: ForwardBatch
    next_ids: Tensor
    states: Tensor
    last: Tensor
    known: Tensor


class Drafter:
    """`num_layers` of the draft's layers are chained, at most K = num_drafts tokens are proposed."""

    def __init__(self, draft: Qwen35MTP, sampler: Sampler, num_drafts: int, num_layers: int):
        self.draft, self.sampler = draft, sampler
        self.num_drafts, self.num_layers = num_drafts, min(num_layers, num_drafts)
        weight = draft.fc.weight
        num_rows = len(sampler.table.seq_len) if self.num_layers == 1 else 0
        self._aside = weight.new_zeros(num_rows * MAX_BEHIND, weight.shape[0])
        self._aside_ids = torch.zeros(num_rows * MAX_BEHIND, dtype=torch.int64, device=weight.device)

    def propose(self, hidden: Tensor, sampled: Sampled, forward: ForwardBatch, batch: Batch) -> Tensor:
        """Drafts [B, D] that follow each request's newest token, D the most that one of them wants; what stands behind
        the wanted ones means nothing. hidden [N, H] is the target's for the whole pass.

        First every chained layer runs over the pass's rows and those put aside, row p pairing the token after position
        p with the hidden state at p (this extends its cache and overwrites what earlier guesses left there), then
        single tokens follow. Inside a prompt the next tokens are the prompt's own.
        """
        depth = max(work.num_drafts for work in batch.works)
        drafts = sampled.token_ids.new_zeros(len(batch.works), depth)
        idle = [index for index, work in enumerate(batch.works) if work.is_idle]
        if idle:
            self._put_aside(hidden, sampled, forward, batch, idle)
        if len(idle) < len(batch.works):
            self._chain(self._extension(hidden, sampled, forward, batch), drafts)
        return drafts

    def _chain(self, rows: _Extension, drafts: Tensor) -> None:
        """Run the layers, then single tokens, and write what they guess to drafts [B, D]."""
        positions, state, next_ids = rows.forward.positions[rows.last], rows.states, rows.next_ids
        newest, newest_state = rows.last.new_zeros(0), rows.states[:0]
        for step in range(max(drafts.shape[1], self.num_layers)):
            has_next_layer = step + 1 < self.num_layers
            alive = sum(has_next_layer or work.num_drafts > step for work in rows.works)
            works = rows.works[:alive]
            if step < self.num_layers:
                state = self.draft(next_ids, state, rows.forward, step)
                newest_state = state[rows.last[:alive]]
            else:
                ahead = rows.forward.next_tokens(newest[:alive], positions[:alive] + 1 + step - self.num_layers)
                newest_state = self.draft(newest[:alive], newest_state[:alive], ahead, self.num_layers - 1)
            if alive == 0:
                return
            logits = self.draft.target.compute_logits(newest_state)[:, None]
            newest = self.sampler.draw(logits, works, positions[:alive, None] + 2 + step)[:, 0]
            if step < drafts.shape[1]:
                drafts[rows.order[:alive], step] = newest
            if has_next_layer:
                is_known = rows.known[:, step + 1] >= 0
                next_ids = roll_next_ids(next_ids, rows.last, torch.where(is_known, rows.known[:, step + 1], newest))

    def _extension(self, hidden: Tensor, sampled: Sampled, forward: ForwardBatch, batch: Batch) -> _Extension:
        if batch.is_verify:
            return self._extend_windows(hidden, sampled, forward, batch)
        device = forward.token_ids.device
        known = torch.tensor(following_ids(batch, self.num_layers), device=device)
        last = last_indices(forward)
        newest = torch.where(known[:, 0] >= 0, known[:, 0], sampled.token_ids[:, 0])
        next_ids = roll_next_ids(forward.token_ids, last, newest)
        order = sorted(range(len(batch.works)), key=lambda index: -batch.works[index].num_drafts)
        if order != list(range(len(order))):
            return self._reorder(order, _Extension(batch.works, last, forward, next_ids, hidden, last, known))
        return _Extension(batch.works, torch.arange(len(order), device=device), forward, next_ids, hidden, last, known)

    def _extend_windows(self, hidden: Tensor, sampled: Sampled, forward: ForwardBatch, batch: Batch) -> _Extension:
        device, works = forward.token_ids.device, batch.works
        active = [index for index, work in enumerate(works) if not work.is_idle]
        # Equal lengths side by side, too: they are attended to at once.
        active.sort(key=lambda index: (-works[index].num_drafts, works[index].num_behind + works[index].num_tokens))
        first = last_indices(forward) + 1 - torch.tensor(forward.query_lens, device=device)
        nothing = first.new_full((len(works), self.num_layers), -1)
        rows = _Extension(works, first, forward, sampled.next_ids, hidden, first + sampled.accept_lens - 1, nothing)
        if active == list(range(len(works))) and not any(work.num_behind for work in works):
            order = torch.arange(len(works), device=device)
            return _Extension(works, order, forward, rows.next_ids, hidden, rows.last, nothing)
        return self._reorder(active, rows)

    def _reorder(self, order: list[int], rows: _Extension) -> _Extension:
        """The requests `order` of a pass alone and in this order, each with its states put aside in front."""
        forward, works = rows.forward, [rows.works[index] for index in order]
        view, device = forward.view, forward.token_ids.device
        assert view is not None
        starts = list(accumulate(forward.query_lens, initial=0))
        behind = [(index, ago) for index in order for ago in range(rows.works[index].num_behind, 0, -1)]
        where: list[int] = []  # in what was put aside, followed by the pass
        counts, shifts, num_aside = [], [], 0
        for index, work in zip(order, works, strict=True):
            shifts.append(len(where) + work.num_behind - starts[index])
            where += range(num_aside, num_aside + work.num_behind)
            where += range(len(behind) + starts[index], len(behind) + starts[index + 1])
            num_aside += work.num_behind
            counts.append(work.num_behind + forward.query_lens[index])
        chosen, source = torch.tensor(order, device=device), torch.tensor(where, device=device)
        positions, next_ids, states = forward.positions, rows.next_ids, rows.states
        if behind:
            requests, ago = torch.tensor(behind, device=device).unbind(1)
            past = view.start_lens[requests] - ago
            slots = view.row_ids[requests] * MAX_BEHIND + past % MAX_BEHIND
            positions = torch.cat([past, positions])
            next_ids, states = torch.cat([self._aside_ids[slots], next_ids]), torch.cat([self._aside[slots], states])
        last = rows.last[chosen] + torch.tensor(shifts, device=device)
        picked = ForwardBatch(next_ids[source], positions[source], tuple(counts), view.pick(order))
        return _Extension(works, chosen, picked, picked.token_ids, states[source], last, rows.known[chosen])

    def _put_aside(
        self, hidden: Tensor, sampled: Sampled, forward: ForwardBatch, batch: Batch, idle: list[int]
    ) -> None:
        """Keep the hidden state and the next token of requests that run one row and want no drafts."""
        view = forward.view
        assert view is not None
        flat = last_indices(forward)
        rows, starts = view.row_ids, view.start_lens
        if len(idle) < len(batch.works):
            chosen = torch.tensor(idle, device=flat.device)
            flat, rows, starts = flat[chosen], rows[chosen], starts[chosen]
        slots = rows * MAX_BEHIND + starts % MAX_BEHIND
        self._aside[slots], self._aside_ids[slots] = hidden[flat], sampled.next_ids[flat]
