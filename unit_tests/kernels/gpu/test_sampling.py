"""Triton's draws against the law, interpreted; the settings are strided columns of a table."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import sampling as law
from kernels.gpu.sampling import SamplingTable, _make_noise, _make_row_key, draw

OFF: dict[str, Any] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition": 1.0,
    "frequency": 0.0,
    "presence": 0.0,
    "top_k": 0,
    "prompt_len": 0,
    "min_tokens": 0,
    "biases": {},
    "banned": [],
    "outputs": [],
    "prompt": [],
    "has_rules": False,
}
FLOATS = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
INTS = ("top_k", "seed", "prompt_len", "min_tokens")


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def make_table(settings: list[dict[str, Any]], vocab_size: int) -> SamplingTable:
    """Row i + 1 has settings[i]; row 0 is all zeros."""
    num_rows = len(settings) + 1
    floats, ints = torch.zeros(num_rows, len(FLOATS)), torch.zeros(num_rows, len(INTS) + 1, dtype=torch.int64)
    bias_ids, bias_values = torch.full((num_rows, 5), -1), torch.full((num_rows, 5), torch.nan)
    banned_ids = torch.full((num_rows, 3), -1)
    output_counts = torch.zeros(num_rows, vocab_size, dtype=torch.int32)
    in_prompt = torch.zeros(num_rows, vocab_size, dtype=torch.bool)
    has_rules = torch.zeros(num_rows, dtype=torch.bool)
    for row, given in enumerate(settings, start=1):
        one = {**OFF, "seed": 7919 * row - 2**40, **given}
        floats[row] = torch.tensor([one[name] for name in FLOATS])
        ints[row, : len(INTS)] = torch.tensor([one[name] for name in INTS])
        for place, (token, value) in enumerate(one["biases"].items()):
            bias_ids[row, place], bias_values[row, place] = token, value
        banned_ids[row, : len(one["banned"])] = torch.tensor(one["banned"])
        output_counts[row] = torch.bincount(torch.tensor(one["outputs"], dtype=torch.int64), minlength=vocab_size)
        in_prompt[row, one["prompt"]] = True
        has_rules[row] = one["has_rules"]
    columns = (*floats.unbind(1), *ints.unbind(1)[: len(INTS)])
    return SamplingTable(*columns, bias_ids, bias_values, banned_ids, output_counts, in_prompt, has_rules)


def apply_rules(
    logits: Tensor, table: SamplingTable, rows: Tensor, positions: Tensor, window: Tensor | None, width: int
) -> Tensor:
    """Of the law's values [N, V], row by row: banned ids, biases, penalties."""
    values = logits.clone()
    for n, row in enumerate(rows.tolist()):
        if not table.has_rules[row]:
            continue
        if positions[n] - table.prompt_len[row] < table.min_tokens[row]:
            values[n, [token for token in table.banned_ids[row].tolist() if token >= 0]] = -torch.inf
        for token, value in zip(table.bias_ids[row].tolist(), table.bias_values[row].tolist(), strict=True):
            values[n, token] += value if token >= 0 else 0.0
        counts = table.output_counts[row].clone()
        for draft in [] if window is None else window[n - n % width + 1 : n + 1].tolist():
            counts[draft] += 1
        penalties = (column[row, None] for column in (table.repetition, table.frequency, table.presence))
        values[n] = law.apply_penalties(values[n, None], counts[None], table.in_prompt[row, None], *penalties)[0]
    return values


def draw_by_law(
    logits: Tensor,
    table: SamplingTable,
    rows: Tensor,
    positions: Tensor,
    window: Tensor | None = None,
    width: int = 1,
) -> Tensor:
    values = apply_rules(logits, table, rows, positions, window, width)
    settings = (column[rows] for column in (table.temperature, table.top_k, table.top_p, table.min_p, table.seed))
    return law.draw(values, *settings, positions)


def assert_law(
    logits: Tensor, table: SamplingTable, rows: Tensor, positions: Tensor, window: Tensor | None = None, width: int = 1
) -> Tensor:
    """The tokens, which are the law's."""
    before = logits.clone()
    token_ids, is_finite = draw(logits, table, rows, positions, window, width)
    assert torch.equal(logits, before)
    assert is_finite.dtype == torch.bool and is_finite.all()
    assert token_ids.tolist() == draw_by_law(logits, table, rows, positions, window, width).tolist()
    return token_ids


