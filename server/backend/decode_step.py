"""A decode step as work of the device alone: verify, sample, accept, commit, draft.

The same as Engine._run_pass and Drafter do for any batch, for requests with equally many rows and drafts: nothing in it
asks the host or waits for it, every shape follows from (B, T, D), so a CUDA graph can hold all of it. A request with
fewer drafts than T - 1 has rows of junk behind them, which its width keeps from being accepted and the next step
overwrites. It has no masks: a batch with a masked output (`OutputMatcher`) runs outside of it, kernel by kernel.

B requests, T rows each, D drafts to propose, R rows of the table (row 0: padding, counts for nothing), V vocabulary.
"""

import torch
from torch import Tensor

from kernels.gpu.sampling import SamplingTable, draw
from kernels.gpu.speculative import CommitTable, accept_and_commit
from kernels.speculative import roll_next_ids
from models.forward_batch import ForwardBatch, to_device
from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from server.backend.device import within_memory
from server.backend.request_table import RequestTable
from server.backend.sampler import Sampled
from server.request import Batch


class DecodeStep:
    """`num_layers` layers of the draft, if there is one, are chained: see Drafter."""

    def __init__(self, target: Qwen35, draft: Qwen35MTP | None, table: RequestTable, num_layers: int):
        self.target, self.draft, self.table, self.num_layers = target, draft, table, num_layers
        assert isinstance(target.lm_head.weight, Tensor), "these kernels take no quantized weights"
        self._head = target.lm_head.weight
        self._logits = self._head.new_empty(table.next_ids.numel(), table.vocab_size)
        self.sampling = sampling_table(table)
        self.commits = commit_table(table)

    def run(self, batch: Batch) -> Sampled:
        """One decode step of the batch's requests."""
        rows, widths, num_tokens, num_drafts = batch.decode_shape
        device = self.table.device
        return self(to_device(rows, device), to_device(widths, device), num_tokens, num_drafts)

    @torch.inference_mode()
    def __call__(self, rows: Tensor, widths: Tensor, num_tokens: int, num_drafts: int) -> Sampled:
        """Advance the requests in rows [B] int64, of whose num_tokens rows widths [B] int64 count, and leave num_drafts
        drafts for the next step."""
        table, batch = self.table, len(rows)
        view = table.view_rows(rows, is_verify=True)
        ahead = torch.arange(num_tokens, device=rows.device)
        window = table.next_ids[rows][:, :num_tokens].flatten()
        positions = (view.start_lens[:, None] + ahead).flatten()
        forward = ForwardBatch(window, positions, (num_tokens,) * batch, view)
        hidden = self.target(forward)  # [B · T, H]: KV is written, GDN folds the accepted tokens, then verifies
        logits = self._compute_logits(hidden)  # [B · T, V]
        each = rows.repeat_interleave(num_tokens)
        token_ids, is_finite = draw(logits, self.sampling, each, positions + 1, window, num_tokens)
        match_lens, accept_lens = accept_and_commit(token_ids, window, widths, rows, self.commits)
        if self.draft is not None:
            last = torch.arange(batch, device=rows.device) * num_tokens + accept_lens - 1
            self._propose(self.draft, hidden, token_ids, last, forward, num_drafts)
        by_request, finite = token_ids.view(batch, -1), is_finite.view(batch, -1).all(1)
        return Sampled(by_request, accept_lens, match_lens, token_ids, logits, finite, [num_tokens] * batch)

    def release(self) -> int:
        """Give back the memory that a step keeps; returns its bytes."""
        num_bytes = self._logits.nbytes
        self._logits.untyped_storage().resize_(0)
        return num_bytes

    def restore(self) -> int:
        """Take it again. Raises ConfigError when there is none."""
        with within_memory("the logits of decode steps", self._logits.nbytes, "free the GPU of other processes"):
            self._logits.untyped_storage().resize_(self._logits.nbytes)
        return self._logits.nbytes

    def _compute_logits(self, hidden: Tensor) -> Tensor:
        """In memory of their own, shared by all graphs, because log-probabilities are taken from them afterwards."""
        logits = self._logits[: len(hidden)]
        if hidden.is_cuda:
            return torch.mm(hidden, self._head.t(), out=logits)
        return logits.copy_(self.target.lm_head(hidden))

    def _propose(
        self, draft: Qwen35MTP, state: Tensor, next_ids: Tensor, last: Tensor, forward: ForwardBatch, num_drafts: int
    ) -> None:
        """Run the chained layers over all rows, then single tokens behind the newest rows `last` [B]."""
        rows, positions = forward.view.row_ids, forward.positions[last]  # type: ignore[union-attr]
        newest, newest_state = next_ids, state
        for step in range(max(num_drafts, self.num_layers)):
            has_next_layer = step + 1 < self.num_layers
            if has_next_layer:
                state = draft(next_ids, state, forward, step)
                newest_state = state[last]
            elif step < self.num_layers:
                newest_state = draft(next_ids, state, forward, step, last if step < num_drafts else last[:0])
            else:
                ahead = forward.next_tokens(newest, positions + 1 + step - self.num_layers)
                newest_state = draft(newest, newest_state, ahead, self.num_layers - 1)
            if step >= num_drafts and not has_next_layer:
                return
            logits = draft.project(newest_state)
            newest, _ = draw(logits, self.sampling, rows, positions + 2 + step, None, 1)
            if step < num_drafts:
                self.table.next_ids[rows, step + 1] = newest
            if has_next_layer:
                next_ids = roll_next_ids(next_ids, last, newest)


def sampling_table(table: RequestTable) -> SamplingTable:
    """The table's columns that drawing reads."""
    assert table.rules is not None and table.output_counts is not None and table.in_prompt is not None
    return SamplingTable(
        temperature=table.temperature,
        top_p=table.top_p,
        min_p=table.min_p,
        repetition=table.repetition,
        frequency=table.frequency,
        presence=table.presence,
        top_k=table.top_k,
        seed=table.seed,
        prompt_len=table.prompt_len,
        min_tokens=table.min_tokens,
        bias_ids=table.rules.bias_ids,
        bias_values=table.rules.bias_values,
        banned_ids=table.rules.banned_ids,
        output_counts=table.output_counts,
        in_prompt=table.in_prompt,
        has_rules=table.rules.has_any,
    )


def commit_table(table: RequestTable) -> CommitTable:
    """The table's columns that accepting reads and writes."""
    assert table.rules is not None and table.output_counts is not None
    return CommitTable(
        seq_len=table.seq_len,
        accept_len=table.accept_len,
        longest_len=table.longest_len,
        next_ids=table.next_ids,
        stop_ids=table.stop_ids,
        output_counts=table.output_counts,
        has_rules=table.rules.has_any,
    )
