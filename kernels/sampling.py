"""Drawing tokens: penalties, filters, and a counter-based Gumbel draw that no batch or draft can influence.

N rows, V vocabulary. The random number of a token depends on (request seed, absolute position, token id) alone:
Philox4x32-10 (Salmon et al., SC 2011) turns seed and position into a row key, two rounds of a 32-bit
multiply-xorshift mixer turn key and token id into uniform bits, and argmax(logits / T + Gumbel) is a draw from
softmax(logits / T). Logits are float32 or wider.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cpu.library import load_library

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF
_PARALLEL_NUMBERS = 2**16
# Threads wake up later than one alone is through with fewer logits, where there is no noise to make.
_PARALLEL_LOGITS = 2**18
# The library keeps so many best tokens in order while it reads a row.
_MOST_BEST = 64
# torch's version takes five times the memory of the logits; so many rows at a time.
_MOST_ROWS = 64


class PenaltyTable(NamedTuple):
    """What penalties need to know of R requests: scales [R, 3] float32, rows of repetition, frequency and presence
    penalty (may be strided); output_counts [R, V] int32: how often the output so far has each token; in_prompt [R, V]
    bool."""

    scales: Tensor
    output_counts: Tensor
    in_prompt: Tensor


class Logprobs(NamedTuple):
    """Of N tokens: log-probabilities [N], of each row the best ids and values [N, num_top] (the best first, of equal
    ones the lowest id), and ranks [N]: one more than the number of tokens that are likelier."""

    logprobs: Tensor
    top_ids: Tensor
    top_values: Tensor
    ranks: Tensor


def mask(logits: Tensor, packed: Tensor) -> Tensor:
    """A copy of logits [N, V], -inf where packed [N, ceil(V / 32)] int32 has no bit: token t's is bit t % 32 of word
    t // 32."""
    is_served = logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64)
    library = load_library() if is_served else None
    if library is not None:
        return _mask_cpp(library, logits, packed)
    bits = packed[:, :, None] >> torch.arange(32, dtype=torch.int32, device=packed.device) & 1
    return logits.masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def penalise(logits: Tensor, rows: Tensor, table: PenaltyTable, window: Tensor | None = None) -> Tensor:
    """`apply_penalties` with what the table's rows [N] int64 say, those of a request side by side: a copy of logits [N,
    V].

    window [N] int64: the tokens that the logits' rows were run on, of each request a known one, then drafts. Those up
    to a row's own count as output, too.
    """
    library = load_library() if logits.device.type == "cpu" else None
    if library is not None:
        return _penalise_cpp(library, logits, rows, table, window)
    counts = table.output_counts[rows]
    if window is not None:
        is_draft = torch.zeros_like(rows, dtype=torch.bool)
        is_draft[1:] = rows[1:] == rows[:-1]
        is_counted = (is_draft & (rows == rows[:, None])).tril()  # [row, place in window]
        counts.scatter_add_(1, window.expand(len(rows), -1), is_counted.to(counts.dtype))
    scales = table.scales[rows].to(logits.dtype)
    return apply_penalties(logits, counts, table.in_prompt[rows], *scales.unbind(1))