MIXED = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.2, "top_k": 1},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.02},
    {"temperature": 0.8, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.5, "min_p": 1.0},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.3},
    {"temperature": 2.0, "top_k": 3, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1e-5, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.0, "top_k": 20, "top_p": 0.8},
]


def test_requests_with_all_kinds_of_settings_draw_as_the_law_in_one_batch() -> None:
    table = make_table(MIXED, 777)
    rows = torch.arange(len(MIXED)) + 1
    assert_law(3 * random(len(rows), 777, seed=0), table, rows, 100 + torch.arange(len(rows)))


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    """About fifty tokens have each value, -0 and 0 among them."""
    settings = [
        {"temperature": 0.7, "top_k": 1},
        {"temperature": 1.0, "top_k": 60, "top_p": 0.5},
        {"temperature": 1.3, "top_k": 3, "top_p": 0.99},
        {"temperature": 1.0, "top_p": 0.3},
        {"temperature": 1.0, "min_p": 0.6},
    ]
    rows = torch.arange(20) % 5 + 1
    logits = -(random(20, 300, seed=1).abs() * 4).round() / 4
    drawn = assert_law(logits, make_table(settings, 300), rows, torch.arange(20))
    assert len(set(drawn[rows == 1].tolist())) > 1


def test_of_equal_values_the_lowest_token_is_the_best() -> None:
    logits = torch.full((2, 700), -1.0)
    logits[0, [650, 300, 290]] = 2.0
    logits[1, [650, 300, 290]] = torch.tensor([0.0, 0.0, -0.0])
    rows, positions = torch.ones(2, dtype=torch.int64), torch.arange(2)
    assert draw(logits, make_table([{}], 700), rows, positions, None, 1)[0].tolist() == [290, 290]


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    settings = [{"temperature": 1.0, "top_k": 2**31}, {"temperature": 1.0, "top_k": 51, "top_p": 0.999}]
    rows = torch.tensor([1, 2, 1, 2])
    assert_law(random(4, 50, seed=2), make_table(settings, 50), rows, torch.arange(4))


def test_a_vocabulary_of_many_chunks_is_drawn_from_as_a_whole() -> None:
    """The rows are strided; chunks fill several tiles and parts, and the filters keep thousands of tokens or few."""
    vocab_size = 9013
    settings = [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.95},
        {"temperature": 1.0, "top_k": 6000, "top_p": 0.9},
        {"temperature": 3.0, "top_p": 0.9},
        {"temperature": 3.0, "min_p": 0.05},
    ]
    logits = (2 * random(6, vocab_size + 50, seed=3))[:, 50:]
    assert_law(logits, make_table(settings, vocab_size), torch.arange(6) + 1, torch.arange(6) * 2**31)


def test_penalties_count_output_prompt_and_the_drafts_before_a_row() -> None:
    """Rows without rules do not read what stands there. Few tokens: drafts repeat outputs and each other."""
    counted = {"outputs": [1, 1, 5, 9, 9, 9], "prompt": [2, 5, 11], "has_rules": True}
    settings = [
        {"repetition": 1.8, **counted},
        {"temperature": 0.8, "frequency": 0.4, "presence": -0.7, **counted},
        {"temperature": 1.0, "repetition": 0.6, "presence": 1.5, "top_k": 5, "top_p": 0.9, **counted},
        {"temperature": 1.0, "repetition": torch.nan, "presence": torch.nan, **counted, "has_rules": False},
    ]
    rows = torch.arange(4).repeat_interleave(3).repeat(2) + 1
    window = torch.randint(0, 12, (24,), generator=torch.Generator().manual_seed(4))
    table, positions = make_table(settings, 12), 50 + torch.arange(24)
    drawn = assert_law(random(24, 12, seed=5), table, rows, positions, window, 3)
    assert not torch.equal(drawn, draw_by_law(random(24, 12, seed=5), table, rows, positions))


