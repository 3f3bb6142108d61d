"""Cases of drawing tokens and of accepting drafts: half of the requests are greedy, the others draw."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.gpu_suite import bytes as moved
from benchmarks.gpu_suite.case import Case, Setting
from kernels.gpu import sampling as sampling_kernels
from kernels.gpu import speculative as speculative_kernels
from kernels.gpu.sampling import SamplingTable
from kernels.gpu.speculative import CommitTable
from kernels.sampling import draw
from kernels.speculative import accept_torch

_NUM_STOPS = 16
# Logarithms of the device and of torch may differ in the last bit, and so the best of two that are almost equal.
_SLACK = 0.02


def token_cases(setting: Setting) -> Iterator[Case]:
    """Draws without filters (what most requests are) and with all of them, and a commit."""
    yield _draw(setting, has_filters=False)
    yield _draw(setting, has_filters=True)
    yield _commit(setting)


def make_table(setting: Setting, has_filters: bool) -> SamplingTable:
    """Rows 0..B without rules: odd ones are greedy, even ones have a temperature, and filters if wanted."""
    num_rows, device = setting.batch + 1, setting.device

    def column(value: float, dtype: torch.dtype = torch.float32, *size: int) -> Tensor:
        return torch.full((num_rows, *size), value, dtype=dtype, device=device)

    odd = torch.arange(num_rows, device=device) % 2 == 1
    return SamplingTable(
        temperature=torch.where(odd, 0.0, 0.8),
        top_p=column(0.95 if has_filters else 1.0),
        min_p=column(0.01 if has_filters else 0.0),
        repetition=column(1.0),
        frequency=column(0.0),
        presence=column(0.0),
        top_k=column(50 if has_filters else 0, torch.int64),
        seed=setting.integers(0, 2**62, num_rows),
        prompt_len=column(0, torch.int64),
        min_tokens=column(0, torch.int64),
        bias_ids=column(-1, torch.int64, 4),
        bias_values=column(torch.nan, torch.float32, 4),
        banned_ids=column(-1, torch.int64, 4),
        output_counts=column(0, torch.int32, setting.sizes.vocab),
        in_prompt=column(0, torch.bool, setting.sizes.vocab),
        has_rules=column(0, torch.bool),
    )


def _draw(setting: Setting, has_filters: bool) -> Case:
    table, rows = make_table(setting, has_filters), setting.row_ids().repeat_interleave(setting.num_tokens)
    logits = setting.normal(setting.rows, setting.sizes.vocab, scale=2.0)
    positions = setting.integers(0, 2**20, setting.rows)
    window, is_greedy = setting.integers(0, setting.sizes.vocab, setting.rows), table.temperature[rows] == 0

    def read(drawn: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        """A greedy token may be any of several equal ones: its logit says whether it was the best."""
        token_ids, is_finite = drawn
        values = logits.gather(1, token_ids[:, None])[:, 0]
        return values[is_greedy], token_ids[~is_greedy], is_finite

    def law() -> Sequence[Tensor]:
        token_ids = draw(
            logits.float(),
            table.temperature[rows],
            table.top_k[rows],
            table.top_p[rows],
            table.min_p[rows],
            table.seed[rows],
            positions,
        )
        return read((token_ids, torch.ones_like(token_ids, dtype=torch.bool)))

    return Case(
        "draw filtered" if has_filters else "draw",
        setting,
        lambda: sampling_kernels.draw(logits, table, rows, positions, window, setting.num_tokens),
        read,
        law,
        moved.draw(setting.rows, setting.batch, setting.sizes.vocab, setting.element),
        slack=_SLACK,
    )


def _commit(setting: Setting) -> Case:
    batch, num_tokens, rows = setting.batch, setting.num_tokens, setting.row_ids()
    token_ids, window = (setting.integers(0, 3, batch * num_tokens) for _ in range(2))
    window[1:] = torch.where(setting.integers(0, 4, batch * num_tokens - 1) > 0, token_ids[:-1], window[1:])
    widths = torch.full_like(rows, num_tokens)
    seq_len = setting.integers(10, 1000, batch + 1)
    stop_ids = torch.where(setting.integers(0, 4, batch + 1, _NUM_STOPS) > 0, -1, 2)
    table = CommitTable(
        seq_len=seq_len.clone(),
        accept_len=torch.zeros_like(seq_len),
        longest_len=seq_len + setting.integers(0, num_tokens + 3, batch + 1),
        next_ids=torch.full((batch + 1, num_tokens), -7, device=setting.device),
        stop_ids=stop_ids,
        output_counts=torch.zeros(batch + 1, setting.sizes.vocab, dtype=torch.int32, device=setting.device),
        has_rules=torch.zeros(batch + 1, dtype=torch.bool, device=setting.device),
    )

    def run() -> tuple[Tensor, Tensor]:
        return speculative_kernels.accept_and_commit(token_ids, window, widths, rows, table)

    def read(lens: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        return *lens, table.seq_len[1:], table.accept_len[1:], table.next_ids[1:, 0]

    def law() -> Sequence[Tensor]:
        room = table.longest_len[1:] - seq_len[1:] - 1
        accepted = accept_torch(token_ids, window, [num_tokens] * batch, stop_ids[1:], room)
        lens = accepted.accept_lens
        newest = accepted.token_ids.gather(1, lens[:, None] - 1)[:, 0]
        return accepted.match_lens, lens, seq_len[1:] + lens, lens, newest

    counted = moved.accept_and_commit(batch, num_tokens, _NUM_STOPS)
    return Case("accept_and_commit", setting, run, read, law, counted)
