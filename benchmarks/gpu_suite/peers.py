"""What others have for the same work, where it is installed: torch, flash-linear-attention, flashinfer.

Each function gives closures by name that run on the case's own inputs. Some do less (a fold, a gate, pages); the name
says what runs. An import that fails shows when the closure is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.gpu_suite.case import Setting
    from kernels.gpu.gated_delta_rule import DeltaInputs

Peers = dict[str, Callable[[], object]]


def delta_verify_peers(inputs: DeltaInputs, setting: Setting) -> Peers:
    """The recurrent rule on states of its own that lie side by side, written once; nothing is folded or recorded."""
    return {"fla fused_recurrent": _fla("fused_recurrent_gated_delta_rule", inputs, setting)}


def delta_prefill_peers(inputs: DeltaInputs, setting: Setting) -> Peers:
    """The chunked rule, for prompts of equal length."""
    if setting.is_ragged:
        return {}
    return {"fla chunk": _fla("chunk_gated_delta_rule", inputs, setting)}


def _fla(name: str, inputs: DeltaInputs, setting: Setting) -> Callable[[], object]:
    sizes, batch = setting.sizes, setting.batch
    made: list[Any] = []

    def prepare() -> tuple[Any, dict[str, Any]]:
        import fla.ops.gated_delta_rule as fla

        conv = inputs.conv.to(torch.bfloat16).unflatten(0, (batch, -1))
        key_size = sizes.key_heads * sizes.key_dim
        q, k, v = conv.split([key_size, key_size, sizes.value_size], dim=-1)
        q, k = (x.unflatten(-1, (sizes.key_heads, sizes.key_dim)) for x in (q, k))
        repeat = sizes.value_heads // sizes.key_heads
        q, k = (x.repeat_interleave(repeat, dim=2).contiguous() for x in (q, k))
        b, a = inputs.gates.unflatten(0, (batch, -1)).float().chunk(2, dim=-1)
        state = setting.normal(batch, sizes.value_heads, sizes.key_dim, sizes.value_dim, dtype=torch.float32)
        arguments = {
            "q": q,
            "k": k,
            "v": v.unflatten(-1, (sizes.value_heads, sizes.value_dim)).contiguous(),
            "g": (-inputs.a_log.exp() * F.softplus(a + inputs.dt_bias)).contiguous(),
            "beta": b.sigmoid().contiguous(),
            "initial_state": state,
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": True,
        }
        return getattr(fla, name), arguments

    def run() -> object:
        if not made:
            made.append(prepare())
        function, arguments = made[0]
        return function(**arguments)

    return run


def attention_peers(q: Tensor, kv: Tensor, page_table: Tensor, setting: Setting) -> Peers:
    """torch on keys that already lie side by side, and flashinfer on the pages (T = 1); both without a gate."""
    batch, num_tokens = setting.batch, setting.num_tokens
    made: list[Any] = []
    peers: Peers = {}

    def run_torch() -> object:
        if not made:
            keys, values = (
                part[page_table].flatten(1, 2)[:, : setting.context + num_tokens].transpose(1, 2).contiguous()
                for part in kv
            )
            seen = torch.arange(keys.shape[2], device=q.device)
            last = setting.context + torch.arange(num_tokens, device=q.device)
            mask = None if num_tokens == 1 else seen <= last[:, None]
            made.append((q.unflatten(0, (batch, -1)).transpose(1, 2).contiguous(), keys, values, mask))
        queries, keys, values, mask = made[0]
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)

    peers["torch sdpa"] = run_torch
    if num_tokens == 1 and setting.dtype == torch.bfloat16:
        peers["flashinfer decode"] = _flashinfer_decode(q, kv, page_table, setting)
    return peers


def _flashinfer_decode(q: Tensor, kv: Tensor, page_table: Tensor, setting: Setting) -> Callable[[], object]:
    wrappers: list[Any] = []

    def run() -> object:
        if not wrappers:
            import flashinfer

            num_pages = -(-(setting.context + 1) // setting.page_size)
            indptr = torch.arange(setting.batch + 1, dtype=torch.int32, device=q.device) * num_pages
            last = torch.full((setting.batch,), setting.context % setting.page_size + 1, dtype=torch.int32)
            workspace = torch.empty(2**28, dtype=torch.uint8, device=q.device)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
            sizes = setting.sizes
            wrapper.plan(
                indptr,
                page_table[:, :num_pages].flatten().int(),
                last.to(q.device),
                *(sizes.heads, sizes.kv_heads, sizes.head_dim, setting.page_size),
                q_data_type=q.dtype,
                kv_data_type=q.dtype,
            )
            wrappers.append(wrapper)
        return wrappers[0].run(q, (kv[0], kv[1]))

    return run


def norm_peers(x: Tensor, scale: Tensor, eps: float) -> Peers:
    """torch's fused norm with a scale of x's dtype, and flashinfer's."""
    weight = scale.to(x.dtype)

    def run_flashinfer() -> object:
        import flashinfer

        return flashinfer.norm.rmsnorm(x, weight, eps)

    return {"torch": lambda: F.rms_norm(x, (x.shape[-1],), weight, eps), "flashinfer": run_flashinfer}


def activation_peers(gate_up: Tensor) -> Peers:
    """torch's two elementwise kernels, and flashinfer's one."""
    gate, up = gate_up.chunk(2, dim=-1)

    def run_flashinfer() -> object:
        import flashinfer

        return flashinfer.activation.silu_and_mul(gate_up)

    return {"torch": lambda: F.silu(gate) * up, "flashinfer": run_flashinfer}


def expert_peers(x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor) -> Peers:
    """torch's two grouped products alone, on pairs that are sorted already (bfloat16)."""
    if x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return {}
    pairs = experts.flatten().sort()
    tokens = x[pairs.indices // experts.shape[1]]
    ends = torch.searchsorted(pairs.values, torch.arange(1, len(gate_up) + 1, device=x.device)).int()

    def run() -> object:
        gate, up = F.grouped_mm(tokens, gate_up.mT, offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)

    return {"torch grouped_mm": run}
