"""Draws follow softmax and every filter's law, depend on seed and position alone, and penalties count what they say."""

import math

import pytest
import torch
from scipy import stats

from kernels import sampling
from kernels.sampling import (
    PenaltyTable,
    apply_penalties,
    compute_logprobs,
    count_outputs,
    draw,
    gumbel_noise,
    mask,
    penalise,
    process,
    row_keys,
)

NUM_DRAWS = 40_000
LOGITS = torch.tensor([2.0, 1.5, 1.5, 0.7, 0.0, -0.3, -2.0, -6.0], dtype=torch.float64)


def sample(logits, positions, *, seeds=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One draw per position, all rows with the same logits and settings."""
    count = len(positions)
    return draw(
        logits.expand(count, -1),
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p),
        min_p=torch.full((count,), min_p),
        seeds=torch.full((count,), seeds) if isinstance(seeds, int) else seeds,
        positions=positions,
    )


def law(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The probabilities that `sample` should follow, by sorting and adding up; ties with the last kept token stay."""
    weights = {token: math.exp(value / temperature) for token, value in enumerate(logits.tolist())}
    order = sorted(weights, key=lambda token: -weights[token])
    kept = order[:top_k] if top_k else order
    kept = [token for token in kept if weights[token] >= min_p * weights[order[0]]]
    total, before, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if before < top_p:
            nucleus.append(token)
        before += weights[token] / total
    least = min(weights[token] for token in nucleus)
    final = {token: weight for token, weight in weights.items() if weight >= least}
    return {token: weight / sum(final.values()) for token, weight in final.items()}


def p_value(drawn, expected):
    """Chi-square of the drawn tokens against the law; tokens outside it are an error."""
    counts = torch.bincount(drawn, minlength=len(LOGITS)).tolist()
    assert all(count == 0 for token, count in enumerate(counts) if token not in expected)
    observed = [counts[token] for token in expected]
    return stats.chisquare(observed, [len(drawn) * p for p in expected.values()]).pvalue if len(observed) > 1 else 1.0


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 4},
    {"top_k": 100},
    {"top_p": 0.01},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 5, "top_p": 0.9},
    {"top_k": 6, "top_p": 0.8, "min_p": 0.1, "temperature": 1.7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_law_of_their_settings(settings):
    drawn = sample(LOGITS, torch.arange(NUM_DRAWS), seeds=11, **settings)
    assert p_value(drawn, law(LOGITS, **settings)) > 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_over_seeds_follow_the_law_too(dtype):
    seeds = torch.arange(NUM_DRAWS) * 2**33 - 2**40
    drawn = sample(LOGITS.to(dtype), torch.full((NUM_DRAWS,), 5), seeds=seeds)
    assert p_value(drawn, law(LOGITS)) > 0.001


@pytest.mark.parametrize(
    ("seed_step", "position_step"), [(0, 1), (1, 0), (2**32, 0), (1, 1), (1, -1)], ids=lambda step: str(step)
)
def test_neighbouring_draws_are_independent(seed_step, position_step):
    """Of the next position, the next seed, and seeds that differ in their high word only."""
    seeds, positions = torch.arange(NUM_DRAWS) % 200, 100 + torch.arange(NUM_DRAWS) // 200
    first = sample(LOGITS, positions, seeds=seeds)
    second = sample(LOGITS, positions + position_step, seeds=seeds + seed_step)
    size = 6
    is_common = (first < size) & (second < size)
    table = torch.bincount(first[is_common] * size + second[is_common], minlength=size * size).view(size, size)
    assert stats.chi2_contingency(table.numpy()).pvalue > 0.001


def test_a_row_draws_the_same_alone_and_in_any_batch():
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 64, generator=source)
    settings = {
        "temperature": torch.rand(40, generator=source) * (torch.arange(40) % 3 > 0),
        "top_k": torch.randint(0, 20, (40,), generator=source),
        "top_p": 0.3 + 0.7 * torch.rand(40, generator=source),
        "min_p": 0.1 * torch.rand(40, generator=source),
        "seeds": torch.randint(-(2**62), 2**62, (40,), generator=source),
        "positions": torch.randint(0, 5000, (40,), generator=source),
    }
    together = draw(logits, **settings)
    order = torch.randperm(40, generator=source)
    assert torch.equal(draw(logits[order], **{name: x[order] for name, x in settings.items()}), together[order])
    for row in range(40):
        one = slice(row, row + 1)
        assert torch.equal(draw(logits[one], **{name: x[one] for name, x in settings.items()}), together[one])


