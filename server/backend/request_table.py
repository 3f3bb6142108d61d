"""The device's record of every running request: one row each, one writer (`commit`).

R rows (row 0 is padding), P pages of the longest request, K = mtp_step, T = K + 1, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sampling import PenaltyTable, count_outputs
from models.cache import Cache
from models.forward_batch import CacheView, ForwardBatch, to_device
from server.messages import MAX_BIASES, MAX_STOP_TOKEN_IDS, SamplingParams
from server.request import Work

MAX_STOP_IDS = 16


@dataclass(frozen=True)
class RuleColumns:
    """What sampling rules need on the device where no pass is told who has which: has_any [R] bool; bias_ids [R,
    MAX_BIASES] int64 (-1: none) and bias_values float32; banned_ids [R, MAX_BANNED] int64 (-1: none), which min_tokens
    bans."""

    has_any: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    banned_ids: Tensor

    @staticmethod
    def allocate(num_rows: int, num_banned: int, device: str) -> "RuleColumns":
        return RuleColumns(
            torch.zeros(num_rows, dtype=torch.bool, device=device),
            torch.full((num_rows, MAX_BIASES), -1, device=device),
            torch.zeros(num_rows, MAX_BIASES, device=device),
            torch.full((num_rows, num_banned), -1, device=device),
        )

    def write(self, row: int, sampling: SamplingParams, banned_ids: Sequence[int]) -> None:
        """The row's request is another one now."""
        device = self.has_any.device
        self.has_any[row : row + 1] = has_rules(sampling)
        biases = sampling.logit_bias
        self.bias_ids[row] = to_device(_padded(list(biases), MAX_BIASES), device)
        self.bias_values[row, : len(biases)] = to_device(list(biases.values()), device)
        self.banned_ids[row] = to_device(_padded(banned_ids, self.banned_ids.shape[1]), device)


def _padded(ids: Sequence[int], length: int) -> list[int]:
    return [*ids, *[-1] * (length - len(ids))]


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
        self.rules: RuleColumns | None = None
        self._eos_ids: tuple[int, ...] = ()

    def keep_rules(self, eos_ids: tuple[int, ...]) -> None:
        """From now on everything that sampling rules need stands on the device: for decode steps that nobody tells who
        has rules."""
        self._eos_ids = eos_ids
        self.rules = RuleColumns.allocate(len(self.seq_len), MAX_STOP_TOKEN_IDS + len(eos_ids), self.device)
        self._make_counts()

    def admit(self, work: Work) -> None:
        """Make the work's row that of a sequence with `start` tokens and its request's sampling settings.

        With start > 0 the caller restores the states at that position afterwards or has done so: they are left alone.
        """
        row, request, sampling = work.row, work.request, work.request.sampling
        if work.start == 0:
            self.cache.gdn.reset(row)
        self.page_table[row] = 0
        # Slices: a number for one element alone would make the host wait for a GPU.
        self.seq_len[row : row + 1], self.accept_len[row : row + 1] = work.start, 0
        prompt_len = len(request.prompt_ids)
        # A matcher bans early ends itself, because it may have to let one through.
        min_tokens = 0 if request.matcher is not None else sampling.min_tokens
        counts = [prompt_len, min_tokens, sampling.top_k, request.seed, prompt_len + request.max_output]
        self._counts[row] = to_device(counts, self.device)
        scales = [0.0 if sampling.is_greedy else sampling.temperature, sampling.top_p, sampling.min_p]
        scales += [sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty]
        self._scales[row] = to_device(scales, self.device)
        # Where there are too many, the checkpoint's own ones are what most answers end with.
        stop_ids = sorted(request.stop_ids, key=lambda token_id: (token_id in sampling.stop_token_ids, token_id))
        self.stop_ids[row] = to_device(_padded(stop_ids[:MAX_STOP_IDS], MAX_STOP_IDS), self.device)
        if self.rules is not None:
            self.rules.write(row, sampling, sorted({*self._eos_ids, *sampling.stop_token_ids}))
        if has_penalty(sampling):
            self._count_known_tokens(work)

    def write_pages(self, works: Sequence[Work]) -> None:
        """Add the works' new pages to the page tables of their rows."""
        places = [(work.row, work.first_page + i, page) for work in works for i, page in enumerate(work.pages)]
        if places:
            rows, columns, pages = to_device(places, self.device).unbind(1)
            self.page_table[rows, columns] = pages

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
            self.seq_len[rows] = view.start_lens + to_device(forward.query_lens, rows.device)
            self.accept_len.index_fill_(0, rows, 0)
        self.next_ids[rows, 0] = last_ids
        if drafts.shape[1]:
            self.next_ids[rows, 1 : 1 + drafts.shape[1]] = drafts

    def count_outputs(self, forward: ForwardBatch, token_ids: Tensor, accept_lens: Tensor) -> None:
        """Add the tokens that a pass emits, of token_ids [B, T] the first accept_lens [B], to the penalty counts of its
        rows, which need be right only where there is a penalty."""
        assert self.output_counts is not None and forward.view is not None
        count_outputs(self.output_counts, forward.view.row_ids, token_ids, accept_lens)

    @property
    def penalties(self) -> PenaltyTable:
        """What penalties are made of, once there has been a penalised request."""
        assert self.output_counts is not None and self.in_prompt is not None
        return PenaltyTable(self._scales[:, 3:], self.output_counts, self.in_prompt)

    def _count_known_tokens(self, work: Work) -> None:
        row, request = work.row, work.request
        self._make_counts()
        assert self.in_prompt is not None and self.output_counts is not None and work.output_ids is not None
        self.in_prompt[row] = False
        self.in_prompt[row].index_fill_(0, to_device(request.prompt_ids, self.device), True)
        self.output_counts[row] = 0
        outputs = to_device(work.output_ids, self.device).long()
        self.output_counts[row].scatter_add_(0, outputs, torch.ones_like(outputs, dtype=torch.int32))

    def _make_counts(self) -> None:
        if self.output_counts is None:
            shape = (len(self.seq_len), self.vocab_size)
            self.output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)

    def view(self, rows: list[int], is_verify: bool, num_pages: int) -> CacheView:
        """The cache as a pass over `rows` sees it; none of them has more than `num_pages` pages."""
        # Drafts that nobody can use any more may lie behind a request's last page: on the padding page.
        width = num_pages + -(-self.next_ids.shape[1] // self.cache.kv.page_size)
        return self.view_rows(to_device(rows, self.device), is_verify, tuple(rows), width)

    def view_rows(
        self, ids: Tensor, is_verify: bool, rows: tuple[int, ...] = (), width: int | None = None
    ) -> CacheView:
        """`view` of rows [B] int64 that stand on the device, where the host need not know them; the page tables as far
        as `width`, if given."""
        return CacheView(
            cache=self.cache,
            rows=rows,
            start_lens=self.seq_len[ids],
            accept_lens=self.accept_len[ids],
            page_table=self.page_table[:, :width][ids],
            is_verify=is_verify,
            row_ids=ids,
        )


def has_rules(sampling: SamplingParams) -> bool:
    """Its logits are changed before a token is drawn."""
    return bool(sampling.min_tokens or sampling.logit_bias) or has_penalty(sampling)


def has_penalty(sampling: SamplingParams) -> bool:
    """The request's law depends on how often its tokens have occurred."""
    return sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
