"""What a layer must know about one forward pass. Passed as an argument, never looked up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.cpu.decoder import DecoderPlace
from kernels.gated_delta_net import Stand, VerifyPlace
from kernels.gated_delta_rule import Fold
from models.cache import Cache

if TYPE_CHECKING:
    from kernels.gpu.flashinfer import PageSpans

_SMALL_STATE_BYTES = 2**17


def to_device(values: Sequence[Any], device: torch.device | str) -> Tensor:
    """Numbers of the host as a tensor on the device; on a GPU without waiting for what it is doing."""
    if torch.device(device).type != "cuda":
        return torch.tensor(values, device=device)
    return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)


@dataclass(frozen=True)
class CacheView:
    """How the requests of one pass lie in the cache.

    rows: host numbers; start_lens [B] int64: tokens in the cache before this pass; accept_lens [B] int64: how many of
    these the GDN state has not folded yet; page_table [B, P] int64. `is_verify`: the tokens are a guess (one token and
    its drafts), so the GDN layers record them and leave the state before them. row_ids are `rows` on the device.
    host_starts are start_lens on the host, None where only the device knows them.
    """

    cache: Cache
    rows: tuple[int, ...]
    start_lens: Tensor
    accept_lens: Tensor
    page_table: Tensor
    is_verify: bool
    row_ids: Tensor
    host_starts: tuple[int, ...] | None = None

    def select(self, some: slice) -> "CacheView":
        """The view of some of the requests."""
        return replace(
            self,
            rows=self.rows[some],
            row_ids=self.row_ids[some],
            start_lens=self.start_lens[some],
            accept_lens=self.accept_lens[some],
            page_table=self.page_table[some],
            host_starts=None if self.host_starts is None else self.host_starts[some],
        )

    @property
    def stand(self) -> Stand:
        """Where the requests stand, for kernels that find the rest themselves."""
        return Stand(self.row_ids, self.start_lens, self.accept_lens)

    def pick(self, order: list[int]) -> "CacheView":
        """The view of the requests `order`, in this order."""
        chosen = to_device(order, self.start_lens.device)
        return replace(
            self,
            rows=tuple(self.rows[index] for index in order),
            row_ids=self.row_ids[chosen],
            start_lens=self.start_lens[chosen],
            accept_lens=self.accept_lens[chosen],
            page_table=self.page_table[chosen],
            host_starts=None if self.host_starts is None else tuple(self.host_starts[index] for index in order),
        )

    @cached_property
    def fold(self) -> Fold:
        """What the GDN layers must fold first."""
        if self.accept_lens.is_cuda:  # bounds, so that nobody waits for the device
            shortest, longest = 0, self.cache.gdn.ring.k.shape[2] // 2
        else:
            shortest, longest = (int(count) for count in self.accept_lens.aminmax())
        age = torch.arange(longest, device=self.start_lens.device)
        folded = (self.start_lens - self.accept_lens)[:, None] + age
        return Fold(
            groups=self._state_groups(),
            slots=self._ring_slots(folded, self.cache.gdn.ring.k.shape[2]),
            is_accepted=None if shortest == longest else age < self.accept_lens[:, None],
        )

    def _state_groups(self) -> tuple[tuple[slice, slice], ...]:
        """All requests at once when their states are small and lie side by side; else one at a time, so that a state
        stays in the processor's cache while it is folded and read, and scattered rows are never copied together."""
        first, count = self.rows[0], len(self.rows)
        is_consecutive = self.rows == tuple(range(first, first + count))
        if is_consecutive and self.cache.gdn.state[0, 0].nbytes < _SMALL_STATE_BYTES:
            return ((slice(first, first + count), slice(0, count)),)
        return tuple((slice(row, row + 1), slice(i, i + 1)) for i, row in enumerate(self.rows))

    def delta_write_slots(self, num_tokens: int) -> Tensor:
        """Flat delta-ring slots of the pass's tokens."""
        return self._ring_slots(self._ahead(0, num_tokens), self.cache.gdn.ring.k.shape[2])

    def conv_read_slots(self, num_taps: int) -> Tensor:
        """Flat conv-ring slots of the num_taps - 1 inputs before the pass."""
        return self._ring_slots(self._ahead(1 - num_taps, 0), self.cache.gdn.conv_ring.shape[2])

    def conv_write_slots(self, num_tokens: int) -> Tensor:
        """Flat conv-ring slots of the pass's last inputs, as many as the ring holds."""
        ring_len = self.cache.gdn.conv_ring.shape[2]
        return self._ring_slots(self._ahead(max(0, num_tokens - ring_len), num_tokens), ring_len)

    def _ahead(self, start: int, end: int) -> Tensor:
        return self.start_lens[:, None] + torch.arange(start, end, device=self.start_lens.device)

    def _ring_slots(self, positions: Tensor, ring_len: int) -> Tensor:
        return (self.row_ids[:, None] * ring_len + positions % ring_len).flatten()