def test_temperature_zero_takes_the_best_token():
    logits = torch.randn(5, 30)
    zeros = torch.zeros(5)
    drawn = draw(logits, zeros, zeros.long(), torch.ones(5), zeros, seeds=torch.arange(5), positions=torch.arange(5))
    assert torch.equal(drawn, logits.argmax(-1))


def test_a_tiny_temperature_takes_the_best_token():
    drawn = sample(LOGITS, torch.arange(1000), temperature=1e-5)
    assert (drawn == 0).all()


def test_forbidden_tokens_are_never_drawn():
    logits = LOGITS.clone()
    logits[0] = -torch.inf
    for settings in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.01}):
        drawn = sample(logits, torch.arange(3000), **settings)
        assert (drawn != 0).all()
        assert drawn.unique().numel() > 1


def test_tokens_that_tie_with_the_last_kept_one_are_kept():
    drawn = sample(LOGITS, torch.arange(5000), top_k=2)
    assert set(drawn.tolist()) == {0, 1, 2}


PHILOX_M, PHILOX_W, LOW = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 in Python integers: the four output words."""
    words, key = list(counter), list(key)
    for _ in range(10):
        first, second = PHILOX_M[0] * words[0], PHILOX_M[1] * words[2]
        words = [(second >> 32) ^ words[1] ^ key[0], second & LOW, (first >> 32) ^ words[3] ^ key[1], first & LOW]
        key = [(k + w) & LOW for k, w in zip(key, PHILOX_W, strict=True)]
    return words


def mix(x):
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & LOW
    return x ^ (x >> 16)


def test_philox_here_gives_its_published_vectors():
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    counter, key = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert philox(counter, key) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("position", [0, 7, 2**33 + 1])
def test_noise_is_philox_of_seed_and_position_mixed_with_the_token(seed, position):
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 300, torch.float64)[0]
    first, second, *_ = philox([position & LOW, position >> 32, 0, 0], [seed & LOW, (seed >> 32) & LOW])
    for token in (0, 1, 2, 255, 299):
        u = (mix((mix(token ^ first) + second) & LOW) + 0.5) / 2**32
        assert noise[token].item() == pytest.approx(-math.log(-math.log1p(-u)), abs=1e-12)


def test_noise_has_the_gumbel_distribution():
    noise = gumbel_noise(torch.arange(50), torch.arange(50), 1000, torch.float64).flatten()
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 0.001


def test_float32_noise_is_float64_noise_rounded():
    arguments = (torch.arange(20), torch.arange(20), 500)
    narrow, wide = gumbel_noise(*arguments, torch.float32), gumbel_noise(*arguments, torch.float64)
    is_usual = wide.abs() < 5
    torch.testing.assert_close(narrow[is_usual].double(), wide[is_usual], rtol=1e-4, atol=1e-4)


def test_penalties_follow_their_formulas():
    source = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 9, generator=source, dtype=torch.float64)
    counts = torch.randint(0, 3, (4, 9), generator=source)
    in_prompt = torch.rand(4, 9, generator=source) < 0.3
    repetition, frequency, presence = (
        torch.tensor(values, dtype=torch.float64)
        for values in ([1.0, 1.3, 0.7, 2.0], [0.0, 0.5, -0.5, 1.0], [0.0, -1.0, 0.4, 2.0])
    )
    out = apply_penalties(logits, counts, in_prompt, repetition, frequency, presence)
    for row in range(4):
        for token in range(9):
            value, count = logits[row, token].item(), counts[row, token].item()
            if count or in_prompt[row, token]:
                value = value / repetition[row].item() if value > 0 else value * repetition[row].item()
            value -= frequency[row].item() * count + (presence[row].item() if count else 0)
            assert out[row, token].item() == pytest.approx(value, abs=1e-12)
    assert torch.equal(out[0], logits[0])


@pytest.fixture(params=["library", "torch"])
def version(request, monkeypatch):
    """Both versions of an op, where there is a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(sampling, "load_library", lambda: None)
    elif sampling.load_library() is None:
        pytest.skip("needs a compiler")
    return request.param


