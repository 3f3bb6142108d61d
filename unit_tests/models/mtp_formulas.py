"""The MTP head written from its published formulas, on the raw checkpoint tensors: no layer and no kernel of ours.

Slow and plain on purpose. Everything runs in the dtype of the tensors given, over whole sequences [T].
"""

import torch
from torch import Tensor

from unit_tests.checkpoints import EXPERTS_PER_TOKEN, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS

Weights = dict[str, Tensor]
ROTARY_DIM, THETA, EPS = HEAD_DIM // 4, 1e7, 1e-6


def mtp_head(weights: Weights, next_ids: Tensor, hidden: Tensor, first_position: int = 0, layer: int = 0) -> Tensor:
    """y [T, H]: next_ids [T] are the tokens after the positions that hidden [T, H] belongs to."""
    embedding = _norm(weights["model.embed_tokens.weight"][next_ids], weights["mtp.pre_fc_norm_embedding.weight"])
    state = _norm(hidden, weights["mtp.pre_fc_norm_hidden.weight"])
    x = torch.cat([embedding, state], dim=-1) @ weights["mtp.fc.weight"].T
    positions = torch.arange(first_position, first_position + len(next_ids))
    return _norm(_decoder_layer(weights, f"mtp.layers.{layer}", x, positions), weights["mtp.norm.weight"])


def head_logits(weights: Weights, y: Tensor) -> Tensor:
    """Logits [T, V] of the shared output head; no further norm."""
    return y @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * (1 + weight)


def _decoder_layer(weights: Weights, name: str, x: Tensor, positions: Tensor) -> Tensor:
    x = x + _attention(weights, f"{name}.self_attn", _norm(x, weights[f"{name}.input_layernorm.weight"]), positions)
    normed = _norm(x, weights[f"{name}.post_attention_layernorm.weight"])
    is_moe = f"{name}.mlp.gate.weight" in weights
    return x + (_sparse_mlp if is_moe else _swiglu)(weights, f"{name}.mlp", normed)


def _attention(weights: Weights, name: str, x: Tensor, positions: Tensor) -> Tensor:
    length = len(x)
    q_gate = (x @ weights[f"{name}.q_proj.weight"].T).view(length, NUM_HEADS, 2, HEAD_DIM)
    q, gate = q_gate[:, :, 0], q_gate[:, :, 1]
    k = (x @ weights[f"{name}.k_proj.weight"].T).view(length, NUM_KV_HEADS, HEAD_DIM)
    v = (x @ weights[f"{name}.v_proj.weight"].T).view(length, NUM_KV_HEADS, HEAD_DIM)
    q = _rotate(_norm(q, weights[f"{name}.q_norm.weight"]), positions)
    k = _rotate(_norm(k, weights[f"{name}.k_norm.weight"]), positions)
    out = torch.zeros_like(q)
    for head in range(NUM_HEADS):
        kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
        for t in range(length):
            scores = k[: t + 1, kv_head] @ q[t, head] / HEAD_DIM**0.5
            out[t, head] = scores.softmax(0) @ v[: t + 1, kv_head]
    return (out * torch.sigmoid(gate)).reshape(length, -1) @ weights[f"{name}.o_proj.weight"].T


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Pairs (j, j + ROTARY_DIM / 2) turn by position · THETA^(-2j / ROTARY_DIM)."""
    out, half = x.clone(), ROTARY_DIM // 2
    for j in range(half):
        angle = (positions.double() * THETA ** (-2 * j / ROTARY_DIM))[:, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        out[..., j] = x[..., j] * cos - x[..., j + half] * sin
        out[..., j + half] = x[..., j + half] * cos + x[..., j] * sin
    return out


def _swiglu(weights: Weights, name: str, x: Tensor) -> Tensor:
    gate, up = x @ weights[f"{name}.gate_proj.weight"].T, x @ weights[f"{name}.up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ weights[f"{name}.down_proj.weight"].T


def _sparse_mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    probs = (x @ weights[f"{name}.gate.weight"].T).softmax(-1)
    out = torch.sigmoid(x @ weights[f"{name}.shared_expert_gate.weight"].T)
    out = out * _swiglu(weights, f"{name}.shared_expert", x)
    for t, row in enumerate(x):
        chosen = probs[t].argsort(descending=True)[:EXPERTS_PER_TOKEN]
        for expert in chosen:
            gate, up = (weights[f"{name}.experts.gate_up_proj"][expert] @ row).chunk(2)
            expert_out = weights[f"{name}.experts.down_proj"][expert] @ (gate * torch.sigmoid(gate) * up)
            out[t] += probs[t, expert] / probs[t, chosen].sum() * expert_out
    return out
