"""Embedding, decoder layers over the cache and final norm, for the few rows of a decode step or a chunk, in one call.

The law is the same layers one after the other in models/qwen3_5, models/qwen3_5_moe and models/qwen3_5_mtp; the
formulas stand in kernels/. What this adds is speed: Python's part of a step shrinks to one call, during which the
host's thread has Python to itself, and requests may have any numbers of rows. A row's result does not depend on the
other rows, bit for bit. Activations are kept in float32 (float64 for float64 weights) and rounded to bfloat16 only
where a processor multiplies bfloat16, so bfloat16 results differ from the law's in their last bits.

N rows of B requests, H hidden size, R rows of the cache.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cpu.library import load_library
from kernels.gated_delta_rule import DeltaRing
from kernels.gpu.dispatch import runs_triton
from kernels.quantized_linear import QuantizedWeight, Weight

MAX_HEAD_DIM = 1024  # of an attention head
# Multiplications per layer below which the other cores are left to what else serving takes: a step of so few tokens of
# so small a model ends in about a millisecond.
_PARALLEL_PRODUCTS = 11 * 2**20
# What a product in attention takes, in multiplications by weights.
_ATTENTION_WEIGHT = 4
_FUNCTIONS = {torch.bfloat16: "decoder_bfloat16", torch.float32: "decoder_float32", torch.float64: "decoder_float64"}
_VECTOR_NAMES = ("input_norm", "post_norm", "q_norm", "k_norm", "conv", "a_log", "dt_bias", "delta_norm")
_MATRIX_NAMES = ("in_proj", "out_proj", "gate_up", "down", "router", "shared_gate_up", "shared_down", "shared_gate")


class DecoderSizes(ctypes.Structure):
    """Sizes of the layers, in the words of ModelConfig; 0 for what no layer has."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("hidden", "heads", "kv_heads", "head_dim", "rotary_dim")
        + ("key_heads", "value_heads", "key_dim", "value_dim", "taps")
        + ("intermediate", "experts", "experts_per_token", "expert_size", "shared_size")
    ]


class DecoderMemory(NamedTuple):
    """The whole cache, updated in place: kv [L, 2, pages, page_size, HKV, D] in the weights' dtype; conv_ring [L_delta,
    R, ring_len, C], state [L_delta, R, HV, DK, DV] and the delta ring with a leading L_delta. With `history` (hidden
    [R, length, H] in the weights' dtype, token ids [R, length] int64) the pass's guessed rows are recorded there, by
    position."""

    kv: Tensor
    conv_ring: Tensor
    state: Tensor
    ring: DeltaRing
    history: tuple[Tensor, Tensor] | None = None


class DecoderPlace(NamedTuple):
    """Where the pass stands, all int64: offsets [B + 1] of the requests' rows in the pass; row_ids, start_lens,
    accept_lens [B] and page_table [B, P] as in the cache; positions [N]. Layers with a delta net want positions that
    count up from start_lens. Where is_known [B] is not 0 a request's rows are no guesses, so states are stored behind
    the last of them and nothing is recorded for a later fold."""

    offsets: Tensor
    row_ids: Tensor
    start_lens: Tensor
    accept_lens: Tensor
    is_known: Tensor
    positions: Tensor
    page_table: Tensor


class DraftVocabulary(NamedTuple):
    """The tokens below num_first and those from `tail` on."""

    num_first: int
    tail: int


class DraftChain(NamedTuple):
    """What a chain of guesses starts from: the flat index last [B] of each request's newest row. alive[d] requests,
    which come first, want more than d guesses. `head` [V, H] makes the logits; of those in `vocabulary` a guess is the
    largest one, or where temperatures [B] is not 0 a draw from softmax(logits / temperature) with the random numbers of
    (seeds [B], the guess's own position): see kernels/sampling.py."""

    last: Tensor
    alive: Sequence[int]
    head: Weight
    vocabulary: DraftVocabulary
    temperatures: Tensor
    seeds: Tensor


