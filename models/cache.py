"""The device memory that lives longer than one forward pass: tensors, shapes and byte sizes. No policy.

L_full full-attention layers, L_mtp draft layers, L_delta delta-net layers, R rows (row 0 is padding, never a request),
page 0 is padding too. K = mtp_step drafts per step, T = K + 1 rows of a verify step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.gated_delta_rule import DeltaRing, fold_recorded
from models.config import ModelConfig

if TYPE_CHECKING:
    from kernels.gpu.attention import SplitScratch
    from kernels.gpu.flashinfer import AttentionPlanner


@dataclass(frozen=True)
class KVCache:
    """Paged keys and values [L_full + L_mtp, 2, pages, page_size, H_kv, D]; the draft layers are simply the last."""

    data: Tensor

    @property
    def page_size(self) -> int:
        return self.data.shape[3]

    @staticmethod
    def allocate(
        config: ModelConfig, num_mtp_layers: int, num_pages: int, page_size: int, dtype: torch.dtype, device: str
    ) -> "KVCache":
        layers = config.num_full_layers + num_mtp_layers
        shape = (layers, 2, num_pages, page_size, config.num_kv_heads, config.head_dim)
        return KVCache(torch.zeros(shape, dtype=dtype, device=device))


@dataclass(frozen=True)
class GDNCache:
    """One state per request and layer, and the rings that let it stand behind the newest tokens.

    state [L_delta, R, HV, DK, DV], ring (see DeltaRing, with a leading L_delta) and conv_ring [L_delta, R,
    conv_ring_len, C], all in float32 or wider. A row's state stands at seq_len - accept_len.
    """

    state: Tensor
    ring: DeltaRing
    conv_ring: Tensor
    conv_width: int

    @staticmethod
    def allocate(config: ModelConfig, mtp_step: int, num_rows: int, dtype: torch.dtype, device: str) -> "GDNCache":
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(config.num_delta_layers, num_rows, *shape, dtype=dtype, device=device)

        wide = torch.promote_types(dtype, torch.float32)
        rows_per_step = mtp_step + 1
        ring_len = _power_of_two(2 * rows_per_step)
        conv_ring_len = _power_of_two(rows_per_step + config.conv_width - 1)
        key_heads, value_heads = config.delta_key_heads, config.delta_value_heads
        key_dim, value_dim = config.delta_key_dim, config.delta_value_dim
        return GDNCache(
            state=zeros(value_heads, key_dim, value_dim, dtype=wide),
            ring=DeltaRing(
                k=zeros(ring_len, key_heads, key_dim, dtype=wide),
                u=zeros(ring_len, value_heads, value_dim, dtype=wide),
                alpha=zeros(ring_len, value_heads, dtype=wide),
            ),
            conv_ring=zeros(conv_ring_len, config.conv_channels, dtype=wide),
            conv_width=config.conv_width,
        )

    def reset(self, row: int) -> None:
        """Make the row that of an empty sequence: zero state, zero convolution history.

        The delta ring is cleared too: slots of tokens that were not accepted are read and multiplied by zero, which a
        NaN left by the row's last request would survive.
        """
        for tensor in (self.state, *self.ring, self.conv_ring):
            for part in _parts(tensor[:, row]):
                part.zero_()

    def layer_ring(self, layer: int) -> DeltaRing:
        return DeltaRing(*(part[layer] for part in self.ring))

    @property
    def state_bytes_per_row(self) -> int:
        return self.state[:, 0].nbytes

    @property
    def ring_bytes_per_row(self) -> int:
        return sum(part[:, 0].nbytes for part in (*self.ring, self.conv_ring))


@dataclass(frozen=True)
class GDNCheckpoints:
    """States kept for prefix reuse: state [L_delta, S, HV, DK, DV], and the W - 1 raw convolution inputs before the
    position each stands at, conv_window [L_delta, S, W - 1, C], oldest first. No prefix is kept in slot 0."""

    state: Tensor
    conv_window: Tensor

    @staticmethod
    def allocate(gdn: GDNCache, num_slots: int) -> "GDNCheckpoints":
        layers, channels = gdn.state.shape[0], gdn.conv_ring.shape[-1]
        return GDNCheckpoints(
            gdn.state.new_zeros(layers, num_slots, *gdn.state.shape[2:]),
            gdn.conv_ring.new_zeros(layers, num_slots, gdn.conv_width - 1, channels),
        )

    def save(self, slot: int, gdn: GDNCache, row: int, position: int, stand: Tensor) -> None:
        """Keep the row's state as of `position`. Its own state stands at `stand` (a number on the device), behind by at
        most the tokens that its delta ring holds, which are folded into the copy."""
        ring_len = gdn.ring.k.shape[2]
        slots = (stand + torch.arange(ring_len // 2, device=stand.device)) % ring_len
        recorded = DeltaRing(*(part[:, row].index_select(1, slots) for part in gdn.ring))
        fold_recorded(gdn.state[:, row], recorded, position - stand, self.state[:, slot])
        self.conv_window[:, slot] = gdn.conv_ring[:, row].index_select(1, self._window(gdn, position))

    def restore(self, slot: int, gdn: GDNCache, row: int, position: int) -> None:
        """Make the row's state that of the checkpoint, which stands at `position`."""
        gdn.reset(row)
        for part, kept in zip(_parts(gdn.state[:, row]), _parts(self.state[:, slot]), strict=True):
            part.copy_(kept)
        gdn.conv_ring[:, row].index_copy_(1, self._window(gdn, position), self.conv_window[:, slot])

    def _window(self, gdn: GDNCache, position: int) -> Tensor:
        positions = torch.arange(position - gdn.conv_width + 1, position, device=gdn.conv_ring.device)
        return positions % gdn.conv_ring.shape[2]

    @property
    def bytes_per_slot(self) -> int:
        return self.state[:, 0].nbytes + self.conv_window[:, 0].nbytes