def make_penalties(num_requests, vocab_size, source):
    """A table whose columns lie apart, with a neutral request among the others."""
    scales = (torch.rand(num_requests, 5, generator=source) * 2 - 0.5)[:, 2:]
    scales[:, 0] += 0.6
    scales[1] = torch.tensor([1.0, 0.0, 0.0])
    counts = torch.randint(0, 4, (num_requests, vocab_size), generator=source, dtype=torch.int32)
    return PenaltyTable(scales, counts, torch.rand(num_requests, vocab_size, generator=source) < 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 31, 1000])
def test_penalties_of_a_table_count_the_output_and_the_drafts_before_a_row(version, dtype, vocab_size):
    source = torch.Generator().manual_seed(vocab_size)
    table = make_penalties(5, vocab_size, source)
    logits = torch.randn(10, vocab_size, generator=source, dtype=dtype)
    raw, counts_before = logits.clone(), table.output_counts.clone()
    rows = torch.tensor([3, 3, 3, 3, 1, 1, 4, 4, 4, 2])
    firsts = torch.tensor([0, 0, 0, 0, 4, 4, 6, 6, 6, 9])
    window = torch.randint(0, min(3, vocab_size), (10,), generator=source)
    out = penalise(logits, rows, table, window)
    counts = table.output_counts[rows]
    for row in range(10):
        for place in range(int(firsts[row]) + 1, row + 1):
            counts[row, window[place]] += 1
    scales = table.scales[rows].to(dtype).unbind(1)
    assert torch.equal(out, apply_penalties(logits, counts, table.in_prompt[rows], *scales)), "to the last bit"
    plain = apply_penalties(logits, table.output_counts[rows], table.in_prompt[rows], *scales)
    assert torch.equal(penalise(logits, rows, table), plain)
    assert torch.equal(out[4:6], raw[4:6]) and torch.equal(logits, raw)
    assert torch.equal(table.output_counts, counts_before)


def test_penalties_leave_a_forbidden_token_forbidden(version):
    table = make_penalties(3, 40, torch.Generator().manual_seed(2))
    logits = torch.full((2, 40), -torch.inf)
    logits[:, 7] = 1.0
    out = penalise(logits, torch.tensor([0, 2]), table)
    assert out.isfinite().sum(-1).tolist() == [1, 1] and out.argmax(-1).tolist() == [7, 7]


def test_many_logits_are_penalised_masked_and_scored_by_several_threads_as_by_one(monkeypatch):
    source = torch.Generator().manual_seed(3)
    table, logits = make_penalties(4, 3000, source), torch.randn(100, 3000, generator=source)
    rows, token_ids = torch.arange(100) % 4, torch.randint(0, 3000, (100,), generator=source)
    assert logits.numel() >= sampling._PARALLEL_LOGITS
    words = torch.randint(-(2**31), 2**31, (100, 94), generator=source).to(torch.int32)
    many = penalise(logits, rows, table), mask(logits, words), *compute_logprobs(logits, token_ids, 5)
    monkeypatch.setattr(sampling, "_PARALLEL_LOGITS", 2**60)
    one = penalise(logits, rows, table), mask(logits, words), *compute_logprobs(logits, token_ids, 5)
    assert all(torch.equal(first, second) for first, second in zip(many, one, strict=True))


def test_counts_grow_by_the_emitted_tokens(version):
    counts = torch.zeros(4, 6, dtype=torch.int32)
    token_ids = torch.tensor([[1, 1, 2], [3, 0, 0], [4, 3, 4]])
    count_outputs(counts, torch.tensor([3, 1, 2]), token_ids, torch.tensor([2, 0, 3]))
    columns = torch.tensor([[5, 1, 2], [4, 3, 3]]).t()  # not contiguous
    count_outputs(counts, torch.tensor([2, 3, 1]), columns, torch.tensor([2, 1, 0]))
    assert counts.tolist() == [[0] * 6, [0] * 6, [0, 0, 0, 1, 3, 1], [0, 3, 0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1000])
