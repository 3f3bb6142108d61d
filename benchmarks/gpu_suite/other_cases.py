"""Cases of everything but the delta net: attention, norms, feed-forward, drawing and accepting."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.gpu_suite import bytes as moved
from benchmarks.gpu_suite import peers
from benchmarks.gpu_suite.case import Case, Setting, alone
from kernels.activation import silu_and_mul_torch
from kernels.attention import paged_attention_torch
from kernels.gpu import activation as activation_kernels
from kernels.gpu import attention as attention_kernels
from kernels.gpu import moe as moe_kernels
from kernels.gpu import rms_norm as norm_kernels
from kernels.gpu import rotary as rotary_kernels
from kernels.gpu.attention import SplitScratch
from kernels.moe import route_torch, run_experts_torch
from kernels.rms_norm import add_rms_norm_torch, gated_rms_norm, rms_norm_torch
from kernels.rotary import norm_rope_store_torch, rotary_angles

_EPS, _THETA = 1e-6, 1e7
_LAW_REQUESTS = 16  # that the law of attention takes at once: it copies their keys in float32


def attention_cases(setting: Setting) -> Iterator[Case]:
    """Of a decode step: what stands before attention, and attention itself."""
    yield _rope(setting)
    yield _verify_attention(setting)


def norm_cases(setting: Setting) -> Iterator[Case]:
    """Of B · T rows."""
    sizes, rows = setting.sizes, setting.rows
    x, delta = (setting.normal(rows, sizes.hidden) for _ in range(2))
    scale = 1 + setting.normal(sizes.hidden, dtype=torch.float32, scale=0.2)
    yield Case(
        "rms_norm",
        setting,
        lambda: norm_kernels.rms_norm(x, scale, _EPS),
        alone,
        lambda: [rms_norm_torch(x, scale, _EPS)],
        moved.rms_norm(rows, sizes.hidden, setting.element),
        peers.norm_peers(x, scale, _EPS),
    )
    yield Case(
        "add_rms_norm",
        setting,
        lambda: norm_kernels.add_rms_norm(x, delta, scale, _EPS),
        list,
        lambda: add_rms_norm_torch(x, delta, scale, _EPS),
        moved.add_rms_norm(rows, sizes.hidden, setting.element),
    )
    shape = (rows, sizes.value_heads, sizes.value_dim)
    mixed = setting.normal(*shape, dtype=torch.float32)
    projected = setting.normal(rows, sizes.delta_projection)
    gate = projected[:, sizes.channels : sizes.channels + sizes.value_size].unflatten(1, shape[1:])
    weight = 1 + setting.normal(sizes.value_dim, dtype=torch.float32, scale=0.2)
    yield Case(
        "gated_rms_norm",
        setting,
        lambda: norm_kernels.gated_rms_norm(mixed, gate, weight, _EPS),
        alone,
        lambda: [gated_rms_norm(mixed, gate, weight, _EPS)],
        moved.gated_rms_norm(*shape, setting.element),
    )


def feed_forward_cases(setting: Setting) -> Iterator[Case]:
    """SwiGLU's elementwise half; of MoE models also routing and the experts."""
    sizes, rows = setting.sizes, setting.rows
    size = sizes.shared_size or sizes.intermediate
    gate_up = setting.normal(rows, 2 * size)
    yield Case(
        "silu_and_mul",
        setting,
        lambda: activation_kernels.silu_and_mul(gate_up),
        alone,
        lambda: [silu_and_mul_torch(gate_up)],
        moved.silu_and_mul(rows, size, setting.element),
        peers.activation_peers(gate_up),
    )
    if sizes.experts:
        yield _route(setting)
        yield _run_experts(setting)


def prefill_attention_case(setting: Setting) -> Case:
    """Whole prompts."""
    sizes, lens = setting.sizes, setting.prompt_lens()
    kv, page_table = _make_pages(setting, max(lens))
    q = setting.normal(sum(lens), sizes.heads, sizes.head_dim)
    gate = _make_gate(setting, sum(lens))
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], device=setting.device)
    zeros = torch.zeros(setting.batch, dtype=torch.int64, device=setting.device)

    def law() -> Sequence[Tensor]:
        outs = []
        for request, part in enumerate(q.split(lens)):
            positions = torch.arange(len(part), device=setting.device)[None]
            outs.append(_attend(part, kv, page_table[request : request + 1], positions))
        return [(torch.cat(outs) * gate.float().sigmoid()).to(q.dtype)]

    return Case(
        "prefill_attention",
        setting,
        lambda: attention_kernels.prefill_attention(q, kv, page_table, zeros, starts, max(lens), gate),
        alone,
        law,
        moved.prefill_attention(lens, sizes, setting.element, setting.page_size),
    )