class _Matrix(ctypes.Structure):
    _fields_ = [("weights", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("bits", ctypes.c_int64)]


class _Front(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("embedding", "fc")),
        *((name, ctypes.c_void_p) for name in ("embedding_norm", "hidden_norm")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _VECTOR_NAMES),
        *((name, _Matrix) for name in _MATRIX_NAMES),
        ("cache_layer", ctypes.c_int64),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("token_ids", *DecoderPlace._fields)),
        *((name, ctypes.c_int64) for name in ("requests", "rows", "table_width")),
    ]


class _Chain(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("temperatures", "seeds", "last", "alive")),
        ("head", _Matrix),
        *((name, ctypes.c_int64) for name in ("first_ids", "tail", "vocab", "depth")),
        ("drafts", ctypes.c_void_p),
    ]


class _Memory(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("kv", "conv_ring", "state", "ring_k", "ring_u", "ring_alpha")),
        *((name, ctypes.c_void_p) for name in ("history", "history_ids")),
        *((name, ctypes.c_int64) for name in ("num_rows", "pages", "page_size")),
        *((name, ctypes.c_int64) for name in ("conv_ring_len", "ring_len", "history_len")),
    ]


class Decoder:
    """Layers whose weights stay where they are: updated in place they are seen, moved elsewhere not.

    front: the `embedding` [V, H], and for a draft head `fc` [H, 2H] with `embedding_norm` and `hidden_norm`.
    layers: (weights by the names in _VECTOR_NAMES and _MATRIX_NAMES, index in the KV or GDN part of the cache). A layer
    with a q_norm is attention, one with a router is sparse. Norm scales are 1 + w. final_norm [H]; frequencies
    [rotary_dim / 2] of the rotary embedding. Matrices are of one dtype or quantized from it, everything else float32 or
    wider. `num_products`: multiplications per row and layer.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        front: Mapping[str, Weight],
        layers: Sequence[tuple[Mapping[str, Weight], int]],
        final_norm: Tensor,
        frequencies: Tensor,
        eps: float,
    ):
        assert sizes.head_dim <= MAX_HEAD_DIM and sizes.rotary_dim <= sizes.head_dim
        self._sizes, self._final_norm, self._frequencies, self._eps = sizes, final_norm, frequencies, eps
        self._weights = [front, *(weights for weights, _ in layers)]  # keeps them alive
        assert all(set(weights) <= {*_VECTOR_NAMES, *_MATRIX_NAMES} for weights, _ in layers)
        self._front = _Front(**_places(front))
        self._layers = (_Layer * len(layers))(
            *(_Layer(**_places(weights), cache_layer=index) for weights, index in layers)
        )
        self.num_products = sum(_count_products(weights, sizes) for weights, _ in layers) // len(layers)
        num_attention = sum("q_norm" in weights for weights, _ in layers)
        of_attention = 2 * sizes.heads * sizes.head_dim * num_attention
        self._products_by_context = _ATTENTION_WEIGHT * of_attention // len(layers)
        self._dtype = front["embedding"].dtype

    def run(
        self, token_ids: Tensor, memory: DecoderMemory, place: DecoderPlace, hidden: Tensor | None = None
    ) -> Tensor:
        """token_ids [N] int64, for a draft head with hidden [N, H] -> [N, H] after the final norm, in the matrices'
        dtype. The library must be there."""
        return self._call(token_ids, memory, place, hidden, None)

    def propose(
        self, token_ids: Tensor, memory: DecoderMemory, place: DecoderPlace, hidden: Tensor, chain: DraftChain
    ) -> Tensor:
        """A draft head with one layer: its keys and values of all rows, and guesses [B, D] int64 from the newest ones;
        what is not wanted means nothing, and D may be 0.

        Guess d + 1 comes of the head's own output at guess d, one position later.
        """
        drafts = torch.zeros(len(chain.last), len(chain.alive), dtype=torch.int64)
        inputs = [chain.temperatures.to(self._final_norm.dtype), chain.seeds, chain.last, torch.tensor(chain.alive)]
        inputs = [tensor.contiguous() for tensor in inputs]
        addresses = [tensor.data_ptr() for tensor in inputs]
        sizes = (*chain.vocabulary, chain.head.shape[0], drafts.shape[1])
        self._call(token_ids, memory, place, hidden, _Chain(*addresses, _matrix(chain.head), *sizes, drafts.data_ptr()))
        return drafts

    def _call(
        self,
        token_ids: Tensor,
        memory: DecoderMemory,
        place: DecoderPlace,
        hidden: Tensor | None,
        chain: _Chain | None,
    ) -> Tensor:
        places = [tensor.contiguous() for tensor in (token_ids, *place)]
        batch = _Batch(
            *(tensor.data_ptr() for tensor in places),
            *(len(place.row_ids), len(token_ids), place.page_table.shape[1]),
        )
        tensors = (memory.kv, memory.conv_ring, memory.state, *memory.ring)
        cache = _Memory(
            *(tensor.data_ptr() for tensor in tensors),
            *([None, None] if memory.history is None else [tensor.data_ptr() for tensor in memory.history]),
            *(memory.state.shape[1], memory.kv.shape[2], memory.kv.shape[3], memory.conv_ring.shape[2]),
            *(memory.ring.k.shape[2], 0 if memory.history is None else memory.history[1].shape[1]),
        )
        out = torch.empty(len(token_ids), self._sizes.hidden, dtype=self._final_norm.dtype)
        hidden = out if hidden is None else hidden.to(out.dtype).contiguous()
        getattr(load_library(), _FUNCTIONS[self._dtype])(
            *(ctypes.addressof(self._sizes), ctypes.addressof(self._front)),
            *(ctypes.addressof(self._layers), len(self._layers)),
            *(self._final_norm.data_ptr(), self._frequencies.data_ptr(), self._eps),
            *(ctypes.addressof(batch), ctypes.addressof(cache), hidden.data_ptr(), out.data_ptr()),
            None if chain is None else ctypes.addressof(chain),
            self._count_threads(len(token_ids), place.page_table.shape[1] * memory.kv.shape[3]),
        )
        return out.to(self._dtype)

    def _count_threads(self, num_rows: int, context_len: int) -> int:
        """How many threads so many rows are worth, none of which sees more than `context_len` tokens."""
        num_products = num_rows * (self.num_products + self._products_by_context * context_len)
        return torch.get_num_threads() if num_products >= _PARALLEL_PRODUCTS else 1


def serves(weight: Tensor) -> bool:
    """Whether a model with such weights may take this way: on a CPU, without gradients, with a library."""
    is_candidate = weight.device.type == "cpu" and weight.dtype in _FUNCTIONS and not torch.is_grad_enabled()
    return is_candidate and not runs_triton(weight) and load_library() is not None


def _count_products(weights: Mapping[str, Weight], sizes: DecoderSizes) -> int:
    """Multiplications per row: of all experts' matrices only the chosen share."""
    sparse = sum(weight.numel() for weight in weights.values() if weight.dim() == 3)
    dense = sum(weight.numel() for weight in weights.values() if weight.dim() == 2)
    return dense + sparse * sizes.experts_per_token // max(1, sizes.experts)


def _places(weights: Mapping[str, Weight]) -> dict[str, int | _Matrix]:
    matrices = {*_MATRIX_NAMES, "embedding", "fc"}
    return {name: _matrix(weight) if name in matrices else _address(weight) for name, weight in weights.items()}


def _matrix(weight: Weight) -> _Matrix:
    if isinstance(weight, QuantizedWeight):
        return _Matrix(weight.words.data_ptr(), weight.scales.data_ptr(), weight.bits)
    return _Matrix(_address(weight), None, 0)


def _address(weight: Weight) -> int:
    assert isinstance(weight, Tensor) and weight.is_contiguous()
    return weight.data_ptr()