def test_a_mask_leaves_what_has_a_bit(version, dtype, vocab_size):
    source = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(5, vocab_size, generator=source).to(dtype)
    words = torch.randint(-(2**31), 2**31, (5, -(-vocab_size // 32)), generator=source).to(torch.int32)
    words[1], words[2] = -1, 0
    raw, out = logits.clone(), mask(logits, words)
    for row in range(5):
        bits = [words[row, token // 32].item() >> token % 32 & 1 for token in range(vocab_size)]
        expected = [value if bit else -math.inf for value, bit in zip(raw[row].tolist(), bits, strict=True)]
        assert out[row].tolist() == expected and out.dtype == dtype
    assert torch.equal(logits, raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [12, 1000])
@pytest.mark.parametrize("num_top", [0, 3, 12])
def test_logprobs_are_those_of_the_whole_softmax(version, dtype, vocab_size, num_top):
    """In a row many of whose logits are equal, too: of these the lowest ids come first."""
    source = torch.Generator().manual_seed(vocab_size)
    logits = (2 * torch.randn(4, vocab_size, generator=source, dtype=dtype)).round(decimals=1)
    logits[1] = torch.randint(0, 3, (vocab_size,), generator=source)
    logits[2, 2:] = -torch.inf
    token_ids, error = torch.tensor([4, 0, 1, 11]), 2e-6 if dtype == torch.float32 else 1e-12
    scores = compute_logprobs(logits, token_ids, num_top)
    for row in range(4):
        values = logits[row].tolist()
        total = math.log(math.fsum(math.exp(x) for x in values))
        best = sorted(range(vocab_size), key=lambda token: -values[token])[:num_top]
        assert scores.logprobs[row].item() == pytest.approx(values[token_ids[row]] - total, abs=error)
        assert scores.top_ids[row].tolist() == best
        assert scores.top_values[row].tolist() == pytest.approx([values[token] - total for token in best], abs=error)
        assert scores.ranks[row] == 1 + sum(value > values[token_ids[row]] for value in values)


def test_logprobs_of_some_rows_are_theirs_in_the_order_asked_for(version):
    logits, token_ids = torch.randn(150, 300), torch.arange(150)
    whole, some = compute_logprobs(logits, token_ids, 4), torch.tensor([149, 0, 70])
    for all_rows, asked in zip(whole, compute_logprobs(logits, token_ids, 4, some), strict=True):
        assert torch.equal(asked, all_rows[some])


def test_more_best_tokens_than_the_library_keeps_in_order_are_the_same_ones(version):
    logits = torch.randint(0, 9, (3, 500), generator=torch.Generator().manual_seed(1)).float()
    many, few = (compute_logprobs(logits, torch.arange(3), count) for count in (200, sampling._MOST_BEST))
    for more, fewer in zip(many, few, strict=True):  # who asks for many changes nobody's bits
        assert torch.equal(more[:, : sampling._MOST_BEST] if more.ndim == 2 else more, fewer)
    assert torch.equal(many.top_ids, logits.sort(dim=-1, descending=True, stable=True).indices[:, :200])


def test_a_row_with_a_nan_disturbs_no_other_one(version):
    logits = torch.randn(3, 50)
    expected = compute_logprobs(logits, torch.arange(3), 5)
    logits[1] = torch.nan
    scores = compute_logprobs(logits, torch.arange(3), 5)
    assert all(torch.equal(now[::2], then[::2]) for now, then in zip(scores, expected, strict=True))
    assert scores.logprobs[1].isnan() and ((scores.top_ids >= 0) & (scores.top_ids < 50)).all()


def test_a_rank_counts_the_likelier_tokens_and_tokens_that_tie_share_it(version):
    logits = torch.tensor([[0.5, 2.0, 2.0, -1.0]]).repeat(4, 1)
    assert compute_logprobs(logits, torch.arange(4), 0).ranks.tolist() == [3, 1, 1, 4]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_processed_logits_are_those_of_the_law_that_is_drawn_from(settings):
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    columns = {name: torch.tensor([value] * 3) for name, value in full.items()}
    columns["temperature"][2] = 0
    processed = process(logits, **columns)
    expected = law(LOGITS, **settings)
    probs = torch.tensor([expected.get(token, 0.0) for token in range(len(LOGITS))], dtype=torch.float64)
    torch.testing.assert_close(processed[:2].softmax(-1), torch.stack([probs, probs.flip(0)]), rtol=0, atol=1e-7)
    assert torch.equal(processed[2], logits[2])


@pytest.mark.parametrize("temperature", [1e-5, 1.0, 100.0])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(5, 1.0, 0.0), (0, 1e-6, 0.0), (0, 0.9, 1.0), (3, 1e-6, 1.0)])
def test_extreme_settings_draw_a_token_that_is_kept_in_float32(temperature, top_k, top_p, min_p):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) * 20
    column = torch.full((4,), 1.0)
    tokens = draw(
        logits,
        temperature=column * temperature,
        top_k=torch.full((4,), top_k),
        top_p=column * top_p,
        min_p=column * min_p,
        seeds=torch.arange(4),
        positions=torch.arange(4),
    )
    assert ((tokens >= 0) & (tokens < 50)).all()
    if top_p < 0.1 or min_p == 1.0:
        assert tokens.tolist() == logits.argmax(-1).tolist()


def test_the_only_token_that_is_kept_is_drawn_whatever_the_noise():
    """At this seed and position the token's uniform bits are the largest there are."""
    logits = torch.full((1, 16), -10.0)
    logits[0, 13] = 10.0
    one, zero = torch.ones(1), torch.zeros(1)
    where = {"seeds": torch.tensor([4]), "positions": torch.tensor([300762])}
    token = draw(logits, temperature=one, top_k=torch.tensor([1]), top_p=one, min_p=zero, **where)
    assert token.tolist() == [13]


def test_row_keys_differ() -> None:
    source = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**62), 2**62, (500,), generator=source)
    first, second = row_keys(seeds, torch.randint(0, 2**40, (500,), generator=source))
    assert first.dtype == second.dtype == torch.int32
    assert len({*zip(first.tolist(), second.tolist(), strict=True)}) == 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 255, 1000, 70_000])