def _verify_attention(setting: Setting) -> Case:
    sizes, batch = setting.sizes, setting.batch
    longest = setting.context + setting.num_tokens
    kv, page_table = _make_pages(setting, longest)
    q, gate = setting.normal(setting.rows, sizes.heads, sizes.head_dim), _make_gate(setting, setting.rows)
    start_lens = setting.start_lens()
    heads = (sizes.heads, sizes.kv_heads, sizes.head_dim)
    max_len = page_table.shape[1] * setting.page_size
    scratch = SplitScratch.allocate(batch, *heads, max_len, setting.num_tokens, setting.device)
    scratch.acc.fill_(torch.nan)
    scratch.stats.fill_(torch.nan)

    def law() -> Sequence[Tensor]:
        positions = start_lens[:, None] + torch.arange(setting.num_tokens, device=setting.device)
        groups = [slice(first, first + _LAW_REQUESTS) for first in range(0, batch, _LAW_REQUESTS)]
        by_request = q.unflatten(0, (batch, -1))
        outs = [_attend(by_request[some].flatten(0, 1), kv, page_table[some], positions[some]) for some in groups]
        idle = torch.zeros_like(scratch.counters)
        return [(torch.cat(outs) * gate.float().sigmoid()).to(q.dtype), idle]

    def run() -> Tensor:
        return attention_kernels.verify_attention(q, kv, page_table, start_lens, gate, scratch)

    def read(out: Tensor) -> Sequence[Tensor]:
        return out, scratch.counters

    counted = moved.verify_attention(
        batch, setting.num_tokens, sizes, setting.element, setting.context, setting.page_size
    )
    others = peers.attention_peers(q, kv, page_table, setting)
    return Case("verify_attention", setting, run, read, law, counted, others)


def _attend(q: Tensor, kv: Tensor, page_table: Tensor, positions: Tensor) -> Tensor:
    """The law in float32, on copies of the pages that it needs."""
    num_pages = page_table.numel()
    pages = kv[:, page_table.flatten()].float()
    places = torch.arange(num_pages, device=q.device).view_as(page_table)
    return paged_attention_torch(q.float(), pages, places, positions)


def _make_pages(setting: Setting, longest: int) -> tuple[Tensor, Tensor]:
    """Random keys and values on shuffled pages; the padding page is NaN."""
    sizes, per_request = setting.sizes, -(-longest // setting.page_size)
    num_pages = setting.batch * per_request
    kv = setting.normal(2, num_pages + 1, setting.page_size, sizes.kv_heads, sizes.head_dim)
    kv[:, 0] = torch.nan
    table = 1 + torch.randperm(num_pages, device=setting.device)
    return kv, table.view(setting.batch, per_request)


def _make_gate(setting: Setting, num_tokens: int) -> Tensor:
    """A view of the attention projection, as in the model."""
    sizes = setting.sizes
    projected = setting.normal(num_tokens, sizes.attention_projection)
    both = projected[:, : 2 * sizes.heads * sizes.head_dim].unflatten(1, (sizes.heads, -1))
    return both[..., sizes.head_dim :]


def _rope(setting: Setting) -> Case:
    sizes, rows = setting.sizes, setting.rows
    qkv = setting.normal(rows, sizes.attention_projection)
    q_scale, k_scale = (1 + setting.normal(sizes.head_dim, dtype=torch.float32, scale=0.2) for _ in range(2))
    ahead = torch.arange(setting.num_tokens, device=setting.device)
    positions = (setting.start_lens()[:, None] + ahead).flatten()
    angles = rotary_angles(positions, sizes.rotary_dim, _THETA, torch.float32)
    num_pages = -(-2 * rows // setting.page_size)
    shape = (2, num_pages, setting.page_size, sizes.kv_heads, sizes.head_dim)
    slots = torch.randperm(num_pages * setting.page_size, device=setting.device)[:rows]
    kv, law_kv = (torch.full(shape, torch.nan, dtype=setting.dtype, device=setting.device) for _ in range(2))

    def run() -> Tensor:
        return rotary_kernels.norm_rope_store(qkv, q_scale, k_scale, _EPS, *angles, kv, slots)

    def read(q: Tensor) -> Sequence[Tensor]:
        return q, kv.flatten(1, 2)[:, slots]

    def law() -> Sequence[Tensor]:
        q = norm_rope_store_torch(qkv, q_scale, k_scale, _EPS, *angles, law_kv, slots)
        return q, law_kv.flatten(1, 2)[:, slots]

    return Case("norm_rope_store", setting, run, read, law, moved.norm_rope_store(rows, sizes, setting.element))


def _route(setting: Setting) -> Case:
    sizes = setting.sizes
    logits = setting.normal(setting.rows, sizes.experts)

    def read(chosen: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        """Of logits that tie either expert may be chosen: their logits say whether it was one of the best."""
        return chosen[0], logits.gather(1, chosen[1])

    return Case(
        "route",
        setting,
        lambda: moe_kernels.route(logits, sizes.chosen),
        read,
        lambda: read(route_torch(logits, sizes.chosen)),
        moved.route(setting.rows, sizes, setting.element),
    )


def _run_experts(setting: Setting) -> Case:
    sizes, rows = setting.sizes, setting.rows
    hidden, size = sizes.hidden, sizes.expert_size
    x, shared = setting.normal(rows, hidden), setting.normal(rows, hidden)
    gate_up = setting.normal(sizes.experts, 2 * size, hidden, scale=hidden**-0.5)
    down = setting.normal(sizes.experts, hidden, size, scale=size**-0.5)
    weights, experts = route_torch(setting.normal(rows, sizes.experts), sizes.chosen)
    shared_gate = setting.normal(rows, sizes.experts + 1)[:, -1:]

    def law() -> Sequence[Tensor]:
        wide = (x.float(), gate_up.float(), down.float(), weights, experts, shared.float(), shared_gate.float())
        return [run_experts_torch(*wide).to(x.dtype)]

    return Case(
        "run_experts",
        setting,
        lambda: moe_kernels.run_experts(x, gate_up, down, weights, experts, shared, shared_gate),
        alone,
        law,
        moved.run_experts(rows, sizes, setting.element, len(experts.unique())),
        peers.expert_peers(x, gate_up, down, experts),
    )