def apply_penalties(
    logits: Tensor, counts: Tensor, in_prompt: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """Repetition, then frequency and presence penalty: [N, V].

    logits [N, V]; counts [N, V] int: how often the output so far has each token; in_prompt [N, V] bool; the penalties
    [N]. Repetition (CTRL, arXiv 1909.05858) divides positive and multiplies negative logits of every token seen in
    prompt or output; frequency subtracts per occurrence, presence once, in the output only.
    """
    seen = (counts > 0) | in_prompt
    scale = torch.where(seen, repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / scale, logits * scale)
    return logits - frequency[:, None] * counts - presence[:, None] * (counts > 0)


def count_outputs(output_counts: Tensor, rows: Tensor, token_ids: Tensor, accept_lens: Tensor) -> None:
    """Add to output_counts [R, V] int32, in `rows` [B], the first accept_lens [B] of token_ids [B, T]. All others are
    int64."""
    library = load_library() if output_counts.device.type == "cpu" else None
    if library is not None:
        inputs = [tensor.contiguous() for tensor in (rows, token_ids, accept_lens)]
        addresses = [tensor.data_ptr() for tensor in inputs]
        sizes = (len(rows), token_ids.shape[1], output_counts.shape[1])
        library.count_outputs_int32(output_counts.data_ptr(), *addresses, *sizes)
        return
    is_emitted = torch.arange(token_ids.shape[1], device=token_ids.device) < accept_lens[:, None]
    flat = rows[:, None] * output_counts.shape[1] + token_ids
    output_counts.view(-1).scatter_add_(0, flat.flatten(), is_emitted.flatten().int())


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """One token per row [N] int64: argmax where temperature is 0, else a draw after min_p, top_k and top_p.

    logits [N, V]; temperature [N] float, 0 or at least 1e-5; top_p, min_p [N] float; top_k [N] int64, 0 is off; seeds,
    positions [N] int64, where the position is the drawn token's own. A filter keeps tokens that tie with the last one
    it keeps.
    """
    sampled = temperature.nonzero().squeeze(1)
    if len(sampled) == 0:
        return logits.argmax(-1)
    library = load_library() if logits.device.type == "cpu" else None
    is_filtered = _has_filter(temperature, top_k, top_p, min_p)
    if library is not None and not is_filtered:
        return _draw_cpp(library, logits, temperature, seeds, positions)
    token_ids = logits.argmax(-1)
    scaled = _scale(logits[sampled], temperature[sampled])
    if is_filtered:
        scaled = _filter(scaled, top_k[sampled], top_p[sampled], min_p[sampled])
    if library is not None:
        token_ids[sampled] = _draw_cpp(library, scaled, torch.ones(len(sampled)), seeds[sampled], positions[sampled])
        return token_ids
    noise = gumbel_noise(seeds[sampled], positions[sampled], logits.shape[1], logits.dtype)
    token_ids[sampled] = (scaled + noise).argmax(-1)
    return token_ids


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise [N, V] in `dtype`, a pure function of seeds and positions [N] int64 and the token id."""
    first, second = row_keys(seeds, positions)
    ids = torch.arange(vocab_size, device=seeds.device, dtype=torch.int32)
    bits = _mix(_mix(ids ^ first[:, None]) + second[:, None])
    # u is small where the noise is large, so its relative precision carries the tail.
    u = ((bits.long() & _LOW_32).to(dtype) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))


def process(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The logits [N, V] whose softmax `draw` draws from, -inf for what its filters leave out; where the temperature is
    0 they are as given."""
    is_sampled = temperature > 0
    scaled = _scale(logits, torch.where(is_sampled, temperature, 1.0))
    if _has_filter(temperature, top_k, top_p, min_p):
        scaled = _filter(scaled, top_k, top_p, min_p)
    return torch.where(is_sampled[:, None], scaled, logits)


def compute_logprobs(logits: Tensor, token_ids: Tensor, num_top: int, places: Tensor | None = None) -> Logprobs:
    """Log-softmax of logits [M, V] for token_ids [M] int64, in rows `places` [N] int64 (all, if None)."""
    library = load_library() if logits.device.type == "cpu" else None
    if library is not None and num_top <= _MOST_BEST:
        return _compute_logprobs_cpp(library, logits, token_ids, num_top, places)
    if places is not None:
        logits, token_ids = logits[places], token_ids[places]
    if library is not None:
        return _compute_many_logprobs_cpp(library, logits, token_ids, num_top)
    pieces = zip(logits.split(_MOST_ROWS), token_ids.split(_MOST_ROWS), strict=True)
    parts = [_compute_logprobs(*piece, num_top) for piece in pieces]
    return parts[0] if len(parts) == 1 else Logprobs(*map(torch.cat, zip(*parts, strict=True)))


def _compute_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    """The law of `compute_logprobs`."""
    logprobs = logits.log_softmax(-1)
    chosen = token_ids[:, None]
    ranks = 1 + (logits > logits.gather(1, chosen)).sum(-1)
    top_ids = _best(logits, num_top)
    return Logprobs(logprobs.gather(1, chosen)[:, 0], top_ids, logprobs.gather(1, top_ids), ranks)


def _best(logits: Tensor, count: int) -> Tensor:
    """Ids [N, count] of the largest of logits [N, V], in order; `topk` takes any of equal ones."""
    if count == 0:
        return logits.new_zeros(len(logits), 0, dtype=torch.int64)
    least = logits.topk(count, dim=-1).values[:, -1:]
    is_above, is_least = logits > least, logits == least
    kept = is_above | (is_least & (is_least.cumsum(-1) <= count - is_above.sum(-1, keepdim=True)))
    # A row with a NaN may keep none: its ids mean nothing, but there are such.
    ids = torch.arange(logits.shape[1], device=logits.device).where(kept, logits.shape[1] - 1)
    ids = ids.topk(count, dim=-1, largest=False).values.sort(dim=-1).values
    order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)


