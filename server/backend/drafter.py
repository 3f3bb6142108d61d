"""Proposes drafts with the draft head, and keeps the head's KV cache level with the target's.

`eagle`: one MTP layer, called again on its own output. `vanilla`: several layers, one per draft; past the last layer it
recurses on that one. Drafts use the request's own sampling settings and the random numbers of the very positions they
guess, so they follow the target's draws also under sampling. They can change speed only, never the output.

A request that gets no drafts for a while costs nothing here: its newest hidden states are kept in the cache's history,
and the head catches up on them at once when drafts are wanted again. In place of what it has missed before, it attends
to whatever its cache holds there. Where drafts need nothing but a temperature, and the draft can, the whole chain is
one call. B requests, N rows, R rows of the table.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kernels.cpu.decoder import DraftVocabulary
from kernels.speculative import roll_next_ids
from models.cache import HISTORY_LEN
from models.forward_batch import ForwardBatch, to_device
from models.qwen3_5_mtp.model import Qwen35MTP
from server.backend.batch import following_ids, last_indices
from server.backend.pass_masks import DraftMasks
from server.backend.sampler import Sampled, Sampler
from server.config import DRAFT_VOCAB_SIZE
from server.messages import SamplingParams
from server.request import Batch, Work


def choose_vocabulary(size: int | None, vocab_size: int, added_ids: Iterable[int]) -> DraftVocabulary:
    """What is guessed: see `EngineConfig.draft_vocab_size`. Added tokens lie at the end, other ids between them."""
    if size is None:
        size = DRAFT_VOCAB_SIZE if vocab_size >= 4 * DRAFT_VOCAB_SIZE else 0
    if not 0 < size < vocab_size:
        return DraftVocabulary(vocab_size, vocab_size)
    return DraftVocabulary(size, min((token_id for token_id in added_ids if size <= token_id), default=vocab_size))


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

    def propose(
        self, hidden: Tensor, sampled: Sampled, forward: ForwardBatch, batch: Batch, masks: DraftMasks | None = None
    ) -> Tensor:
        """Drafts [B, D] that follow each request's newest token, D the most that one of them wants; what stands behind
        the wanted ones means nothing. hidden [N, H] is the target's for the whole pass; `masks` say which drafts may
        come.

        First every chained layer runs over the pass's rows and those missed before, row p pairing the token after
        position p with the hidden state at p (this extends its cache and overwrites what earlier guesses left there),
        then single tokens follow. Inside a prompt the next tokens are the prompt's own.
        """
        works = batch.works
        drafts = sampled.token_ids.new_zeros(len(works), max(work.num_drafts for work in works))
        self._chain(self._extension(hidden, sampled, forward, batch), drafts, masks)
        return drafts

    def _chain(self, rows: _Extension, drafts: Tensor, masks: DraftMasks | None) -> None:
        """Run the layers, then single tokens, and write what they guess to drafts [B, D]."""
        is_simple = masks is None and all(_is_simple(work.sampling) for work in rows.works if work.num_drafts)
        if is_simple and self.num_layers == 1 and self.draft.can_propose(rows.forward):
            drafts[rows.order] = self._propose_at_once(rows, drafts.shape[1])
            return
        positions, state, next_ids = rows.forward.positions[rows.last], rows.states, rows.next_ids
        newest, newest_state = rows.last.new_zeros(0), rows.states[:0]
        for step in range(max(drafts.shape[1], self.num_layers)):
            has_next_layer = step + 1 < self.num_layers
            alive = sum(has_next_layer or work.num_drafts > step for work in rows.works)
            works = rows.works[:alive]
            if has_next_layer:
                state = self.draft(next_ids, state, rows.forward, step)
                newest_state = state[rows.last[:alive]]
            elif step < self.num_layers:
                newest_state = self.draft(next_ids, state, rows.forward, step, rows.last[:alive])
            else:
                ahead = rows.forward.next_tokens(newest[:alive], positions[:alive] + 1 + step - self.num_layers)
                newest_state = self.draft(newest[:alive], newest_state[:alive], ahead, self.num_layers - 1)
            if alive == 0:
                return
            logits = self.draft.compute_logits(newest_state)
            if masks is not None:
                logits = masks.apply(logits, works)
            newest = self.sampler.draw(logits, works, positions[:alive] + 2 + step)
            if masks is not None:
                masks.push(newest, works)
            if step < drafts.shape[1]:
                drafts[rows.order[:alive], step] = newest
            if has_next_layer:
                is_known = rows.known[:, step + 1] >= 0
                next_ids = roll_next_ids(next_ids, rows.last, torch.where(is_known, rows.known[:, step + 1], newest))

    def _propose_at_once(self, rows: _Extension, depth: int) -> Tensor:
        """All of it in one call: drafts [b, D]."""
        table = self.sampler.table
        alive = [sum(work.num_drafts > step for work in rows.works) for step in range(depth)]
        view = rows.forward.view
        assert view is not None
        temperatures, seeds = table.temperature[view.row_ids], table.seed[view.row_ids]
        return self.draft.propose(rows.next_ids, rows.states, rows.forward, rows.last, alive, temperatures, seeds)

    def _extension(self, hidden: Tensor, sampled: Sampled, forward: ForwardBatch, batch: Batch) -> _Extension:
        if batch.is_verify:
            return self._extend_windows(hidden, sampled, forward, batch)
        device = forward.token_ids.device
        known = to_device(following_ids(batch, self.num_layers), device)
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
        # Equal lengths side by side, too: torch attends to them at once.
        active.sort(key=lambda index: (-works[index].num_drafts, works[index].num_behind + works[index].num_tokens))
        first = last_indices(forward) + 1 - to_device(forward.query_lens, device)
        nothing = first.new_full((len(works), self.num_layers), -1)
        rows = _Extension(works, first, forward, sampled.next_ids, hidden, first + sampled.accept_lens - 1, nothing)
        if active == list(range(len(works))) and not any(work.num_behind for work in works):
            order = torch.arange(len(works), device=device)
            return _Extension(works, order, forward, rows.next_ids, hidden, rows.last, nothing)
        return self._reorder(active, rows)

    def _reorder(self, order: list[int], rows: _Extension) -> _Extension:
        """The requests `order` of a pass alone and in this order, each with the positions it has missed in front."""
        forward, works = rows.forward, [rows.works[index] for index in order]
        view, device = forward.view, forward.token_ids.device
        assert view is not None
        starts = list(accumulate(forward.query_lens, initial=0))
        behind = [(index, ago) for index in order for ago in range(rows.works[index].num_behind, 0, -1)]
        where: list[int] = []  # in what was missed, followed by the pass
        counts, shifts, num_missed = [], [], 0
        for index, work in zip(order, works, strict=True):
            shifts.append(len(where) + work.num_behind - starts[index])
            where += range(num_missed, num_missed + work.num_behind)
            where += range(len(behind) + starts[index], len(behind) + starts[index + 1])
            num_missed += work.num_behind
            counts.append(work.num_behind + forward.query_lens[index])
        chosen, source = to_device(order, device), to_device(where, device)
        positions, next_ids, states = forward.positions, rows.next_ids, rows.states
        if behind:
            requests, ago = to_device(behind, device).unbind(1)
            past, rows_of, history = view.start_lens[requests] - ago, view.row_ids[requests], view.cache.history
            assert history is not None
            positions = torch.cat([past, positions])
            next_ids = torch.cat([history.token_ids[rows_of, (past + 1) % HISTORY_LEN], next_ids])
            states = torch.cat([history.hidden[rows_of, past % HISTORY_LEN], states])
        last = rows.last[chosen] + to_device(shifts, device)
        picked = ForwardBatch(next_ids[source], positions[source], tuple(counts), view.pick(order))
        return _Extension(
            works, chosen, picked, picked.token_ids, states.index_select(0, source), last, rows.known[chosen]
        )


def _is_simple(sampling: SamplingParams) -> bool:
    """Guesses need nothing but a temperature; penalties and min_tokens only make them a little worse."""
    is_filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    return not sampling.logit_bias and (sampling.is_greedy or not is_filtered)
