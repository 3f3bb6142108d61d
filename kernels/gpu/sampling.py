"""Drawing tokens in Triton: the law of kernels/sampling.py, with each request's settings read from a table.

Two launches that no host knowledge of the requests shapes. `_scan_kernel` reads all logits, many programs per row: it
takes the best token of its part of a row without filters (of values with Gumbel noise, where the temperature is not 0),
else the best value of each chunk. `_finish_kernel`, one program per row, takes the best of the parts; or it finds the
row's cutoff, the least value that min_p, top_k and top_p keep, in the few chunks whose best value is above the
candidates, and draws from the chunks above the cutoff. Biases and penalties are applied to a value whenever it is
loaded, in float32: no second copy of the logits is written.

N logit rows, V vocabulary, R rows of the table, S biases, Z banned tokens. A row has CHUNKS chunks of CHUNK tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import power_of_two

_CHUNK = 256
# Chunks of a program of the first launch, in all and at once; chunks at once in the second.
_PART, _SCAN_TILE, _TILE = 32, 8, 16
_LEVELS = 3  # a pass of the search leaves one of 2^LEVELS parts of an interval
# A product and a sum stay two roundings, as in torch: both kernels and the law see the same values.
_SCAN_LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}
_FINISH_LAUNCH = {"num_warps": 16, "enable_fp_fusion": False}


class SamplingTable(NamedTuple):
    """The requests' settings, one row each; row 0 is padding. Columns [R] may be strided, the others are contiguous.

    float32 [R]: temperature (0: greedy), top_p (1: off), min_p (0: off), repetition, frequency, presence; int64 [R]:
    top_k (0: off), seed, prompt_len, min_tokens. bias_ids [R, S] int64 (-1: none) and bias_values [R, S] float32;
    banned_ids [R, Z] int64 (-1: none), which get -inf while position - prompt_len < min_tokens. output_counts [R, V]
    int32: how often the output has each token; in_prompt [R, V] bool. has_rules [R], bool or int32: the request has
    biases, penalties or min_tokens; of the others these settings are not read.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    top_k: Tensor
    seed: Tensor
    prompt_len: Tensor
    min_tokens: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    banned_ids: Tensor
    output_counts: Tensor
    in_prompt: Tensor
    has_rules: Tensor


