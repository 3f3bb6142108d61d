"""Drawing tokens: penalties, filters, and a counter-based Gumbel draw that no batch or draft can influence.

N rows, V vocabulary. The random number of a token depends on (request seed, absolute position, token id) alone:
Philox4x32-10 (Salmon et al., SC 2011) turns seed and position into a row key, two rounds of a 32-bit
multiply-xorshift mixer turn key and token id into uniform bits, and argmax(logits / T + Gumbel) is a draw from
softmax(logits / T). Logits are float32 or wider.
"""

import ctypes

import torch
from torch import Tensor

from kernels.cpu.library import load_library

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF
_PARALLEL_NUMBERS = 2**16


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
    is_filtered = bool((((top_k > 0) | (top_p < 1) | (min_p > 0)) & (temperature > 0)).any())
    if library is not None and not is_filtered:
        return _draw_cpp(library, logits, temperature, seeds, positions)
    token_ids = logits.argmax(-1)
    scaled = logits[sampled] / temperature[sampled, None].to(logits.dtype)
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


def compute_ranks(logits: Tensor, token_ids: Tensor) -> Tensor:
    """[N]: one more than the number of tokens that have a larger logit in their row of logits [N, V] than token_ids
    [N]."""
    return 1 + (logits > logits.gather(1, token_ids[:, None])).sum(-1)


def compute_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of logits [N, V]: of token_ids [N], and the num_top best ids and values [N, num_top]."""
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(num_top, dim=-1)
    return logprobs.gather(1, token_ids[:, None])[:, 0], top.indices, top.values


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
    probs = best.masked_fill(~keep, -torch.inf).softmax(-1)
    keep &= (probs.cumsum(-1) - probs < top_p[:, None]) | (top_p >= 1)[:, None]
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
