"""Sparse mixture of experts: route, run the chosen experts, sum. Source: Qwen3.5 MoE block.

N tokens, E experts, k experts per token, I expert width, H hidden size.
"""

import torch
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.gpu.dispatch import runs_triton
from kernels.linear import linear
from kernels.quantized_linear import QuantizedWeight, Weight


def route(router_logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """Softmax over all E, top-k, renormalised, which is the softmax over the top-k logits, in float32 or wider.

    router_logits [N, E] -> weights [N, k] and expert ids [N, k].
    """
    if runs_triton(router_logits):
        from kernels.gpu.moe import route as route_triton

        return route_triton(router_logits, num_chosen)
    return route_torch(router_logits, num_chosen)


def route_torch(router_logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """The law: see `route`."""
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    logits, experts = router_logits.to(wide).topk(num_chosen, dim=-1)
    return logits.softmax(-1), experts


def run_experts(
    x: Tensor,
    gate_up: Weight,
    down: Weight,
    weights: Tensor,
    experts: Tensor,
    shared: Tensor,
    shared_gate: Tensor,
) -> Tensor:
    """`Σ_k weight_k · SwiGLU_{expert_k}(x) + sigmoid(shared_gate) · shared`: the weight multiplies the expert's output.

    x [N, H]; gate_up [E, 2I, H] (gate rows first); down [E, H, I]; weights, experts [N, k]; shared [N, H], the shared
    expert's output, and shared_gate [N, 1]. Returns [N, H]. The sum of a token does not depend on the other tokens.
    """
    routed = (weights, experts, shared, shared_gate)
    if runs_triton(x) and isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        from kernels.gpu.moe import run_experts as run_experts_triton

        return run_experts_triton(x, gate_up, down, *routed)
    return run_experts_torch(x, gate_up, down, *routed)


def run_experts_torch(
    x: Tensor,
    gate_up: Weight,
    down: Weight,
    weights: Tensor,
    experts: Tensor,
    shared: Tensor,
    shared_gate: Tensor,
) -> Tensor:
    """The law: see `run_experts`. Experts are visited in order of their id."""
    weights = weights.to(x.dtype)
    out = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        token, choice = (experts == expert).nonzero(as_tuple=True)
        part = linear(silu_and_mul(linear(x[token], _of_expert(gate_up, expert))), _of_expert(down, expert))
        out.index_add_(0, token, part * weights[token, choice, None])
    # The gate as wide as x, so that the sigmoid of a row does not depend on how many rows share a vector register.
    return out + shared_gate.expand_as(x).sigmoid() * shared


def _of_expert(weights: Weight, expert: int) -> Weight:
    return weights.expert(expert) if isinstance(weights, QuantizedWeight) else weights[expert]