@pytest.mark.parametrize("top_k", [0, 20])
def test_the_library_draws_what_the_law_does(
    dtype: torch.dtype, vocab_size: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens whose noisy logits are as good as equal are both right."""
    if sampling.load_library() is None:
        pytest.skip("needs a compiler")
    source = torch.Generator().manual_seed(vocab_size)
    rows = 50
    logits = 3 * torch.randn(rows, vocab_size, generator=source, dtype=dtype)
    logits[torch.rand(logits.shape, generator=source) < 0.3] = -torch.inf
    temperature = torch.rand(rows, generator=source) * (torch.arange(rows) % 5 > 0)
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=source)
    positions = torch.randint(0, 2**40, (rows,), generator=source)
    filters = (torch.full((rows,), top_k), torch.ones(rows), torch.zeros(rows))
    drawn = draw(logits, temperature, *filters, seeds, positions)
    monkeypatch.setattr(sampling, "load_library", lambda: None)
    expected = draw(logits, temperature, *filters, seeds, positions)
    noise = gumbel_noise(seeds, positions, vocab_size, torch.float64) * (temperature > 0)[:, None]
    noisy = logits / torch.where(temperature > 0, temperature, 1)[:, None] + noise
    both = noisy.gather(1, torch.stack([drawn, expected], 1))
    torch.testing.assert_close(both[:, 0], both[:, 1], rtol=0, atol=2e-5)
    assert (drawn == expected).sum() >= rows - 1


def test_the_first_of_equals_is_taken_in_a_batch_that_draws_too() -> None:
    logits = torch.full((3, 600), -torch.inf)
    logits[0, 599] = 0.0
    logits[1, [300, 511, 580]] = 2.0
    filters = (torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.zeros(3))
    drawn = draw(logits, torch.tensor([1.0, 0.0, 0.0]), *filters, torch.arange(3), torch.arange(3))
    assert drawn.tolist() == [599, 300, 0]
