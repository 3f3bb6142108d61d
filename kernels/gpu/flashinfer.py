"""FlashInfer's prefill kernels behind the contracts of kernels/gpu/attention.py and kernels/gpu/gated_delta_rule.py.

Prefill passes only, and only where they are asked for: FlashInfer plans attention from lengths on the host, which a
decode step does not have and may not wait for. Written for flashinfer-python 0.6.12, which compiles its kernels when
they are first used. Its kernels take bfloat16; the delta rule's is made for sm_90 and heads of 128 dimensions.

N tokens of B requests, HQ query heads, HKV key-value heads, D head dimension, P pages of a request; HK key heads, HV
value heads, DK / DV their dimensions, R rows.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gated_delta_net import DeltaNetShape
from kernels.gated_delta_rule import DeltaRing
from kernels.gpu.gated_delta_rule import DeltaInputs, fold_states
from kernels.rms_norm import l2_norm

HEAD_DIMS = (64, 128, 256)  # of attention
# Of the delta rule, whose keys and values have as many.
DELTA_DIM, DELTA_CAPABILITY = 128, (9, 0)
_WORKSPACE_BYTES = 128 * 2**20  # what FlashInfer recommends


class PageSpans(NamedTuple):
    """What a pass is planned with, all int32, `pages` on the device and the rest on the host: the tokens of request b
    are query_starts[b] .. query_starts[b + 1] - 1, its pages are pages[page_starts[b]] .. pages[page_starts[b + 1] - 1]
    in order, and the last of these holds last_page_lens[b] tokens."""

    query_starts: Tensor
    page_starts: Tensor
    pages: Tensor
    last_page_lens: Tensor

    @staticmethod
    def of(page_table: Tensor, page_size: int, start_lens: Sequence[int], query_lens: Sequence[int]) -> "PageSpans":
        """The pass that appends query_lens tokens behind start_lens; page_table [B, P] int64, on the device."""

        def on_host(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, pin_memory=page_table.is_cuda)

        ends = [start + count for start, count in zip(start_lens, query_lens, strict=True)]
        num_pages = [-(-end // page_size) for end in ends]
        pages = torch.cat([row[:count] for row, count in zip(page_table, num_pages, strict=True)])
        return PageSpans(
            on_host(list(accumulate(query_lens, initial=0))),
            on_host(list(accumulate(num_pages, initial=0))),
            pages.int(),
            on_host([(end - 1) % page_size + 1 for end in ends]),
        )


class AttentionPlanner:
    """FlashInfer's attention of one model over one cache. It is planned once for all layers of a pass, that is, when
    spans come which are not those of the call before. To make it has its kernels compiled."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, device: str
    ):
        import flashinfer

        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self._shape, self._dtype = (num_heads, num_kv_heads, head_dim, page_size), dtype
        self._planned: PageSpans | None = None
        self._copied = torch.cuda.Event() if workspace.is_cuda else None
        self._plan(PageSpans.of(torch.zeros(1, 1, dtype=torch.int64, device=device), page_size, [0], [1]))

    def attend(self, q: Tensor, kv: Tensor, spans: PageSpans) -> Tensor:
        """See `prefill_attention`, without a gate."""
        if self._planned is not spans:
            self._plan(spans)
        return self._wrapper.run(q, tuple(kv.unbind(0)), out=torch.empty_like(q))

    def _plan(self, spans: PageSpans) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # every plan is copied to the device from the same host memory
        self._wrapper.plan(*spans, *self._shape, causal=True, q_data_type=self._dtype)
        self._planned = spans
        if self._copied is not None:
            self._copied.record()


def prefill_attention(
    q: Tensor, kv: Tensor, spans: PageSpans, gate: Tensor | None, planner: AttentionPlanner
) -> Tensor:
    """Attend q [N, HQ, D] to the cache, which already holds the tokens' own keys: [N, HQ, D] in q's dtype.

    kv [2, pages, page_size, HKV, D] of q's dtype, both contiguous. A request's last token stands at the end of its
    spans, and every token sees the positions up to its own. gate [N, HQ, D] or None: the attention times sigmoid(gate).
    """
    out = planner.attend(q, kv, spans)
    return out if gate is None else out * gate.sigmoid()


def gated_delta_rule_prefill(
    inputs: DeltaInputs,
    shape: DeltaNetShape,
    state: Tensor,
    ring: DeltaRing,
    rows: Tensor,
    start_lens: Tensor,
    accept_lens: Tensor,
    query_starts: Tensor,
    longest: int,
) -> Tensor:
    """Fold, then run ragged known tokens: [N, HV, DV], as kernels.gpu.gated_delta_rule.gated_delta_rule_prefill, but
    q, k, v and the result are rounded to the dtype of the projections. `longest` is not needed."""
    key_heads, value_heads, key_dim, value_dim = shape
    fold_states(shape, state, ring, rows, start_lens, accept_lens)
    dtype, key_size = inputs.gates.dtype, key_heads * key_dim
    q, k, v = inputs.conv.split([key_size, key_size, value_heads * value_dim], dim=1)
    q, k = (l2_norm(x.unflatten(1, (key_heads, key_dim))) for x in (q, k))  # FlashInfer ignores the flag to do it
    v = v.unflatten(1, (value_heads, value_dim))
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    b, a = inputs.gates.float().chunk(2, dim=1)
    alpha = (-inputs.a_log.exp() * F.softplus(a + inputs.dt_bias)).exp()
    # It keeps states as [HV, DV, DK].
    out, after = _run_delta_rule(q, k, v, alpha, b.sigmoid(), state.mT.index_select(0, rows), query_starts)
    state.mT.index_copy_(0, rows, after)
    return out


def compile_delta_rule(shape: DeltaNetShape, dtype: torch.dtype, device: str) -> None:
    """Have the delta rule's kernels compiled now: run one token."""
    key_heads, value_heads, key_dim, value_dim = shape
    q = torch.zeros(1, key_heads, key_dim, dtype=dtype, device=device)
    v = torch.zeros(1, value_heads, value_dim, dtype=dtype, device=device)
    gate = torch.zeros(1, value_heads, device=device)
    state = torch.zeros(1, value_heads, value_dim, key_dim, device=device)
    _run_delta_rule(q, q, v, gate, gate, state, torch.arange(2, device=device))


def _run_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor, query_starts: Tensor
) -> tuple[Tensor, Tensor]:
    """q, k [N, HK, DK] normed, v [N, HV, DV]; alpha, beta [N, HV] and the states [B, HV, DV, DK] before the tokens
    float32; query_starts [B + 1] int64. Everything is contiguous, and not all of that is checked there."""
    import flashinfer

    return flashinfer.chunk_gated_delta_rule(
        *(q, k, v, alpha, beta),
        scale=q.shape[-1] ** -0.5,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=query_starts,
    )