HISTORY_LEN = 32


@dataclass(frozen=True)
class History:
    """What a draft head needs to catch up on positions that it has missed: the target's hidden states [R, HISTORY_LEN,
    H] and the tokens [R, HISTORY_LEN] int64 of the last positions, by position mod HISTORY_LEN. Every verify pass
    records its rows; a rejected draft's is overwritten by the next pass."""

    hidden: Tensor
    token_ids: Tensor

    @staticmethod
    def allocate(config: ModelConfig, num_rows: int, dtype: torch.dtype, device: str) -> "History":
        shape = (num_rows, HISTORY_LEN)
        hidden = torch.zeros(*shape, config.hidden_size, dtype=dtype, device=device)
        return History(hidden, torch.zeros(shape, dtype=torch.int64, device=device))

    def record(self, row_ids: Tensor, positions: Tensor, token_ids: Tensor, hidden: Tensor) -> None:
        """Rows [N] of a pass: hidden [N, H]."""
        slots = row_ids * HISTORY_LEN + positions % HISTORY_LEN
        self.hidden.flatten(0, 1).index_copy_(0, slots, hidden)
        self.token_ids.view(-1).index_copy_(0, slots, token_ids)

    @property
    def bytes_per_row(self) -> int:
        return self.hidden[0].nbytes + self.token_ids[0].nbytes


@dataclass(frozen=True)
class Backends:
    """Whose kernels run the two mixers of passes over the cache: "torch", "triton", or "flashinfer", which is Triton in
    all but prefill passes."""

    attention: str = "torch"
    gdn: str = "torch"

    @property
    def have_decode_step(self) -> bool:
        """Triton runs decode steps, so that all of one is work of the device alone."""
        return "torch" not in (self.attention, self.gdn)


TORCH = Backends()


@dataclass(frozen=True)
class Cache:
    """All device state that layers read and write, and whose kernels do it; `history` where a draft head may fall
    behind, `scratch` for Triton's attention, `planner` where FlashInfer runs that of prefill passes."""

    kv: KVCache
    gdn: GDNCache
    history: History | None = None
    backends: Backends = TORCH
    scratch: "SplitScratch | None" = None
    planner: "AttentionPlanner | None" = None


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """On a CPU layer by layer: torch shares what is larger with other threads, whose cores may have other work."""
    return tensor.unbind() if tensor.device.type == "cpu" else (tensor,)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
