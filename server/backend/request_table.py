"""The device's record of every running request: one row each, one writer (`commit`).

R rows (row 0 is padding), P pages of the longest request, K = mtp_step, T = K + 1, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.cache import Cache
from models.forward_batch import CacheView, ForwardBatch
from server.messages import SamplingParams
from server.request import Work

MAX_STOP_IDS = 16


class RequestTable:
    """page_table [R, P], seq_len [R] (tokens committed in KV), accept_len [R] (of the last step; 0 after prefill),
    next_ids [R, T] (the newest token and its drafts), and the sampling settings of each row, with what ends its
    request: stop_ids [R, MAX_STOP_IDS] (-1: none) and longest_len [R]. All int64 or float32."""

    def __init__(self, cache: Cache, num_rows: int, max_pages: int, mtp_step: int, vocab_size: int, device: str):
        def column(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(num_rows, *shape, dtype=dtype, device=device)

        self.cache, self.device, self.vocab_size = cache, device, vocab_size
        self.page_table = column(max_pages)
        self.seq_len = column()
        self.accept_len = column()
        self.next_ids = column(mtp_step + 1)
        self._counts = column(5)
        self.prompt_len, self.min_tokens, self.top_k, self.seed, self.longest_len = self._counts.unbind(1)
        self.stop_ids = column(MAX_STOP_IDS)
        self._scales = column(6, dtype=torch.float32)
        self.temperature, self.top_p, self.min_p = self._scales[:, :3].unbind(1)
        self.repetition, self.frequency, self.presence = self._scales[:, 3:].unbind(1)
        self.output_counts: Tensor | None = None  # [R, V] int32 and [R, V] bool, made for the first penalised request
        self.in_prompt: Tensor | None = None

    def admit(self, work: Work) -> None:
        """Make the work's row that of a sequence with `start` tokens and its request's sampling settings.

        With start > 0 the caller restores the states at that position afterwards or has done so: they are left alone.
        """
        row, request, sampling = work.row, work.request, work.request.sampling
        if work.start == 0:
            self.cache.gdn.reset(row)
        self.page_table[row] = 0
        self.seq_len[row], self.accept_len[row] = work.start, 0
        prompt_len = len(request.prompt_ids)
        counts = [prompt_len, sampling.min_tokens, sampling.top_k, request.seed, prompt_len + request.max_output]
        self._counts[row] = torch.tensor(counts, device=self.device)
        scales = [0.0 if sampling.is_greedy else sampling.temperature, sampling.top_p, sampling.min_p]
        scales += [sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty]
        self._scales[row] = torch.tensor(scales, device=self.device)
        stop_ids = sorted(request.stop_ids)[:MAX_STOP_IDS]
        self.stop_ids[row] = torch.tensor(stop_ids + [-1] * (MAX_STOP_IDS - len(stop_ids)), device=self.device)
        if has_penalty(sampling):
            self._count_known_tokens(work)

    def write_pages(self, row: int, first: int, pages: Sequence[int]) -> None:
        """Add pages to the row's page table from index `first` on."""
        self.page_table[row, first : first + len(pages)] = torch.tensor(pages, device=self.device)

    def read_ends(self, rows: Tensor, start_lens: Tensor) -> tuple[Tensor, Tensor]:
        """What ends the requests in rows [B], so that a row never runs past it and its state can be kept for the next
        one: their stop_ids [B, MAX_STOP_IDS], and how many tokens [B] they may still emit behind start_lens [B]."""
        return self.stop_ids[rows], self.longest_len[rows] - start_lens - 1

    def commit(self, forward: ForwardBatch, last_ids: Tensor, drafts: Tensor, accept_lens: Tensor) -> None:
        """Advance the rows of a pass: after a verify step by accept_lens, after prefill by the tokens it ran.

        last_ids [B]: each request's newest token; drafts [B, up to K]; accept_lens [B]: tokens emitted, 0 or 1 after
        prefill.
        """
        view = forward.view
        assert view is not None
        rows = view.row_ids
        if view.is_verify:
            self.seq_len[rows] = view.start_lens + accept_lens
            self.accept_len[rows] = accept_lens
        else:
            self.seq_len[rows] = view.start_lens + torch.tensor(forward.query_lens, device=rows.device)
            self.accept_len[rows] = 0
        self.next_ids[rows, 0] = last_ids
        if drafts.shape[1]:
            self.next_ids[rows, 1 : 1 + drafts.shape[1]] = drafts

    def count_outputs(self, rows: Tensor, token_ids: Tensor, accept_lens: Tensor) -> None:
        """Add the emitted tokens to the penalty counts: token_ids [B, T], of which accept_lens [B] are emitted."""
        assert self.output_counts is not None
        is_emitted = torch.arange(token_ids.shape[1], device=rows.device) < accept_lens[:, None]
        flat = rows[:, None] * self.vocab_size + token_ids
        self.output_counts.view(-1).scatter_add_(0, flat.flatten(), is_emitted.flatten().int())

    def _count_known_tokens(self, work: Work) -> None:
        row, request = work.row, work.request
        if self.output_counts is None:
            shape = (len(self.seq_len), self.vocab_size)
            self.output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
        assert self.in_prompt is not None
        self.in_prompt[row] = False
        self.in_prompt[row, torch.tensor(request.prompt_ids, device=self.device)] = True
        outputs = torch.tensor(work.output_ids, dtype=torch.int64, device=self.device)
        self.output_counts[row] = torch.bincount(outputs, minlength=self.vocab_size)

    def view(self, rows: list[int], is_verify: bool) -> CacheView:
        """The cache as a pass over `rows` sees it."""
        ids = torch.tensor(rows, device=self.device)
        return CacheView(
            cache=self.cache,
            rows=tuple(rows),
            start_lens=self.seq_len[ids],
            accept_lens=self.accept_len[ids],
            page_table=self.page_table[ids],
            is_verify=is_verify,
            row_ids=ids,
        )


def has_penalty(sampling: SamplingParams) -> bool:
    """The request's law depends on how often its tokens have occurred."""
    return sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