def draw(
    logits: Tensor, table: SamplingTable, rows: Tensor, positions: Tensor, window: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    """One token per row [N] int64, and whether the row's raw maximum is finite [N] bool (False with any NaN).

    logits [N, V] bf16 or float32, rows may be strided; rows [N] int64: each one's row of the table; positions [N]
    int64: the drawn token's own. Row n is number n % width of its request: it counts the drafts before it,
    window[n - n % width + 1 .. n] int64, as output. Order of the rules: banned ids, biases, penalties; then see
    kernels.sampling.draw.
    """
    num_rows, vocab_size = logits.shape
    num_chunks = power_of_two(max(2, triton.cdiv(vocab_size, _CHUNK)))
    part = min(_PART, num_chunks)
    num_parts = num_chunks // part

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    best, raw_best = empty(num_rows, num_parts, dtype=torch.int64), empty(num_rows, num_parts, dtype=torch.int32)
    chunks = empty(num_rows, num_chunks, dtype=torch.int64)
    token_ids, is_finite = empty(num_rows, dtype=torch.int64), empty(num_rows, dtype=torch.bool)
    drafts = (rows, 1) if window is None else (window, width)
    arguments = (logits, logits.stride(0), vocab_size, rows, positions, *drafts, *_table_arguments(table))
    arguments = (*arguments, best, raw_best, chunks)
    sizes = {"CHUNK": _CHUNK, "CHUNKS": num_chunks}
    sizes |= {"BIASES": power_of_two(table.bias_ids.shape[1]), "BANNED": power_of_two(table.banned_ids.shape[1])}
    _scan_kernel[(num_rows, num_parts)](
        *arguments, PART=part, TILE=min(_SCAN_TILE, num_chunks), **sizes, **_SCAN_LAUNCH
    )
    _finish_kernel[(num_rows,)](
        *arguments, token_ids, is_finite, PARTS=num_parts, TILE=min(_TILE, num_chunks), LEVELS=_LEVELS,
        **sizes, **_FINISH_LAUNCH,
    )  # fmt: skip
    return token_ids, is_finite


def _table_arguments(table: SamplingTable) -> tuple[Tensor | int, ...]:
    """As the kernels' signatures name them: each column [R] with its stride, then what `has_rules` needs by the row."""
    settings = (table.temperature, table.top_k, table.top_p, table.min_p, table.seed, table.has_rules)
    rules = (table.repetition, table.frequency, table.presence, table.prompt_len, table.min_tokens)
    biases = (table.bias_ids, table.bias_values, table.bias_ids.shape[1])
    banned = (table.banned_ids, table.banned_ids.shape[1])
    with_strides = (argument for column in (*settings, *rules) for argument in (column, column.stride(0)))
    return (*with_strides, *biases, *banned, table.output_counts, table.in_prompt)


@triton.jit
def _scan_kernel(
    logits_ptr, logits_stride, vocab_size, rows_ptr, positions_ptr, window_ptr, width,
    temperature_ptr, temperature_stride, top_k_ptr, top_k_stride, top_p_ptr, top_p_stride, min_p_ptr, min_p_stride,
    seed_ptr, seed_stride,
    has_rules_ptr, has_rules_stride, repetition_ptr, repetition_stride, frequency_ptr, frequency_stride,
    presence_ptr, presence_stride, prompt_len_ptr, prompt_len_stride, min_tokens_ptr, min_tokens_stride,
    bias_ids_ptr, bias_values_ptr, max_biases, banned_ids_ptr, max_banned, counts_ptr, in_prompt_ptr,
    best_ptr, raw_best_ptr, chunks_ptr,
    PART: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    BIASES: tl.constexpr, BANNED: tl.constexpr,
):  # fmt: skip
    """raw_best [N, parts]: the greatest order of the raw logits. If the row has a filter, chunks [N, CHUNKS]: the order
    of the best scaled value, above the chunk's number; if not, best [N, parts]: the best `_rank`."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows_ptr + n)
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    top_k = tl.load(top_k_ptr + row * top_k_stride)
    top_p = tl.load(top_p_ptr + row * top_p_stride)
    min_p = tl.load(min_p_ptr + row * min_p_stride)
    has_filter = (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    rules = _read_rules(
        n, row, vocab_size, positions_ptr, window_ptr, width,
        has_rules_ptr, has_rules_stride, repetition_ptr, repetition_stride, frequency_ptr, frequency_stride,
        presence_ptr, presence_stride, prompt_len_ptr, prompt_len_stride, min_tokens_ptr, min_tokens_stride,
        bias_ids_ptr, bias_values_ptr, max_biases, banned_ids_ptr, max_banned, counts_ptr, in_prompt_ptr,
        BIASES, BANNED,
    )  # fmt: skip
    first, second = _make_row_key(tl.load(seed_ptr + row * seed_stride), tl.load(positions_ptr + n))
    best = tl.full([TILE, CHUNK], -0x7FFFFFFE80000001, tl.int64)
    raw_best = tl.full([TILE, CHUNK], -0x7FFFFFFF, tl.int32)
    for start in range(part * PART, part * PART + PART, TILE):
        chunk = start + tl.arange(0, TILE)
        tokens = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = tokens < vocab_size
        x = tl.load(logits_ptr + n * logits_stride + tokens, mask=mask, other=float("-inf")).to(tl.float32)
        raw_best = tl.maximum(raw_best, _to_order(x))
        x = _apply_rules(x, tokens, mask, rules)
        if temperature > 0:
            x = tl.div_rn(x, temperature)
        if has_filter:
            packed = (tl.max(_to_order(x), axis=1).to(tl.int64) << 32) | chunk
            tl.store(chunks_ptr + n * CHUNKS + chunk, packed)
        else:
            if temperature > 0:
                x += _make_noise(tokens, first, second)
            best = tl.maximum(best, _rank(x, tokens, mask))
    place = n * tl.num_programs(1) + part
    tl.store(best_ptr + place, tl.max(best))
    tl.store(raw_best_ptr + place, tl.max(raw_best))


@triton.jit
def _finish_kernel(
    logits_ptr, logits_stride, vocab_size, rows_ptr, positions_ptr, window_ptr, width,
    temperature_ptr, temperature_stride, top_k_ptr, top_k_stride, top_p_ptr, top_p_stride, min_p_ptr, min_p_stride,
    seed_ptr, seed_stride,
    has_rules_ptr, has_rules_stride, repetition_ptr, repetition_stride, frequency_ptr, frequency_stride,
    presence_ptr, presence_stride, prompt_len_ptr, prompt_len_stride, min_tokens_ptr, min_tokens_stride,
    bias_ids_ptr, bias_values_ptr, max_biases, banned_ids_ptr, max_banned, counts_ptr, in_prompt_ptr,
    best_ptr, raw_best_ptr, chunks_ptr,
    token_ids_ptr, is_finite_ptr,
    PARTS: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    BIASES: tl.constexpr, BANNED: tl.constexpr,
):  # fmt: skip
    """token_ids and is_finite [N], from what `_scan_kernel` wrote; chunks is scratch from here on."""
    n = tl.program_id(0).to(tl.int64)
    raw_best = tl.max(tl.load(raw_best_ptr + n * PARTS + tl.arange(0, PARTS)))
    tl.store(is_finite_ptr + n, (raw_best < 0x7F800000) & (raw_best > -0x7F800000))
    row = tl.load(rows_ptr + n)
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    top_k = tl.load(top_k_ptr + row * top_k_stride)
    top_p = tl.load(top_p_ptr + row * top_p_stride)
    min_p = tl.load(min_p_ptr + row * min_p_stride)
    has_filter = (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    if not has_filter:
        tl.store(token_ids_ptr + n, _token_of(tl.max(tl.load(best_ptr + n * PARTS + tl.arange(0, PARTS)))))
        return

    rules = _read_rules(
        n, row, vocab_size, positions_ptr, window_ptr, width,
        has_rules_ptr, has_rules_stride, repetition_ptr, repetition_stride, frequency_ptr, frequency_stride,
        presence_ptr, presence_stride, prompt_len_ptr, prompt_len_stride, min_tokens_ptr, min_tokens_stride,
        bias_ids_ptr, bias_values_ptr, max_biases, banned_ids_ptr, max_banned, counts_ptr, in_prompt_ptr,
        BIASES, BANNED,
    )  # fmt: skip
    chunks_ptr += n * CHUNKS
    place = tl.arange(0, CHUNKS)
    packed = tl.sort(tl.load(chunks_ptr + place), descending=True)
    chunk_orders = (packed >> 32).to(tl.int32)
    tl.debug_barrier()  # all have read what is overwritten: from here on, chunks [CHUNKS] are the numbers, best first
    tl.store(chunks_ptr + place, packed & 0x7FFFFFFF)
    tl.debug_barrier()
    best = _from_order(tl.max(chunk_orders))
    source = (logits_ptr + n * logits_stride, vocab_size, temperature, rules, chunks_ptr)
    chunk_values = (source, chunk_orders, best)

    cutoff = float("-inf")
    if min_p > 0:
        cutoff = best + tl.log(min_p)
    surplus = 0.0  # the mass of the tokens that tie with the last one of top_k, but are not among its k
    if top_k > 0:
        k = tl.minimum(top_k, vocab_size)
        # k tokens are at least as good as the k-th best chunk, so the k-th best token is no worse.
        low = _from_order(tl.max(tl.where(place >= k - 1, chunk_orders, -0x7F800000)))
        last, count = _find_last(low, k.to(tl.float32), chunk_values, False, CHUNK, TILE, LEVELS)
        if last >= cutoff:
            cutoff = last
            surplus = (count - k.to(tl.float32)) * tl.exp(last - best)
    if top_p < 1:
        total = tl.max(_sum_from(_to_order(cutoff).to(tl.int64), 0, chunk_values, True, CHUNK, TILE, 1)) - surplus
        # All tokens below this have at most half of the mass that top_p leaves out, even if they were V.
        low = tl.maximum(cutoff, best + tl.log((1 - top_p) / (2.0 * vocab_size)))
        cutoff, _mass = _find_last(low, top_p * total, chunk_values, True, CHUNK, TILE, LEVELS)

    first, second = _make_row_key(tl.load(seed_ptr + row * seed_stride), tl.load(positions_ptr + n))
    drawn = tl.full([TILE, CHUNK], -0x7FFFFFFE80000001, tl.int64)
    for start in range(0, tl.sum((chunk_orders >= _to_order(cutoff)).to(tl.int32)), TILE):
        tokens, scaled = _load_scaled(start, source, CHUNK, TILE)
        noisy = tl.where(scaled < cutoff, float("-inf"), scaled + _make_noise(tokens, first, second))
        drawn = tl.maximum(drawn, _rank(noisy, tokens, tokens < vocab_size))
    tl.store(token_ids_ptr + n, _token_of(tl.max(drawn)))


@triton.jit
def _find_last(
    low, target, chunk_values, BY_MASS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr
):  # fmt: skip
    """The greatest float32 from which on the sum is at least target, and that sum. It must be so at low."""
    parts: tl.constexpr = 2**LEVELS
    _source, chunk_orders, _best = chunk_values
    first = _to_order(low).to(tl.int64)  # a difference of two orders needs 33 bits
    step = (tl.max(chunk_orders) - first) // parts + 1
    reached = 0.0
    while step > 0:
        sums = _sum_from(first, step, chunk_values, BY_MASS, CHUNK, TILE, LEVELS)
        is_enough = sums >= target
        reached = tl.min(tl.where(is_enough, sums, float("inf")))
        first += step * tl.maximum(tl.sum(is_enough.to(tl.int32)) - 1, 0)
        step = tl.where(step > 1, (step + parts - 1) // parts, 0)
    return _from_order(first.to(tl.int32)), reached


@triton.jit
def _sum_from(
    first, step, chunk_values, BY_MASS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr
):  # fmt: skip
    """[2^LEVELS] sums over the scaled values whose order is at least first + i * step: of ones, or (BY_MASS) of their
    mass exp(scaled - best).

    A chunk always has the same place in the sum, and a tile that is left out would have added zeros: the sum does not
    depend on the other pivots, and a higher pivot never has a greater one.
    """
    source, chunk_orders, best = chunk_values
    pivots = _from_order((first + step * tl.arange(0, 2**LEVELS)).to(tl.int32))
    pivots = tl.reshape(pivots, [2] * LEVELS)
    sums = tl.zeros([2] * LEVELS, tl.float32)
    for start in range(0, tl.sum((chunk_orders >= first).to(tl.int32)), TILE):
        _tokens, scaled = _load_scaled(start, source, CHUNK, TILE)
        weights = tl.exp(scaled - best) if BY_MASS else tl.full([TILE, CHUNK], 1.0, tl.float32)
        for _ in tl.static_range(LEVELS):  # joined copies of a value stay in its thread
            scaled, weights = tl.join(scaled, scaled), tl.join(weights, weights)
        sums += tl.sum(tl.sum(tl.where(scaled >= pivots, weights, 0.0), axis=1), axis=0)
    return tl.reshape(sums, [2**LEVELS])


@triton.jit
def _load_scaled(start, source, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """The tokens of the chunks from place `start` on [TILE, CHUNK] and their values over the temperature; -inf behind
    the vocabulary."""
    logits_ptr, vocab_size, temperature, rules, chunks_ptr = source
    chunk = tl.load(chunks_ptr + start + tl.arange(0, TILE)).to(tl.int32)
    tokens = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    mask = tokens < vocab_size
    x = tl.load(logits_ptr + tokens, mask=mask, other=float("-inf")).to(tl.float32)
    return tokens, tl.div_rn(_apply_rules(x, tokens, mask, rules), temperature)


@triton.jit
def _read_rules(
    n, row, vocab_size, positions_ptr, window_ptr, width,
    has_rules_ptr, has_rules_stride, repetition_ptr, repetition_stride, frequency_ptr, frequency_stride,
    presence_ptr, presence_stride, prompt_len_ptr, prompt_len_stride, min_tokens_ptr, min_tokens_stride,
    bias_ids_ptr, bias_values_ptr, max_biases, banned_ids_ptr, max_banned, counts_ptr, in_prompt_ptr,
    BIASES: tl.constexpr, BANNED: tl.constexpr,
):  # fmt: skip
    """What `_apply_rules` wants to know of row n."""
    has_rules = tl.load(has_rules_ptr + row * has_rules_stride) != 0
    bias_ids_ptr += row * max_biases
    banned_ids_ptr += row * max_banned
    num_biases, num_banned = 0, 0
    if has_rules:
        num_biases = _find_end(bias_ids_ptr, max_biases, BIASES)
        output_len = tl.load(positions_ptr + n) - tl.load(prompt_len_ptr + row * prompt_len_stride)
        if output_len < tl.load(min_tokens_ptr + row * min_tokens_stride):
            num_banned = _find_end(banned_ids_ptr, max_banned, BANNED)
    return (
        has_rules,
        tl.load(repetition_ptr + row * repetition_stride),
        tl.load(frequency_ptr + row * frequency_stride),
        tl.load(presence_ptr + row * presence_stride),
        (bias_ids_ptr, bias_values_ptr + row * max_biases, num_biases),
        (banned_ids_ptr, num_banned),
        (window_ptr + n - n % width + 1, (n % width).to(tl.int32)),
        (counts_ptr + row * vocab_size, in_prompt_ptr + row * vocab_size),
    )


@triton.jit
def _find_end(ids_ptr, size, BLOCK: tl.constexpr):
    """Where the last id ends that is not -1."""
    place = tl.arange(0, BLOCK)
    return tl.max(tl.where(tl.load(ids_ptr + place, mask=place < size, other=-1) >= 0, place + 1, 0))


@triton.jit
def _apply_rules(x, tokens, mask, rules):
    """Float32 values x of the tokens after banned ids, biases and penalties, if the row has any."""
    has_rules, repetition, frequency, presence, biases, banned, drafts, seen = rules
    if has_rules:
        bias_ids_ptr, bias_values_ptr, num_biases = biases
        banned_ids_ptr, num_banned = banned
        drafts_ptr, num_drafts = drafts
        counts_ptr, in_prompt_ptr = seen
        for i in range(num_banned):
            x = tl.where(tokens == tl.load(banned_ids_ptr + i).to(tl.int32), float("-inf"), x)
        for i in range(num_biases):
            x += tl.where(tokens == tl.load(bias_ids_ptr + i).to(tl.int32), tl.load(bias_values_ptr + i), 0.0)
        counts = tl.load(counts_ptr + tokens, mask=mask, other=0)
        for i in range(num_drafts):
            counts += (tokens == tl.load(drafts_ptr + i).to(tl.int32)).to(tl.int32)
        is_output = counts > 0
        is_seen = is_output | (tl.load(in_prompt_ptr + tokens, mask=mask, other=0) != 0)
        scale = tl.where(is_seen, repetition, 1.0)
        x = tl.where(x > 0, tl.div_rn(x, scale), x * scale)
        x = x - frequency * counts.to(tl.float32) - presence * is_output.to(tl.float32)
    return x


@triton.jit
def _to_order(x):
    """int32 that compare as float32 do: -0 is 0, and NaN is above all."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    return tl.where(x == x, tl.where(bits < 0, -magnitude, magnitude), 0x7FFFFFFF)


@triton.jit
def _from_order(order):
    value = tl.abs(order).to(tl.float32, bitcast=True)
    return tl.where(order < 0, -value, value)


@triton.jit
def _rank(x, tokens, mask):
    """int64 whose greatest is that of the best value, of equal ones the lowest token; masked ones are below all."""
    ranked = (_to_order(x).to(tl.int64) << 32) | (0x7FFFFFFF - tokens)
    return tl.where(mask, ranked, -0x7FFFFFFE80000001)  # token 0, if there is no other


@triton.jit
def _token_of(rank):
    return 0x7FFFFFFF - (rank & 0x7FFFFFFF)


@triton.jit
def _make_row_key(seed, position):
    """Philox4x32-10, as kernels.sampling.row_keys: two uint32 words."""
    words_0, words_1, words_2, words_3 = position & 0xFFFFFFFF, (position >> 32) & 0xFFFFFFFF, seed & 0, seed & 0
    key_0, key_1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in tl.static_range(10):
        product_0, product_1 = words_0 * 0xD2511F53, words_2 * 0xCD9E8D57
        words_0 = ((product_1 >> 32) & 0xFFFFFFFF) ^ words_1 ^ key_0
        words_1 = product_1 & 0xFFFFFFFF
        words_2 = ((product_0 >> 32) & 0xFFFFFFFF) ^ words_3 ^ key_1
        words_3 = product_0 & 0xFFFFFFFF
        key_0, key_1 = (key_0 + 0x9E3779B9) & 0xFFFFFFFF, (key_1 + 0xBB67AE85) & 0xFFFFFFFF
    return words_0.to(tl.uint32), words_1.to(tl.uint32)


@triton.jit
def _make_noise(tokens, first, second):
    """Standard Gumbel noise, as kernels.sampling.gumbel_noise: -log(-log1p(-u))."""
    bits = _mix(_mix(tokens.to(tl.uint32) ^ first) + second)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * (2.0**-32), 1 - 2.0**-24)
    # log1p(-u) of a small u: log(rest) * u / (1 - rest), in which the rounding of rest = 1 - u cancels.
    rest = 1 - u
    is_lost = rest == 1
    return -tl.log(tl.where(is_lost, u, -tl.log(rest) * (u / tl.where(is_lost, 1.0, 1 - rest))))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
