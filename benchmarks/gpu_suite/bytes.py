"""Bytes that each launcher of a decode step loads from and stores to memory, counted from its kernels' pointers.

What a launch loads several times counts once, what it loads and stores counts twice, atomics not at all. `element` is
the size of an activation (2 or 4); states, rings and norm weights are float32, indices int64. B requests, T tokens of
each, N = B · T tokens, V vocabulary. Tests compare each function with what interpreted kernels touch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.gpu_suite.dimensions import Dimensions
from benchmarks.gpu_suite.roofline import Workload, expected_experts
from kernels.gpu.attention import SPLIT
from kernels.gpu.launch import power_of_two

_WIDE, _INDEX = 4, 8
_FAN = 16  # partial results that a node of verify_attention's tree joins
_CHUNK, _PART = 256, 32  # tokens of a chunk, and chunks of a program, of draw


@dataclass(frozen=True)
class Moved:
    """Bytes of one launcher, and its multiplications and additions where a tensor core could do them."""

    num_bytes: float
    num_flops: float = 0.0

    def __add__(self, other: "Moved") -> "Moved":
        return Moved(self.num_bytes + other.num_bytes, self.num_flops + other.num_flops)


def linear(num_rows: int, size_in: int, size_out: int, element: int) -> Moved:
    """x [N, in], weight [out, in] -> [N, out]."""
    values = num_rows * size_in + size_in * size_out + num_rows * size_out
    return Moved(element * values, 2.0 * num_rows * size_in * size_out)


def embed(num_rows: int, size: int, element: int) -> Moved:
    """Rows of a table by index."""
    return Moved(num_rows * (2 * size * element + _INDEX))


def rms_norm(num_rows: int, size: int, element: int) -> Moved:
    """x -> out, with a scale."""
    return Moved(2 * num_rows * size * element + size * _WIDE)


def add_rms_norm(num_rows: int, size: int, element: int) -> Moved:
    """x, delta -> out, x + delta, with a scale."""
    return Moved(4 * num_rows * size * element + size * _WIDE)


def gated_rms_norm(num_rows: int, num_heads: int, size: int, element: int) -> Moved:
    """x (float32), gate -> out, with a weight [size]."""
    return Moved(num_rows * num_heads * size * (_WIDE + 2 * element) + size * _WIDE)


def silu_and_mul(num_rows: int, size: int, element: int) -> Moved:
    """gate | up [N, 2 · size] -> [N, size]."""
    return Moved(3 * num_rows * size * element)


def norm_rope_store(num_rows: int, sizes: Dimensions, element: int) -> Moved:
    """q, k, v (no gate) of the projection, two scales, angles and slots -> q, k and v."""
    values = 2 * num_rows * (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim * element
    angles = num_rows * sizes.rotary_dim * _WIDE  # cos and sin, half as many each
    return Moved(values + angles + 2 * sizes.head_dim * _WIDE + num_rows * _INDEX)


def causal_conv1d_verify(batch: int, num_tokens: int, sizes: Dimensions, element: int) -> Moved:
    """Inputs, taps and the ring's history -> outputs and the ring, both float32."""
    per_channel = num_tokens * (element + 2 * _WIDE) + (sizes.taps - 1) * _WIDE
    return Moved(batch * (sizes.channels * per_channel + 2 * _INDEX) + sizes.channels * sizes.taps * _WIDE)


