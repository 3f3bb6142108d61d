"""The least time of a decode step: every weight, state and cache entry moved once, every product at the matrix rate.

No launch gaps, no activations. GDN states are float32 and kept by replay: read and written once per step, with rings of
what the last tokens did; keys, values and weights are bfloat16 if not said otherwise. Experts are chosen uniformly. B
requests, K drafts, T = K + 1 rows of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.gpu_suite.dimensions import Dimensions

_WIDE = 4  # bytes of float32


@dataclass(frozen=True)
class Workload:
    """A decode step: B requests with `context` tokens in the cache, K = mtp_step; a draft is right with probability
    `acceptance` if the one before it was, or a request emits `accept_len` tokens on average where that is known. Bytes
    of a key or value, and of a weight on average. Draft passes score `draft_vocab` tokens, 0: all."""

    batch: int
    mtp_step: int
    context: int = 2048
    acceptance: float = 0.85
    element: int = 2
    weight_element: float = 2.0
    draft_vocab: int = 0
    accept_len: float | None = None

    @property
    def rows(self) -> int:
        """Of the verify pass, T = mtp_step + 1."""
        return self.mtp_step + 1

    @property
    def tokens_per_step(self) -> float:
        """What a request emits, on average."""
        if self.accept_len is not None:
            return self.accept_len
        return sum(self.acceptance**position for position in range(self.rows))


@dataclass(frozen=True)
class Card:
    """Bytes per second of a copy, and bfloat16 multiplications and additions per second of a product."""

    bandwidth: float
    matmul_rate: float


@dataclass(frozen=True)
class Piece:
    """What must be moved and multiplied for one part of a step."""

    num_bytes: float
    num_flops: float = 0.0

    def seconds(self, card: Card) -> float:
        """The slower of both."""
        return max(self.num_bytes / card.bandwidth, self.num_flops / card.matmul_rate)


def step_pieces(sizes: Dimensions, work: Workload) -> dict[str, list[Piece]]:
    """The parts of a decode step: weights, kv, state, logits, draft."""
    num_rows = work.batch * work.rows
    head, draft_head = (sizes.hidden * vocab for vocab in (sizes.vocab, work.draft_vocab or sizes.vocab))
    mixers, fc, keys = _mixer_weights(sizes), 2 * sizes.hidden**2, 2 * sizes.kv_heads * sizes.head_dim
    kv_layer = Piece(work.batch * work.context * keys * work.element)
    draft = _weights(sizes, work, fc + _attention_weights(sizes), 1, work.batch)
    # Of all but the newest rows the first pass wants keys and values only.
    others = 2 * (num_rows - work.batch) * (fc + sizes.hidden * keys)
    drafts: list[Piece] = []
    for step in range(work.mtp_step):
        body = draft if step else replace(draft, num_flops=draft.num_flops + others)
        drafts += [body, Piece(work.weight_element * draft_head, 2 * draft_head * work.batch), kv_layer]
    return {
        "weights": [_weights(sizes, work, mixers + head, sizes.num_layers, num_rows)],
        "kv": [Piece(sizes.num_full_layers * kv_layer.num_bytes)],
        "state": [Piece(work.batch * sizes.num_delta_layers * _delta_bytes(sizes, work))],
        "logits": [Piece(num_rows * sizes.vocab * _WIDE)],
        "draft": drafts,
    }


def prefill_floor_seconds(sizes: Dimensions, lens: Sequence[int], card: Card) -> float:
    """The least time of whole prompts of `lens` tokens, without logits: products with the weights, and attention."""
    work = Workload(batch=1, mtp_step=0)
    layers = _weights(sizes, work, _mixer_weights(sizes), sizes.num_layers, sum(lens))
    pairs = sum(count * (count + 1) / 2 for count in lens)
    attention = Piece(0, 4 * sizes.heads * sizes.head_dim * pairs * sizes.num_full_layers)
    return layers.seconds(card) + attention.seconds(card)


def floor_seconds(sizes: Dimensions, work: Workload, card: Card) -> float:
    """The least time of a step."""
    return sum(piece.seconds(card) for pieces in step_pieces(sizes, work).values() for piece in pieces)


def floor_bytes(sizes: Dimensions, work: Workload) -> float:
    """What that step moves."""
    return sum(piece.num_bytes for pieces in step_pieces(sizes, work).values() for piece in pieces)


def expected_experts(sizes: Dimensions, num_rows: int) -> float:
    """How many different experts `num_rows` tokens choose in a layer."""
    return sizes.experts * (1 - (1 - sizes.chosen / sizes.experts) ** num_rows) if sizes.experts else 0.0


def _attention_weights(sizes: Dimensions) -> int:
    return sizes.hidden * (sizes.attention_projection + sizes.heads * sizes.head_dim)


def _mixer_weights(sizes: Dimensions) -> int:
    """Of all layers, without the feed-forward halves."""
    delta = sizes.hidden * (sizes.delta_projection + sizes.value_size) + sizes.taps * sizes.channels
    return sizes.num_delta_layers * delta + sizes.num_full_layers * _attention_weights(sizes)


def _weights(sizes: Dimensions, work: Workload, others: int, num_layers: int, num_rows: int) -> Piece:
    """A pass of num_rows over `others` weights and the feed-forward layers."""
    always, expert = 3 * sizes.hidden * sizes.intermediate, 0
    if sizes.experts:
        always = sizes.hidden * (3 * sizes.shared_size + sizes.experts + 1)
        expert = 3 * sizes.hidden * sizes.expert_size
    fixed = others + num_layers * always
    read = fixed + num_layers * expert * expected_experts(sizes, num_rows)
    used = fixed + num_layers * expert * sizes.chosen
    return Piece(work.weight_element * read, 2 * used * num_rows)


def _delta_bytes(sizes: Dimensions, work: Workload) -> float:
    """Of one layer and request: the state read and written; T tokens put into the ring and the accepted ones read back;
    the convolution's window of T new and taps - 1 old inputs read and written."""
    state = sizes.value_heads * sizes.key_dim * sizes.value_dim * _WIDE
    token = (sizes.key_heads * sizes.key_dim + sizes.value_size + sizes.value_heads) * _WIDE
    window = (work.rows + sizes.taps - 1) * sizes.channels * _WIDE
    return 2 * state + (work.rows + work.tokens_per_step) * token + 2 * window
