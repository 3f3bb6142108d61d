"""A model from its embedding to its final norm for few rows on a CPU, as one call of C++."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.decoder import MAX_HEAD_DIM, Decoder, DecoderMemory, DecoderPlace, DecoderSizes, DraftChain, serves
from kernels.quantized_linear import QuantizedWeight, Weight
from kernels.rotary import rotary_frequencies
from models.config import ModelConfig
from models.forward_batch import ForwardBatch
from models.layers.norm import RMSNorm

_MAX_ROWS_PER_REQUEST = 16
# Known rows are faster this way than through torch's matrix products up to so many, and of small layers up to so many
# multiplications per layer.
_MAX_KNOWN_ROWS, _MAX_PRODUCTS = 64, 2**31
_JOINED = ("row_ids", "start_lens", "accept_lens", "is_known", "positions")

KernelFront = Callable[[], dict[str, Weight]]


class KernelLayer(Protocol):
    """A layer that tells its weights, by the names of kernels/cpu/decoder.py, and its index in the cache."""

    def kernel_weights(self) -> tuple[dict[str, Weight], int]: ...


class CpuDecoder:
    """Stands beside the torch code of a module that owns these layers and norm, and does the same."""

    def __init__(self, config: ModelConfig, front: KernelFront, layers: Sequence[KernelLayer], norm: RMSNorm):
        self._config, self._front, self._layers, self._norm = config, front, layers, norm
        self._decoder: Decoder | None = None
        self._addresses = (0, 0)

    def serves(self, forward: ForwardBatch) -> bool:
        """Whether the pass may take this way: the rows of a decode step, and if they are few the known ones of prompts
        or of a draft head that catches up."""
        view = forward.view
        if view is None or not self._is_served:
            return False
        is_step = view.is_verify and max(forward.query_lens) <= _MAX_ROWS_PER_REQUEST
        return is_step or sum(forward.query_lens) <= self.max_known_rows

    @property
    def max_known_rows(self) -> int:
        """How many known rows may take this way, alone or beside those of a decode step; 0: nothing may."""
        return max(_MAX_KNOWN_ROWS, _MAX_PRODUCTS // self._packed().num_products) if self._is_served else 0

    def __call__(self, token_ids: Tensor, forward: ForwardBatch, hidden: Tensor | None = None) -> Tensor:
        """token_ids [N] int64, for a draft head with hidden [N, H] -> [N, H] after the norm."""
        memory = _memory(forward, records=hidden is None)
        return self._packed().run(token_ids, memory, forward.decoder_place, hidden)

    def run_jointly(self, passes: Sequence[ForwardBatch]) -> list[Tensor]:
        """A target's passes over different rows of one cache: hidden states [N, H] of each after the norm."""
        token_ids = torch.cat([forward.token_ids for forward in passes])
        place = _join([forward.decoder_place for forward in passes])
        hidden = self._packed().run(token_ids, _memory(passes[0], records=True), place)
        return list(hidden.split([len(forward.token_ids) for forward in passes]))

    def propose(self, token_ids: Tensor, forward: ForwardBatch, hidden: Tensor, chain: DraftChain) -> Tensor:
        """Guesses [B, D] of a draft head with one layer: see Decoder.propose."""
        return self._packed().propose(token_ids, _memory(forward), forward.decoder_place, hidden, chain)

    def forget(self) -> None:
        """Weights may lie elsewhere at the next pass, if not all of them."""
        self._decoder = None

    @property
    def _is_served(self) -> bool:
        return self._config.head_dim <= MAX_HEAD_DIM and serves(self._norm.scale)

    def _packed(self) -> Decoder:
        """Made at the first pass, and again when the module has moved to other memory: all of it, or see `forget`."""
        scale, front = self._norm.scale, self._front()
        embedding = front["embedding"]
        memory = embedding.words if isinstance(embedding, QuantizedWeight) else embedding
        addresses = (scale.data_ptr(), memory.data_ptr())
        if self._decoder is None or self._addresses != addresses:
            config = self._config
            layers = [layer.kernel_weights() for layer in self._layers]
            frequencies = rotary_frequencies(config.rotary_dim, config.rope_theta, scale.dtype, scale.device)
            self._decoder = Decoder(_sizes(config), front, layers, scale, frequencies, config.rms_norm_eps)
            self._addresses = addresses
        return self._decoder


def _memory(forward: ForwardBatch, records: bool = False) -> DecoderMemory:
    """The cache; a target also records its guessed rows for its draft head."""
    assert forward.view is not None
    cache = forward.view.cache
    history = (cache.history.hidden, cache.history.token_ids) if records and cache.history else None
    return DecoderMemory(cache.kv.data, cache.gdn.conv_ring, cache.gdn.state, cache.gdn.ring, history)


def _join(places: Sequence[DecoderPlace]) -> DecoderPlace:
    """One place of all requests, those of the first one first."""
    num_rows, width = [len(place.positions) for place in places], max(place.page_table.shape[1] for place in places)
    starts = [place.offsets[:-1] + sum(num_rows[:index]) for index, place in enumerate(places)]
    tables = [F.pad(place.page_table, (0, width - place.page_table.shape[1])) for place in places]
    joined = {name: torch.cat([getattr(place, name) for place in places]) for name in _JOINED}
    offsets = torch.cat([*starts, starts[0].new_tensor([sum(num_rows)])])
    return DecoderPlace(offsets=offsets, page_table=torch.cat(tables), **joined)


def _sizes(config: ModelConfig) -> DecoderSizes:
    return DecoderSizes(
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rotary_dim=config.rotary_dim,
        key_heads=config.delta_key_heads,
        value_heads=config.delta_value_heads,
        key_dim=config.delta_key_dim,
        value_dim=config.delta_value_dim,
        taps=config.conv_width,
        intermediate=config.intermediate_size,
        experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        expert_size=config.expert_size,
        shared_size=config.shared_expert_size,
    )