def causal_conv1d_prefill(batch: int, num_tokens: int, sizes: Dimensions, element: int, ring_len: int) -> Moved:
    """num_tokens in all, about evenly many per request; the record is a second launch."""
    per_request = (min(ring_len, num_tokens // batch) * (element + _WIDE) + (sizes.taps - 1) * _WIDE) * sizes.channels
    everywhere = num_tokens * sizes.channels * (element + _WIDE) + sizes.channels * sizes.taps * _WIDE
    return Moved(everywhere + batch * (per_request + 6 * _INDEX))


def gated_delta_rule_verify(
    batch: int, num_tokens: int, sizes: Dimensions, element: int, num_folded: float, num_written: float
) -> Moved:
    """num_folded: accepted tokens of all requests; num_written: requests with any, whose states are stored."""
    state = sizes.value_heads * sizes.key_dim * sizes.value_dim * _WIDE
    inputs = batch * num_tokens * (sizes.channels * _WIDE + 2 * sizes.value_heads * element)
    outputs = batch * num_tokens * sizes.value_size * _WIDE
    ring = (batch * num_tokens + num_folded) * _ring_token(sizes)
    others = 2 * sizes.value_heads * _WIDE + 3 * batch * _INDEX
    flops = 2.0 * state / _WIDE * (num_folded + 3 * batch * num_tokens)
    return Moved((batch + num_written) * state + inputs + outputs + ring + others, flops)


def gated_delta_rule_prefill(batch: int, num_tokens: int, sizes: Dimensions, element: int) -> Moved:
    """num_tokens in all, nothing to fold: what any way to do it must move. Three products with the state per token, and
    three inside a chunk of 16."""
    state = sizes.value_heads * sizes.key_dim * sizes.value_dim * _WIDE
    inputs = num_tokens * (sizes.channels * _WIDE + 2 * sizes.value_heads * element)
    outputs = num_tokens * sizes.value_size * _WIDE
    products = sizes.value_heads * 16 * (2 * sizes.key_dim + sizes.value_dim)
    flops = 2.0 * num_tokens * (3 * state / _WIDE + products)
    others = 2 * sizes.value_heads * _WIDE + (4 * batch + 1) * _INDEX
    return Moved(2 * batch * state + inputs + outputs + others, flops)


def verify_attention(
    batch: int, num_tokens: int, sizes: Dimensions, element: int, context: int, page_size: int
) -> Moved:
    """Keys and values of context + T positions; what splits leave for each other is stored and loaded."""
    end, dim = context + num_tokens, sizes.head_dim
    keys = 2 * end * sizes.kv_heads * dim * element
    rows = 3 * num_tokens * sizes.heads * dim * element  # q, gate, out
    places = -(-end // page_size) * _INDEX + _INDEX
    num_nodes, num_counters = _count_partials(-(-end // SPLIT))
    partials = num_nodes * 2 * num_tokens * sizes.heads * (dim + 2) * _WIDE
    counters = sizes.kv_heads * num_counters * 4
    flops = 4.0 * num_tokens * sizes.heads * end * dim
    return Moved(batch * (keys + rows + places + partials + counters), batch * flops)


def prefill_attention(lens: list[int], sizes: Dimensions, element: int, page_size: int) -> Moved:
    """Whole prompts of these lengths: keys once, and only what each token sees multiplied."""
    dim, num_tokens = sizes.head_dim, sum(lens)
    values = num_tokens * dim * element * (3 * sizes.heads + 2 * sizes.kv_heads)
    pages = sum(-(-length // page_size) for length in lens)
    seen = sum(length * (length + 1) / 2 for length in lens)
    return Moved(values + (pages + 2 * len(lens) + 1) * _INDEX, 4.0 * seen * sizes.heads * dim)


def route(num_rows: int, sizes: Dimensions, element: int) -> Moved:
    """Logits of all experts -> weights and ids of those chosen."""
    return Moved(num_rows * (sizes.experts * element + sizes.chosen * (_WIDE + _INDEX)))


def run_experts(num_rows: int, sizes: Dimensions, element: int, num_experts: float) -> Moved:
    """Sort, two products over the weights of num_experts different experts, and the weighted sum with the shared
    expert's output."""
    pairs, hidden, size = num_rows * sizes.chosen, sizes.hidden, sizes.expert_size
    offsets = (sizes.experts + 1) * _INDEX
    sort = 2 * pairs * _INDEX + offsets
    weights = 3 * num_experts * hidden * size * element
    gate_up = pairs * _INDEX + offsets + num_rows * hidden * element + pairs * size * element
    down = pairs * _INDEX + offsets + pairs * (size + hidden) * element
    combine = pairs * (hidden * element + _WIDE) + num_rows * (2 * hidden + 1) * element
    return Moved(sort + weights + gate_up + down + combine, 6.0 * pairs * hidden * size)


def draw(num_rows: int, num_requests: int, vocab: int, element: int) -> Moved:
    """Rows without filters and rules: all logits once, and the best of each part."""
    chunks = power_of_two(max(2, -(-vocab // _CHUNK)))
    parts = chunks // min(_PART, chunks)
    settings = num_requests * (6 * 4 + 2 * _INDEX + 1)  # six float32, top_k and seed, has_rules
    again = num_requests * (3 * 4 + _INDEX)
    row = vocab * element + 2 * _INDEX + 2 * parts * (_INDEX + 4)
    return Moved(num_rows * (row + 2 * _INDEX + 1) + settings + again)


def accept_and_commit(batch: int, num_tokens: int, num_stops: int) -> Moved:
    """Tokens, drafts and the row's lengths and stop ids -> match and accept lengths, and the row."""
    loaded = num_tokens + (num_tokens - 1) + num_stops + 4
    return Moved(batch * ((loaded + 5) * _INDEX + 1))


def step_moves(sizes: Dimensions, work: Workload, page_size: int = 16, num_stops: int = 16) -> dict[str, Moved]:
    """All of a decode step in bfloat16, by the launcher's name; draft passes together as those of the target."""
    totals: dict[str, Moved] = {}
    for name, moved in _step(sizes, work, page_size, num_stops):
        totals[name] = totals.get(name, Moved(0)) + moved
    return totals


def step_bytes(sizes: Dimensions, work: Workload) -> float:
    """All bytes of a decode step."""
    return sum(moved.num_bytes for moved in step_moves(sizes, work).values())


def _step(sizes: Dimensions, work: Workload, page_size: int, num_stops: int) -> Iterator[tuple[str, Moved]]:
    batch, rows = work.batch, work.batch * work.rows
    yield "embed", embed(rows, sizes.hidden, 2)
    for _ in range(sizes.num_delta_layers):
        yield from _delta_mixer(sizes, work)
        yield from _feed_forward(sizes, rows)
    for _ in range(sizes.num_full_layers):
        yield from _attention_mixer(sizes, batch, work.rows, work.context, page_size)
        yield from _feed_forward(sizes, rows)
    yield "add_rms_norm", add_rms_norm(rows, sizes.hidden, 2)
    yield "linear", linear(rows, sizes.hidden, sizes.vocab, 2)
    yield "draw", draw(rows, batch, sizes.vocab, 2)
    yield "accept_and_commit", accept_and_commit(batch, work.rows, num_stops)
    for step in range(work.mtp_step):
        yield from _draft_pass(sizes, work, work.rows if step == 0 else 1, page_size)


def _draft_pass(sizes: Dimensions, work: Workload, num_tokens: int, page_size: int) -> Iterator[tuple[str, Moved]]:
    batch, rows, hidden = work.batch, work.batch * num_tokens, sizes.hidden
    yield "embed", embed(rows, hidden, 2)
    yield "rms_norm", rms_norm(rows, hidden, 2) + rms_norm(rows, hidden, 2)
    yield "cat", Moved(4 * rows * hidden * 2)
    yield "linear", linear(rows, 2 * hidden, hidden, 2)
    if num_tokens > 1:  # of all but the newest rows only keys and values are wanted
        yield "rms_norm", rms_norm(rows, hidden, 2)
        yield "linear", linear(rows, hidden, 2 * sizes.kv_heads * sizes.head_dim, 2)
        yield "norm_rope_store", norm_rope_store(rows, replace(sizes, heads=0), 2)
    yield from _attention_mixer(sizes, batch, 1, work.context, page_size)
    yield from _feed_forward(sizes, batch)
    yield "add_rms_norm", add_rms_norm(batch, hidden, 2)
    yield "linear", linear(batch, hidden, work.draft_vocab or sizes.vocab, 2)
    yield "draw", draw(batch, batch, sizes.vocab, 2)


def _delta_mixer(sizes: Dimensions, work: Workload) -> Iterator[tuple[str, Moved]]:
    batch, rows = work.batch, work.batch * work.rows
    yield "add_rms_norm", add_rms_norm(rows, sizes.hidden, 2)
    yield "linear", linear(rows, sizes.hidden, sizes.delta_projection, 2)
    yield "causal_conv1d_verify", causal_conv1d_verify(batch, work.rows, sizes, 2)
    folded = batch * work.tokens_per_step
    yield "gated_delta_rule_verify", gated_delta_rule_verify(batch, work.rows, sizes, 2, folded, batch)
    yield "gated_rms_norm", gated_rms_norm(rows, sizes.value_heads, sizes.value_dim, 2)
    yield "linear", linear(rows, sizes.value_size, sizes.hidden, 2)


def _attention_mixer(
    sizes: Dimensions, batch: int, num_tokens: int, context: int, page_size: int
) -> Iterator[tuple[str, Moved]]:
    rows = batch * num_tokens
    yield "add_rms_norm", add_rms_norm(rows, sizes.hidden, 2)
    yield "linear", linear(rows, sizes.hidden, sizes.attention_projection, 2)
    yield "norm_rope_store", norm_rope_store(rows, sizes, 2)
    yield "verify_attention", verify_attention(batch, num_tokens, sizes, 2, context, page_size)
    yield "linear", linear(rows, sizes.heads * sizes.head_dim, sizes.hidden, 2)


def _feed_forward(sizes: Dimensions, rows: int) -> Iterator[tuple[str, Moved]]:
    size = sizes.shared_size or sizes.intermediate
    yield "add_rms_norm", add_rms_norm(rows, sizes.hidden, 2)
    yield "linear", linear(rows, sizes.hidden, 2 * size, 2) + linear(rows, size, sizes.hidden, 2)
    yield "silu_and_mul", silu_and_mul(rows, size, 2)
    if sizes.experts:
        yield "linear", linear(rows, sizes.hidden, sizes.experts, 2) + linear(rows, sizes.hidden, 1, 2)
        yield "route", route(rows, sizes, 2)
        yield "run_experts", run_experts(rows, sizes, 2, expected_experts(sizes, rows))


def _ring_token(sizes: Dimensions) -> int:
    return (sizes.key_heads * sizes.key_dim + sizes.value_size + sizes.value_heads) * _WIDE


def _count_partials(num_splits: int) -> tuple[int, int]:
    """Nodes whose partial result is stored and loaded, and nodes with a counter."""
    if num_splits == 1:
        return 0, 0
    num_partials, num_counters, nodes = num_splits, 0, num_splits
    while nodes > 1:
        nodes = -(-nodes // _FAN)
        num_counters += nodes
        num_partials += nodes if nodes > 1 else 0
    return num_partials, num_counters
