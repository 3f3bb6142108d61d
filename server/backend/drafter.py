"""Proposes K tokens per request with the draft head, and keeps the head's KV cache level with the target's.

`eagle`: one MTP layer, called again on its own output. `vanilla`: several layers, one per draft; past the last layer it
recurses on that one. Drafts use the request's own sampling settings and the random numbers of the very positions they
guess, so they follow the target's draws also under sampling. They can change speed only, never the output.
"""

import torch
from torch import Tensor

from kernels.speculative import roll_next_ids
from models.forward_batch import ForwardBatch
from models.qwen3_5_mtp.model import Qwen35MTP
from server.backend.batch import following_ids, last_indices
from server.backend.sampler import Sampled, Sampler
from server.request import Batch


class Drafter:
    """`num_layers` of the draft's layers are chained, K = num_drafts tokens are proposed."""

    def __init__(self, draft: Qwen35MTP, sampler: Sampler, num_drafts: int, num_layers: int):
        self.draft, self.sampler = draft, sampler
        self.num_drafts, self.num_layers = num_drafts, min(num_layers, num_drafts)

    def propose(self, hidden: Tensor, sampled: Sampled, forward: ForwardBatch, batch: Batch) -> Tensor:
        """Drafts [B, K] that follow each request's newest token; hidden [N, H] is the target's for the whole pass.

        First every chained layer runs over all N rows, row p pairing the token after position p with the hidden state
        at p (this extends its cache and overwrites what earlier guesses left there), then single tokens follow. Inside
        a prompt the next tokens are the prompt's own, and what is returned means nothing.
        """
        next_ids, last, known = self._pair(sampled, forward, batch)
        positions, state = forward.positions[last], hidden
        newest_state = hidden[last]
        drafts: list[Tensor] = []
        for step in range(self.num_drafts):
            if step < self.num_layers:
                state = self.draft(next_ids, state, forward, step)
                newest_state = state[last]
            else:
                ahead = forward.next_tokens(drafts[-1], positions + 1 + step - self.num_layers)
                newest_state = self.draft(drafts[-1], newest_state, ahead, self.num_layers - 1)
            logits = self.draft.target.compute_logits(newest_state)[:, None]
            drafts.append(self.sampler.draw(logits, batch, positions[:, None] + 2 + step)[:, 0])
            if step + 1 == self.num_layers and not batch.ends_any_prompt:
                return drafts[-1][:, None].expand(-1, self.num_drafts)
            if step + 1 < self.num_layers:
                is_known = known[:, step + 1] >= 0
                newest = torch.where(is_known, known[:, step + 1], drafts[-1])
                next_ids = roll_next_ids(next_ids, last, newest)
        return torch.stack(drafts, dim=1)

    def _pair(self, sampled: Sampled, forward: ForwardBatch, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The token after each of the N rows, the flat index [B] of each request's last real row, and the tokens
        [B, num_layers] that the prompt knows to follow it (-1: none)."""
        if batch.is_verify:
            num_rows = sampled.token_ids.shape[1]
            first = torch.arange(len(batch.requests), device=forward.token_ids.device) * num_rows
            nothing = sampled.token_ids.new_full((len(first), self.num_layers), -1)
            return sampled.token_ids.flatten(), first + sampled.accept_lens - 1, nothing
        known = torch.tensor(following_ids(batch, self.num_layers), device=forward.token_ids.device)
        last = last_indices(forward)
        newest = torch.where(known[:, 0] >= 0, known[:, 0], sampled.token_ids[:, 0])
        return roll_next_ids(forward.token_ids, last, newest), last, known