@dataclass(frozen=True)
class ForwardBatch:
    """N tokens of B requests, request after request.

    token_ids, positions [N] int64; query_lens: the B token counts. Without a `view` the tokens are whole sequences from
    position 0, nothing is stored, and gradients flow (training). What all layers need alike is computed once, here.
    """

    token_ids: Tensor
    positions: Tensor
    query_lens: tuple[int, ...]
    view: CacheView | None = None

    @staticmethod
    def whole_sequences(token_ids: Tensor) -> "ForwardBatch":
        """token_ids [B, T]: B whole sequences of one length."""
        batch, length = token_ids.shape
        positions = torch.arange(length, device=token_ids.device).repeat(batch)
        return ForwardBatch(token_ids.flatten(), positions, (length,) * batch)

    @property
    def num_requests(self) -> int:
        return len(self.query_lens)

    @cached_property
    def query_starts(self) -> Tensor:
        """Index of every request's first token, and N: [B + 1] int64."""
        return to_device(list(accumulate(self.query_lens, initial=0)), self.token_ids.device)

    @cached_property
    def parts(self) -> "list[tuple[slice, ForwardBatch]]":
        """Runs of requests with equally many tokens as batches of their own, with their slices of the N tokens."""
        if len(set(self.query_lens)) == 1:
            return [(slice(None), self)]
        parts, request, token = [], 0, 0
        for length, run in groupby(self.query_lens):
            count = len(list(run))
            span = slice(token, token + count * length)
            view = None if self.view is None else self.view.select(slice(request, request + count))
            parts.append((span, ForwardBatch(self.token_ids[span], self.positions[span], (length,) * count, view)))
            request, token = request + count, span.stop
        return parts

    @cached_property
    def kv_slots(self) -> Tensor:
        """Flat KV slot of every token [N] int64: page · page_size + offset."""
        assert self.view is not None
        page_size = self.view.cache.kv.page_size
        pages = torch.cat(
            [
                part.view.page_table.gather(1, part.positions.view(part.num_requests, -1) // page_size).flatten()
                for _, part in self.parts
                if part.view is not None
            ]
        )
        return pages * page_size + self.positions % page_size

    @cached_property
    def page_spans(self) -> "PageSpans | None":
        """The pages that the requests attend to, for FlashInfer; None where the host does not know how many."""
        from kernels.gpu.flashinfer import PageSpans

        view = self.view
        assert view is not None
        if view.host_starts is None:
            return None
        return PageSpans.of(view.page_table, view.cache.kv.page_size, view.host_starts, self.query_lens)

    @cached_property
    def conv_slots(self) -> tuple[Tensor, Tensor]:
        """Where the convolution of a batch with equally many tokens reads its history and records its inputs."""
        view = self.view
        assert view is not None
        return view.conv_read_slots(view.cache.gdn.conv_width), view.conv_write_slots(self.query_lens[0])

    @cached_property
    def verify_place(self) -> VerifyPlace:
        """Where the requests of a verify step stand in the GDN cache."""
        view = self.view
        assert view is not None
        write_slots = view.delta_write_slots(self.query_lens[0])
        return VerifyPlace(view.row_ids, view.start_lens, view.accept_lens, self.conv_slots, view.fold, write_slots)

    @cached_property
    def decoder_place(self) -> DecoderPlace:
        """Where the pass stands, for the C++ decoder."""
        view = self.view
        assert view is not None
        is_known = torch.full_like(view.row_ids, not view.is_verify)
        of_requests = (view.row_ids, view.start_lens, view.accept_lens, is_known)
        return DecoderPlace(self.query_starts, *of_requests, self.positions, view.page_table)

    def record(self, hidden: Tensor) -> None:
        """Keep the hidden states [N, H] of a verify pass for a draft head that may have to catch up on them."""
        view = self.view
        assert view is not None
        if view.cache.history is not None:
            lens = torch.tensor(self.query_lens, device=hidden.device)
            row_ids = view.row_ids.repeat_interleave(lens, output_size=len(hidden))
            view.cache.history.record(row_ids, self.positions, self.token_ids, hidden)

    def next_tokens(self, token_ids: Tensor, positions: Tensor) -> "ForwardBatch":
        """One more token for each of the first requests at positions [b], over the same cache."""
        count = len(positions)
        view = self.view
        if view is not None:
            view = replace(view.select(slice(count)), start_lens=positions, host_starts=None)
        return ForwardBatch(token_ids, positions, (1,) * count, view)