def _has_filter(temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> bool:
    """Whether some row that draws has a filter."""
    return bool((((top_k > 0) | (top_p < 1) | (min_p > 0)) & (temperature > 0)).any())


def _scale(logits: Tensor, temperature: Tensor) -> Tensor:
    return logits / temperature[:, None].to(logits.dtype)


def _filter(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """-inf outside the kept set. min_p is relative to the best token, top_p is over what min_p and top_k left."""
    has_top_k = (top_k > 0).tolist()
    needs = (top_k > 0) | (top_p < 1) | (min_p > 0)
    vocab_size = scaled.shape[1]
    width = min(int(top_k.max()), vocab_size) if all(has_top_k) else vocab_size
    best = scaled.topk(width, dim=-1).values
    rank = torch.arange(width, device=scaled.device)
    keep = rank < torch.where(top_k > 0, top_k, vocab_size)[:, None]
    keep &= best >= best[:, :1] + min_p[:, None].to(scaled.dtype).log()
    # Sums in the order of rank: how many columns the company's top_k brings changes no bit.
    probs = (best - best[:, :1]).exp().masked_fill(~keep, 0)
    total = probs.cumsum(-1)
    keep &= (total - probs < top_p[:, None].to(probs.dtype) * total[:, -1:]) | (top_p >= 1)[:, None]
    keep[:, 0] = True
    cutoff = best.gather(1, keep.sum(-1, keepdim=True) - 1)
    return scaled.masked_fill(scaled < torch.where(needs[:, None], cutoff, -torch.inf), -torch.inf)


def row_keys(seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The law of a row's key, two int32 words: Philox4x32-10 with the position as counter and the seed as key."""
    words = [positions & _LOW_32, (positions >> 32) & _LOW_32, torch.zeros_like(positions), torch.zeros_like(positions)]
    key = [seeds & _LOW_32, (seeds >> 32) & _LOW_32]
    for _ in range(10):
        low = [(words[2 * i] * _PHILOX_MULTIPLIERS[i]) for i in range(2)]
        high = [(product >> 32) & _LOW_32 for product in low]
        words = [high[1] ^ words[1] ^ key[0], low[1] & _LOW_32, high[0] ^ words[3] ^ key[1], low[0] & _LOW_32]
        key = [(key[i] + _PHILOX_WEYL[i]) & _LOW_32 for i in range(2)]
    return _to_int32(words[0]), _to_int32(words[1])


def _draw_cpp(library: ctypes.CDLL, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """`draw` without filters; the noise is the law's but for its last bits."""
    rows, vocab_size = logits.shape
    inputs = [logits, temperature.to(logits.dtype), seeds, positions]
    inputs = [tensor.contiguous() for tensor in inputs]
    token_ids = torch.empty(rows, dtype=torch.int64)
    num_threads = torch.get_num_threads() if logits.numel() >= _PARALLEL_NUMBERS else 1
    function = library.draw_float32 if logits.dtype == torch.float32 else library.draw_float64
    addresses = [tensor.data_ptr() for tensor in (*inputs, token_ids)]
    function(*addresses, rows, vocab_size, num_threads)
    return token_ids


def _mask_cpp(library: ctypes.CDLL, logits: Tensor, packed: Tensor) -> Tensor:
    logits, packed = logits.contiguous(), packed.contiguous()
    out = torch.empty_like(logits)
    function = library.mask_float32 if logits.dtype == torch.float32 else library.mask_float64
    num_threads = _count_threads(logits.numel())
    function(logits.data_ptr(), out.data_ptr(), packed.data_ptr(), *logits.shape, num_threads)
    return out


def _penalise_cpp(
    library: ctypes.CDLL, logits: Tensor, rows: Tensor, table: PenaltyTable, window: Tensor | None
) -> Tensor:
    num_rows, vocab_size = logits.shape
    logits, rows = logits.contiguous(), rows.contiguous()
    window = None if window is None else window.contiguous()
    out = torch.empty_like(logits)
    function = library.penalise_float32 if logits.dtype == torch.float32 else library.penalise_float64
    function(
        *(logits.data_ptr(), out.data_ptr(), rows.data_ptr(), table.scales.data_ptr(), table.scales.stride(0)),
        *(table.output_counts.data_ptr(), table.in_prompt.data_ptr(), None if window is None else window.data_ptr()),
        *(num_rows, vocab_size, _count_threads(num_rows * vocab_size)),
    )
    return out


def _compute_logprobs_cpp(
    library: ctypes.CDLL, logits: Tensor, token_ids: Tensor, num_top: int, places: Tensor | None
) -> Logprobs:
    """`compute_logprobs`, but for the last bits of the sum."""
    vocab_size = logits.shape[1]
    num_rows = len(logits) if places is None else len(places)
    logits, token_ids = logits.contiguous(), token_ids.contiguous()
    out = Logprobs(
        logits.new_empty(num_rows),
        token_ids.new_empty(num_rows, num_top),
        logits.new_empty(num_rows, num_top),
        token_ids.new_empty(num_rows),
    )
    function = library.logprobs_float32 if logits.dtype == torch.float32 else library.logprobs_float64
    function(
        *(logits.data_ptr(), None if places is None else places.data_ptr(), token_ids.data_ptr()),
        *(tensor.data_ptr() for tensor in out),
        *(num_rows, vocab_size, num_top, _count_threads(num_rows * vocab_size)),
    )
    return out


def _compute_many_logprobs_cpp(library: ctypes.CDLL, logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    """The bits that fewer best ones have: the likeliest token's log-probability is the sum of all, negated."""
    chosen = _compute_logprobs_cpp(library, logits, token_ids, 0, None)
    highest, best_ids = logits.max(-1)
    minus_total = _compute_logprobs_cpp(library, logits, best_ids, 0, None).logprobs
    top_ids = _best(logits, num_top)
    values = logits.gather(1, top_ids) - highest[:, None] + minus_total[:, None]
    return chosen._replace(top_ids=top_ids, top_values=values)


def _count_threads(num_logits: int) -> int:
    return torch.get_num_threads() if num_logits >= _PARALLEL_LOGITS else 1


def _to_int32(word: Tensor) -> Tensor:
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """A bijective 32-bit mixer: xorshift-multiply rounds with constants found by C. Wellons' hash-prospector search."""
    x = x ^ _shift_right(x, 16)
    x = x * 0x7FEB352D
    x = x ^ _shift_right(x, 15)
    x = x * (0x846CA68B - 2**32)
    return x ^ _shift_right(x, 16)


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Logical shift of int32."""
    return (x >> count) & ((1 << (32 - count)) - 1)