def test_biases_are_added_and_ids_are_banned_until_min_tokens() -> None:
    rules = {"biases": {3: 9.0, 17: -100.0, 299: 4.0}, "banned": [3, 280], "has_rules": True, "prompt_len": 30}
    settings = [
        {"min_tokens": 10, **rules},
        {"temperature": 1.0, "min_tokens": 10, **rules},
        {"temperature": 1.0, "min_tokens": 10, "top_k": 2, "frequency": 0.5, "outputs": [299], **rules},
        {"min_tokens": 10, **rules, "has_rules": False},
    ]
    rows = torch.arange(4).repeat(3) + 1
    positions = torch.tensor([30, 39, 40]).repeat_interleave(4)
    logits = random(12, 300, seed=6)
    logits[:, 280] = 3.0
    drawn = assert_law(logits, make_table(settings, 300), rows, positions).view(3, 4)
    assert not {*drawn[:2, :3].flatten().tolist()} & {3, 280}
    assert drawn[2, 0] == 3 and (drawn[:, 3] != 3).all()


def test_a_row_draws_the_same_alone_in_any_batch_and_beside_padding() -> None:
    table = make_table(MIXED, 300)
    rows = torch.tensor([3, 0, 9, 13, 0])
    logits, positions = random(5, 300, seed=7), torch.arange(5)
    together, _ = draw(logits, table, rows, positions, None, 1)
    assert together[rows == 0].tolist() == logits[rows == 0].argmax(-1).tolist()
    for n in range(5):
        one = slice(n, n + 1)
        assert torch.equal(draw(logits[one], table, rows[one], positions[one], None, 1)[0], together[one])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}])
def test_rows_without_a_finite_maximum_are_told_and_still_give_a_token(settings: dict[str, Any]) -> None:
    logits = random(7, 300, seed=8)
    logits[0, 299] = torch.nan
    logits[1, 5] = -torch.tensor(torch.nan)
    logits[2, 280] = torch.inf
    logits[3] = -torch.inf
    logits[4] = torch.nan
    logits[5, :299] = -torch.inf
    table, rows, positions = make_table([settings], 300), torch.ones(7, dtype=torch.int64), torch.arange(7)
    token_ids, is_finite = draw(logits, table, rows, positions, None, 1)
    assert is_finite.tolist() == [False] * 5 + [True] * 2
    assert ((token_ids >= 0) & (token_ids < 300)).all()
    assert token_ids[5:].tolist() == draw_by_law(logits[5:], table, rows[5:], positions[5:]).tolist()


def test_no_rows_are_no_launch() -> None:
    none = torch.empty(0, dtype=torch.int64)
    token_ids, is_finite = draw(torch.empty(0, 30), make_table([{}], 30), none, none, none, 3)
    assert token_ids.shape == is_finite.shape == (0,)


@triton.jit
def _noise_kernel(seeds_ptr, positions_ptr, keys_ptr, noise_ptr, first_token, BLOCK: tl.constexpr):
    n, token = tl.program_id(0), tl.arange(0, BLOCK)
    first, second = _make_row_key(tl.load(seeds_ptr + n), tl.load(positions_ptr + n))
    tl.store(keys_ptr + 2 * n, first.to(tl.int32, bitcast=True))
    tl.store(keys_ptr + 2 * n + 1, second.to(tl.int32, bitcast=True))
    tl.store(noise_ptr + n * BLOCK + token, _make_noise(first_token + token, first, second))


def test_row_keys_are_the_laws_to_the_bit_and_noise_is_nearly() -> None:
    edges = torch.tensor([0, 1, -1, 2**40 + 3, -(2**63), 2**63 - 1])
    seeds = torch.cat([edges, torch.randint(-(2**62), 2**62, (10,), generator=torch.Generator().manual_seed(9))])
    positions = torch.cat([torch.tensor([0, 7, 2**33 + 1, 5, 6, 0]), torch.arange(10) * 1001])
    keys, noise = torch.zeros(16, 2, dtype=torch.int32), torch.full((16, 65536), torch.nan)
    _noise_kernel[(16,)](seeds, positions, keys, noise, 0, BLOCK=65536)
    assert torch.equal(keys, torch.stack(law.row_keys(seeds, positions), 1))
    torch.testing.assert_close(noise, law.gumbel_noise(seeds, positions, 65536, torch.float32), rtol=1e-6, atol=1e-6)
    expected = law.gumbel_noise(seeds, positions, 65536, torch.float64)
    assert expected.max() > 13  # where the tokens that are drawn come from, it is as good as float32 can be
    torch.testing.assert_close(noise[noise > 1].double(), expected[noise > 1], rtol=5e-7, atol=0)
