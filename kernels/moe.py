"""Sparse mixture of experts: route, run the chosen experts, sum. Source: Qwen3.5 MoE block.

N tokens, E experts, k experts per token, I expert width, H hidden size.
"""

import torch
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.linear import linear


def route(router_logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """Softmax over all E, top-k, renormalised, which is the softmax over the top-k logits, in float32 or wider.

    router_logits [N, E] -> weights [N, k] and expert ids [N, k].
    """
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    logits, experts = router_logits.to(wide).topk(num_chosen, dim=-1)
    return logits.softmax(-1), experts


def run_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """`Σ_k weight_k · SwiGLU_{expert_k}(x)`: the weight multiplies the expert's output.

    x [N, H]; gate_up [E, 2I, H] (gate rows first); down [E, H, I]; weights, experts [N, k]. Returns [N, H]. Experts are
    visited in order of their id, so the sum of a token does not depend on the other tokens of the batch.
    """
    weights = weights.to(x.dtype)
    out = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        token, choice = (experts == expert).nonzero(as_tuple=True)
        part = linear(silu_and_mul(linear(x[token], gate_up[expert])), down[expert])
        out.index_add_(0, token, part * weights[token, choice, None])
    return out
